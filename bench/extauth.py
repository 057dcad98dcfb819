# SPDX-License-Identifier: Apache-2.0
"""
`python -m bench.extauth`: what a decision costs extauth with a million keys of a hundred thousand tenants.

In an installation's own Postgres, loaded by COPY; the servicer as it is served, without Envoy and gRPC, whose
shares `python -m bench` shows. `--write` puts the table into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import grpc
import psycopg

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
from extauth.servicer import Servicer
from tests.dataplane.installation import REPOSITORY, Installation, running
from tests.identities import FakeDirectory, document_for, identities_in, write_home
from tests.provider import running_provider

KEYS: Final = 1_000_000
TENANTS: Final = 100_000
#: Decisions of each kind that are timed; a miss reads Postgres, so there are fewer.
HITS: Final = 100_000
MISSES: Final = 10_000
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
    figures = {"start of extauth until it serves": f"{_cold_start(url, installation):.1f} s"}
    with read_pool(url, name="bench", connections=4) as pool:
        pool.wait()
        peppers = load_peppers(installation.home)
        identities = Identities(
            Directory(pool, clock=utc_now), peppers=peppers,
            writes=KeyWrites(url, clock=utc_now, newest_pepper=max(peppers)), home=installation.home,
            control_url="http://127.0.0.1:1",
        )  # fmt: skip
        servicer = Servicer(identities, catalogue=lambda: _MODELS, clock=utc_now)
        before = _resident_mib()

        def ask(key: str, model: str = "tiny") -> Callable[[], str | None]:
            raw = _request(key, model)
            return lambda: servicer.check(wire.CheckRequest.FromString(raw), None).WhichOneof("http_response")

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
            raw = _request(token, "tiny")
            return lambda: servicer.check(wire.CheckRequest.FromString(raw), None).WhichOneof("http_response")

        good = ask(provider.mint())
        while good() != "ok_response":
            time.sleep(0.05)  # the key set is on its way
        strangers = [ask(provider.cook({"header": {"kid": f"unknown-{number}"}})) for number in range(STRANGE_KEYS)]
        before = provider.fetches
        figures = {
            "token: verified before": _row([good] * STRANGE_KEYS, "ok_response"),
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


def _request(key: str, model: str) -> bytes:
    request = wire.CheckRequest()
    http = request.attributes.request.http
    http.method, http.path = "POST", "/v1/chat/completions"
    http.header_map.headers.add(key="authorization", raw_value=f"Bearer {key}".encode())
    http.header_map.headers.add(key="x-request-id", raw_value=b"0f5c0b4e-0000-4000-8000-000000000000")
    request.attributes.source.address.socket_address.address = "192.0.2.7"
    facts = request.attributes.metadata_context.filter_metadata[contract.NS_REQUEST].fields
    facts[contract.REQ_DIALECT].string_value, facts[contract.REQ_MODEL].string_value = "openai.chat", model
    return bytes(request.SerializeToString())


def _cold_start(url: str, installation: Installation) -> float:
    """From the start of a process of its own, in a directory of its own, until it answers gRPC."""
    with tempfile.TemporaryDirectory(prefix="peaje-") as directory:
        environment = {
            **os.environ, "PEAJE_HOME": str(installation.home), "PEAJE_POSTGRES_URL": url, "PYTHONPATH": str(REPOSITORY),
        }  # fmt: skip
        began = time.monotonic()
        process = subprocess.Popen([sys.executable, "-m", "extauth"], cwd=directory, env=environment, stderr=subprocess.DEVNULL)
        try:
            socket = Path(directory) / contract.SOCKETS[contract.CLUSTER_EXTAUTH]
            with grpc.insecure_channel(f"unix:{socket}") as channel:
                grpc.channel_ready_future(channel).result(timeout=60)
            return time.monotonic() - began
        finally:
            process.terminate()
            process.wait(timeout=30)


def _resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


if __name__ == "__main__":
    main()
