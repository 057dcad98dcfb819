# SPDX-License-Identifier: Apache-2.0
"""
`python -m bench.extauth`: what a decision costs extauth with a million keys of a hundred thousand tenants.

In an installation's own Postgres, loaded by COPY; the servicer as it is served, without Envoy and gRPC, whose
shares `python -m bench` shows; and a process of it over its Unix socket, in a closed loop. `--write` puts the table
into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import secrets
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import grpc
import psycopg

from bench.cpu import cpu_seconds
from chassis import contract, keys
from chassis.clock import utc_now
from chassis.models import ModelCatalogue
from chassis.secrets import load_peppers
from chassis.stores.postgres import read_pool
from chassis.telemetry.log import configure
from chassis.wire import ext_authz_pb2 as wire
from extauth.adapters.directory import Directory
from extauth.adapters.identities import Identities
from extauth.adapters.key_writes import KeyWrites
from extauth.core.cache import KNOWN_COUNT_MAX
from extauth.core.strangers import Strangers
from extauth.servicer import METHOD, Servicer
from tests.dataplane.installation import REPOSITORY, Installation, running
from tests.identities import Call, FakeDirectory, document_for, identities_in, write_home
from tests.provider import running_provider

KEYS: Final = 1_000_000
TENANTS: Final = 100_000
#: Decisions of each kind that are timed; a miss reads Postgres, so there are fewer.
HITS: Final = 100_000
MISSES: Final = 10_000
#: Calls over gRPC, those before they are timed, and how many are under way at the same time: two for each of its threads.
CALLS: Final = 20_000
WARM_CALLS: Final = 1_000
UNDER_WAY: Final = 8
#: Refusals of each of two kinds whose times are compared (K05 asks for |t| < 4.5 over so many).
TIMED: Final = 100_000
#: Tokens whose key id nobody has heard of, each another.
STRANGE_KEYS: Final = 10_000
_DOCUMENT: Final = REPOSITORY / "docs/benchmarks.md"
_BEGIN, _END = "<!-- extauth: begin -->", "<!-- extauth: end -->"
_MODELS: Final = ModelCatalogue.parse(
    {"models": [{"name": "tiny", "engine": "openai", "endpoints": ["127.0.0.1:1"]}]}, source="bench"
)


def main() -> None:
    """Load, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keys", type=int, default=KEYS)
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="peaje-bench-") as directory:
        with running(Path(directory) / "home", "--engine", "fake") as installation:
            state = json.loads((installation.home / "run/state.json").read_text())
            password = (installation.home / "secrets/postgres-password").read_text().strip()
            url = psycopg.conninfo.make_conninfo(state["postgres_url"], password=password)
            loaded = _load(url, load_peppers(installation.home), asked.keys)
            figures = {"load of the keys by COPY": f"{loaded:.1f} s", **_measure(url, installation, asked.keys)}
    table = "\n".join(
        [f"{asked.keys:,} keys, {TENANTS:,} tenants.", "", "| what | figure |", "|---|---|", *(f"| {k} | {v} |" for k, v in figures.items())]
    )
    print(table)
    if asked.write:
        text = _DOCUMENT.read_text()
        _DOCUMENT.write_text(re.sub(f"(?s){_BEGIN}.*{_END}", f"{_BEGIN}\n{table}\n{_END}", text))


def key_of(number: int) -> str:
    """The key of that number: not random, so that nothing of a million needs to be kept."""
    body = f"peaje_live_{number:012}_{number:032}"
    return body + keys.checksum(body)


def _load(url: str, peppers: dict[int, bytes], count: int) -> float:
    version, now = max(peppers), utc_now()
    with psycopg.connect(url, autocommit=False) as connection, connection.cursor() as cursor:
        # A million notifications of one transaction are not what is measured.
        cursor.execute("set local session_replication_role = replica")
        began = time.monotonic()
        tenants = ((f"bench-{number}", f"bench {number}", now) for number in range(TENANTS))
        _copy(cursor, "copy tenant (tenant_id, name, created_at) from stdin", tenants)
        projects = ((f"bench-{number}", "default", now) for number in range(TENANTS))
        _copy(cursor, "copy project (tenant_id, project_id, created_at) from stdin", projects)
        rows = (
            (
                f"{number:012}", f"bench-{number % TENANTS}", "default", "bench", "live",
                keys.hash_key(peppers[version], key_of(number)), version, key_of(number)[-4:], now, now + timedelta(days=365),
            )
            for number in range(count)
        )  # fmt: skip
        _copy(
            cursor,
            "copy api_key (key_id, tenant_id, project_id, name, environment, key_hash, pepper_version, last_four, "
            "created_at, expires_at) from stdin", rows,
        )  # fmt: skip
        connection.commit()
        took = time.monotonic() - began
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("analyze")
    return took


def _copy(cursor: psycopg.Cursor[Any], statement: Any, rows: Iterator[tuple[Any, ...]]) -> None:
    with cursor.copy(statement) as copy:
        for row in rows:
            copy.write_row(row)


def _measure(url: str, installation: Installation, count: int) -> dict[str, str]:
    # As served, each denial is a line of JSON; here it goes nowhere.
    with contextlib.redirect_stderr(Path(os.devnull).open("w")):
        configure("bench")
    figures = _measure_process(url, installation)
    with read_pool(url, name="bench", connections=4) as pool:
        pool.wait()
        peppers = load_peppers(installation.home)

        def serve(unknown_per_minute: int) -> Servicer:
            identities = Identities(
                Directory(pool, clock=utc_now), peppers=peppers,
                writes=KeyWrites(url, clock=utc_now, newest_pepper=max(peppers)), home=installation.home,
                control_url="http://127.0.0.1:1", strangers=Strangers(per_minute=unknown_per_minute),
            )  # fmt: skip
            return Servicer(identities, catalogue=lambda: _MODELS, clock=utc_now)

        # Without the bound, because what a look-up costs is asked here; with it a second one.
        unbounded, bounded = serve(0), serve(1)
        before = _resident_mib()

        def ask(key: str, model: str = "tiny", servicer: Servicer = unbounded) -> Callable[[], str | None]:
            raw = request_of(key, model)
            return lambda: servicer.check(wire.CheckRequest.FromString(raw), Call()).WhichOneof("http_response")

        step = count // MISSES
        misses = [ask(key_of(number * step)) for number in range(MISSES)]
        figures["miss: known key, read from Postgres"] = _row(misses, "ok_response")
        hit = ask(key_of(0))
        figures["hit: from memory"] = _row([hit] * HITS, "ok_response")
        figures["deny: a model that is not served"] = _row([ask(key_of(0), "other")] * HITS, "denied_response")
        figures["deny: not a key, nothing looked up"] = _row([ask("nonsense")] * HITS, "denied_response")
        strangers = [ask(keys.mint("live", secrets.token_bytes).key) for _ in range(MISSES)]
        figures["deny: a key that nobody has, each another (K04), read from Postgres"] = _row(strangers, "denied_response")
        figures["deny: the same ones again, nothing looked up"] = _row(strangers, "denied_response")
        figures[f"K05: a wrong secret of a key that there is, and a key that nobody has; {TIMED:,} of each in turn"] = _difference(
            ask(_wrong_secret(0)), strangers[0]
        )
        unseen = [ask(keys.mint("live", secrets.token_bytes).key, servicer=bounded) for _ in range(MISSES)]
        unseen[0]()
        figures["deny: the same from an address that has no turn left, not looked up"] = _row(unseen, "denied_response")
        for number in range(min(count, KNOWN_COUNT_MAX)):
            ask(key_of(number))()
        held = _resident_mib() - before
        figures[f"memory of {min(count, KNOWN_COUNT_MAX):,} remembered keys, the most that are"] = f"{held:.0f} MiB"
        figures["resident process then"] = f"{_resident_mib():.0f} MiB"
    return figures | _measure_tokens()


def _measure_tokens() -> dict[str, str]:
    """J05: a token of a good issuer, alone and with a token of an unknown key id before each."""
    with running_provider() as provider, tempfile.TemporaryDirectory(prefix="peaje-") as directory:
        write_home(Path(directory), document_for(provider))
        identities = identities_in(Path(directory), FakeDirectory())
        servicer = Servicer(identities, catalogue=lambda: _MODELS, clock=utc_now)

        def ask(token: str) -> Callable[[], str | None]:
            raw = request_of(token, "tiny")
            return lambda: servicer.check(wire.CheckRequest.FromString(raw), Call()).WhichOneof("http_response")

        good = ask(provider.mint())
        while good() != "ok_response":
            time.sleep(0.05)  # the key set is on its way
        other = ask(provider.mint())
        strangers = [ask(provider.cook({"header": {"kid": f"unknown-{number}"}})) for number in range(STRANGE_KEYS)]
        before = provider.fetches
        figures = {
            "token: verified before": _row([good] * STRANGE_KEYS, "ok_response"),
            "the same, with another good one before each": _row([good] * STRANGE_KEYS, "ok_response", between=[other] * STRANGE_KEYS),
            "the same, with an unknown key id before each (J05)": _row([good] * STRANGE_KEYS, "ok_response", between=strangers),
        }
        figures[f"fetches of the key set meanwhile, {STRANGE_KEYS:,} unknown key ids"] = str(provider.fetches - before)
        identities.close()
    return figures


def _row(calls: list[Callable[[], str | None]], expected: str, *, between: Sequence[Callable[[], object]] = ()) -> str:
    """Time *calls*; one of *between*, if there are any, is called before each, and its time is nobody's."""
    times = []
    cpu = time.process_time_ns()
    for number, call in enumerate(calls):
        if between:
            aside = time.process_time_ns()
            between[number]()
            cpu += time.process_time_ns() - aside
        began = time.perf_counter_ns()
        answer = call()
        times.append(time.perf_counter_ns() - began)
        if answer != expected:
            raise SystemExit(f"a decision answered {answer}, not {expected}")
    cpu = time.process_time_ns() - cpu
    times.sort()
    return (
        f"{cpu / len(calls) / 1000:.0f} µs CPU; p50 {times[len(times) // 2] / 1000:.0f} µs, "
        f"p99 {times[len(times) * 99 // 100] / 1000:.0f} µs"
    )


def _wrong_secret(number: int) -> str:
    body = f"peaje_live_{number:012}_{number + 1:032}"
    return body + keys.checksum(body)


def _difference(first: Callable[[], str | None], second: Callable[[], str | None]) -> str:
    """Welch's t of the times of two refusals, one after the other so that what else runs reaches both alike."""
    times: tuple[list[int], list[int]] = ([], [])
    for call in (first, second):
        call()  # whatever has to be looked up
    for number in range(2 * TIMED):
        # Which of the two comes first changes: it would find the processor's caches as the other left them.
        which = (number + number // 2) % 2
        began = time.perf_counter_ns()
        (first, second)[which]()
        times[which].append(time.perf_counter_ns() - began)
    means = [statistics.fmean(taken) for taken in times]
    error = math.sqrt(sum(statistics.pvariance(taken, mean) / TIMED for taken, mean in zip(times, means, strict=True)))
    return f"{means[0] / 1000:.1f} and {means[1] / 1000:.1f} µs, t = {(means[0] - means[1]) / error:.1f}"


def request_of(key: str, model: str) -> bytes:
    """What Envoy asks about a chat request with this key."""
    request = wire.CheckRequest()
    http = request.attributes.request.http
    http.method, http.path = "POST", "/v1/chat/completions"
    http.header_map.headers.add(key="authorization", raw_value=f"Bearer {key}".encode())
    http.header_map.headers.add(key="x-request-id", raw_value=b"0f5c0b4e-0000-4000-8000-000000000000")
    request.attributes.source.address.socket_address.address = "192.0.2.7"
    facts = request.attributes.metadata_context.filter_metadata[contract.NS_REQUEST].fields
    facts[contract.REQ_DIALECT].string_value, facts[contract.REQ_MODEL].string_value = "openai.chat", model
    return bytes(request.SerializeToString())


def _measure_process(url: str, installation: Installation) -> dict[str, str]:
    """A process of its own: how soon it serves, and how many requests a second over its Unix socket."""
    began = time.monotonic()
    with _process(url, installation) as (process, socket):
        with grpc.insecure_channel(f"unix:{socket}") as channel:
            grpc.channel_ready_future(channel).result(timeout=60)
            figures = {"start of extauth until it serves": f"{time.monotonic() - began:.1f} s"}
            for name, key in {"a remembered key": key_of(0), "not a key": "nonsense"}.items():
                _closed_loop(channel, request_of(key, "tiny"), WARM_CALLS)
                figures[f"one process over gRPC, {UNDER_WAY} calls under way: {name}"] = _throughput(channel, process.pid, key)
    return figures


def _throughput(channel: grpc.Channel, pid: int, key: str) -> str:
    began, served, sent = time.monotonic(), cpu_seconds(pid), time.process_time()
    _closed_loop(channel, request_of(key, "tiny"), CALLS)
    seconds, served, sent = time.monotonic() - began, cpu_seconds(pid) - served, time.process_time() - sent
    return (
        f"{CALLS / seconds:,.0f} requests/s with {served / seconds:.2f} of a core, {1e6 * served / CALLS:.0f} µs CPU each; "
        f"the load generator takes {sent / seconds:.2f} of another"
    )


def _closed_loop(channel: grpc.Channel, request: bytes, count: int) -> None:
    """Send *request* *count* times, as many under way at all times; raises if a call fails."""
    call = channel.unary_unary(METHOD)
    room = threading.Semaphore(UNDER_WAY)
    failed: list[grpc.RpcError] = []

    def done(answer: grpc.Future) -> None:
        if (exc := answer.exception()) is not None:
            failed.append(exc)
        room.release()

    for _ in range(count):
        room.acquire()
        call.future(request).add_done_callback(done)
    for _ in range(UNDER_WAY):
        room.acquire()
    if failed:
        raise SystemExit(f"{len(failed)} calls failed, the first with {failed[0]}")


@contextlib.contextmanager
def _process(url: str, installation: Installation) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """extauth as a process of its own, in a directory of its own, and its socket."""
    with tempfile.TemporaryDirectory(prefix="peaje-") as directory:
        environment = {
            **os.environ, "PEAJE_HOME": str(installation.home), "PEAJE_POSTGRES_URL": url, "PYTHONPATH": str(REPOSITORY),
        }  # fmt: skip
        process = subprocess.Popen([sys.executable, "-m", "extauth"], cwd=directory, env=environment, stderr=subprocess.DEVNULL)
        try:
            yield process, Path(directory) / contract.SOCKETS[contract.CLUSTER_EXTAUTH]
        finally:
            process.terminate()
            process.wait(timeout=30)


def _resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


if __name__ == "__main__":
    main()
