# SPDX-License-Identifier: Apache-2.0
"""
The waterfall: what each control costs, switched on in turn, in one run, in front of one upstream.

Every step is an Envoy of its own (`bench.steps`) beside one installation, whose services, stores and collector they
share; the installation's own Envoy stands by. Each run goes through all steps, so a machine that gets slower meanwhile
does so for all of them; what is told is the median of the runs.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any, Final

import httpx
import psycopg
import yaml

from bench.chart import Bar, draw
from bench.cpu import cpu_seconds, resident_mib
from bench.load import Load, Result, run
from bench.peers import Peer, serving
from bench.steps import STEPS, Caller, Step, bootstrap
from chassis import keys
from chassis.clock import utc_now
from chassis.contract import EPOCH_ENVIRONMENT, EXPRESS_ENVIRONMENT
from chassis.secrets import load_peppers
from control.laptop.binaries import find_envoy
from tests.dataplane.installation import REPOSITORY, Installation, Tenant, free_ports, running

CONNECTIONS: Final = 16
#: Before each measurement, so that connections, leases and memories are there.
WARM_REQUESTS: Final = 200
#: The collector and settlements finish what a load made.
_AFTER_SECONDS: Final = 1.5
_READY_SECONDS_MAX: Final = 30.0
#: What a bar is made of: processes of the installation by part.
PARTS: Final[Mapping[str, tuple[str, ...]]] = {
    "Envoy": (), "services": ("extauth", "ratelimit", "metering"), "collector": ("collector",), "stores": ("valkey", "postgres"),
}  # fmt: skip
_PEER = "the peer"
_BOOTSTRAP = "step.yaml"
_ROOMY: Final = {"rpm": 100_000_000, "tpm": 100_000_000_000}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A kind of request, and how many of it a step is measured with."""

    name: str
    body: bytes
    requests: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One step with one shape, once or as the median of several: microseconds of CPU a request, milliseconds."""

    parts: Mapping[str, float]
    upstream: float
    generator: float
    p50: float
    p99: float
    failures: int
    #: Of Envoy or the peer.
    resident_mib: float

    @property
    def all(self) -> float:
        """What the step costs; neither upstream nor load generator are part of it."""
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What was asked for."""

    runs: int
    #: Part of the usual number of requests.
    scale: float
    key_count: int
    peers: Sequence[Peer]


def shapes(scale: float) -> tuple[Shape, ...]:
    """Small request, 50-chunk stream, 100 KB prompt."""

    def body(text: str, **fields: Any) -> bytes:
        return json.dumps({"model": "tiny", "messages": [{"role": "user", "content": text}], **fields}).encode()

    return (
        Shape(name="small JSON", body=body("hello there", max_tokens=4), requests=int(2000 * scale)),
        Shape(name="50-chunk stream", body=body("hello there", max_tokens=50, stream=True), requests=int(500 * scale)),
        Shape(name="100 KB prompt", body=body("word " * 20_000, max_tokens=4), requests=int(500 * scale)),
    )


def measure_all(options: Options) -> dict[str, dict[str, Measured]]:
    """Shape to step (or peer) to its median; prints each measurement as it is made."""
    found: dict[str, dict[str, list[Measured]]] = {shape.name: {} for shape in shapes(options.scale)}
    with tempfile.TemporaryDirectory(prefix="peaje-bench-") as directory, ExitStack() as stack:
        place = Path(directory)
        road = stack.enter_context(running(place / "home", "--engine", "fake"))
        upstream = stack.enter_context(serving_upstream())
        callers = make_callers(road, options.key_count)
        for number in range(options.runs):
            for name, port, pids, who in _each(road, upstream, place / str(number), options.peers):
                for shape in shapes(options.scale):
                    one = _measure(shape, port=port, pids=pids, upstream=upstream[0], keys=callers[who])
                    found[shape.name].setdefault(name, []).append(one)
                    print(f"{number + 1} | {shape.name} | {name} | {one.all:.0f} µs | {one.failures} failures", flush=True)
    return {shape: {name: middle(runs) for name, runs in steps.items()} for shape, steps in found.items()}


def middle(runs: Sequence[Measured]) -> Measured:
    """The median of each figure; failures are added up."""

    def of(figure: Callable[[Measured], float]) -> float:
        return median(map(figure, runs))

    return Measured(
        parts={name: of(lambda one, name=name: one.parts.get(name, 0.0)) for name in runs[0].parts},  # type: ignore[misc]
        upstream=of(lambda one: one.upstream), generator=of(lambda one: one.generator), p50=of(lambda one: one.p50),
        p99=of(lambda one: one.p99), failures=sum(one.failures for one in runs), resident_mib=of(lambda one: one.resident_mib),
    )  # fmt: skip


def table(found: Mapping[str, Mapping[str, Measured]], peers: Sequence[Peer]) -> str:
    """All of it in Markdown: the first step of a shape is what the others are compared with."""
    lines = [
        "| request | step | Envoy | services | collector | stores | all | × bare | more than the step before | p50 / p99, ms "
        "| RSS, MiB | upstream | load generator | failures |",
        "|---" * 14 + "|",
    ]
    for shape, steps in found.items():
        bare, before = next(iter(steps.values())).all, 0.0
        for name, one in steps.items():
            is_peer = _PEER in one.parts
            parts = [f"{one.parts[_PEER]:.0f}", "", "", ""] if is_peer else [f"{one.parts.get(part, 0):.0f}" for part in PARTS]
            more = "" if is_peer else f"{round(one.all - before):+d}"
            before = before if is_peer else one.all
            lines.append(
                f"| {shape} | {name} | {' | '.join(parts)} | {one.all:.0f} | {one.all / bare:.1f}× | {more} | {one.p50:.1f} / {one.p99:.1f} "
                f"| {one.resident_mib:.0f} | {one.upstream:.0f} | {one.generator:.0f} | {one.failures} |"
            )
        lines += [f"| {shape} | {peer.name}: {peer.missing} |" + " |" * 12 for peer in peers if peer.missing]
    return "\n".join(lines)


def chart(found: Mapping[str, Mapping[str, Measured]]) -> str:
    """The same as bars."""
    groups = {
        shape: [
            Bar(name=name, parts=one.parts, said=f"{one.all:.0f} µs, {one.all / next(iter(steps.values())).all:.1f}×")
            for name, one in steps.items()
        ]
        for shape, steps in found.items()
    }  # fmt: skip
    has_peers = any(_PEER in one.parts for steps in found.values() for one in steps.values())
    return draw(groups, [*PARTS, *([_PEER] if has_peers else [])], title="CPU microseconds a request, each control switched on in turn")


def _each(
    road: Installation, upstream: tuple[int, int], place: Path, peers: Sequence[Peer]
) -> Iterator[tuple[str, int, dict[str, list[int]], Caller]]:
    """Start each step and each peer that there is, one after the other: its name, port, processes by part, caller."""
    status = {part["name"]: int(part["pid"]) for part in road.status()["parts"] if part.get("pid")}
    for number, step in enumerate(STEPS):
        directory = place / f"step-{number}"
        with step_envoy(road, step, directory, upstream[1]) as (pid, port):
            beside = {part: [status[name] for name in names if name in step.uses] for part, names in PARTS.items()}
            yield step.name, port, beside | {"Envoy": [pid]}, step.caller
    for number, peer in enumerate(peers):
        if peer.missing:
            continue
        directory = place / f"peer-{number}"
        directory.mkdir(parents=True)
        [port] = free_ports(1)
        ready = _answers(port)
        with serving(peer, upstream=upstream[1], port=port, directory=directory, ready=ready) as pid:
            yield peer.name, port, {_PEER: [pid]}, Caller.UNLIMITED


def prepare(home: Path, step: Step, directory: Path, *, port: int, admin: int, upstream: int) -> None:
    """
    Make *directory* what an Envoy of *step* finds around it: *home*, but for Envoy's own part of it.

    Its journal is *home*'s if it is collected, else one that nobody reads.
    """
    directory.mkdir(parents=True)
    own = {"envoy"} if step.is_collected else {"envoy", "journal"}
    for entry in home.iterdir():
        if entry.name not in own:
            (directory / entry.name).symlink_to(entry)
    if "journal" in own:
        (directory / "journal").mkdir()
    shutil.copytree(home / "envoy", directory / "envoy")
    clusters = directory / "envoy/clusters.yaml"
    # The installation's own model server is not fast enough to be stood before; it has one pool.
    clusters.write_text(re.sub(r"(?<=port_value: )\d+", str(upstream), clusters.read_text()))
    whole = yaml.safe_load((directory / "envoy/envoy.yaml").read_text())
    made = bootstrap(whole, step, port=port, admin=admin, upstream=upstream)
    (directory / _BOOTSTRAP).write_text(yaml.safe_dump(made))


@contextmanager
def step_envoy(road: Installation, step: Step, directory: Path, upstream: int) -> Iterator[tuple[int, int]]:
    """One Envoy of *step* beside *road*: its pid and port."""
    port, admin = free_ports(2)
    prepare(road.home, step, directory, port=port, admin=admin, upstream=upstream)
    process = subprocess.Popen(
        [find_envoy(os.environ), "-c", _BOOTSTRAP, "--concurrency", "2", "--use-dynamic-base-id", "--log-level", "error",
         "--file-flush-interval-msec", "50"],
        cwd=directory, stdin=subprocess.DEVNULL,
        env=os.environ | {EPOCH_ENVIRONMENT: uuid.uuid4().hex, EXPRESS_ENVIRONMENT: "on" if step.is_express else "off"},
    )  # fmt: skip
    try:
        _wait_ready(process, f"http://127.0.0.1:{admin}/ready", step.name)
        yield process.pid, port
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(_READY_SECONDS_MAX)


@contextmanager
def serving_upstream() -> Iterator[tuple[int, int]]:
    """Run the fast upstream: its pid and port."""
    [port] = free_ports(1)
    process = subprocess.Popen([sys.executable, "-m", "bench.upstream", str(port)], cwd=REPOSITORY, stdin=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + _READY_SECONDS_MAX
        while not _answers(port)():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the upstream did not start")
            time.sleep(0.05)
        yield process.pid, port
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(_READY_SECONDS_MAX)


def _answers(port: int) -> Callable[[], bool]:
    """Whether a small chat request is answered there."""

    def ask() -> bool:
        try:
            return httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", content=shapes(1.0)[0].body, timeout=10,
                              headers={"content-type": "application/json", "authorization": "Bearer none"}).status_code == 200
        except httpx.HTTPError:
            return False

    return ask


def _wait_ready(process: subprocess.Popen[bytes], url: str, name: str) -> None:
    deadline = time.monotonic() + _READY_SECONDS_MAX
    while True:
        try:
            if httpx.get(url, timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"Envoy does not start for the step {name!r}")
        time.sleep(0.1)


def _measure(shape: Shape, *, port: int, pids: Mapping[str, list[int]], upstream: int, keys: tuple[str, ...]) -> Measured:
    load = Load(
        port=port, path="/v1/chat/completions", headers={"content-type": "application/json"}, body=shape.body,
        requests=shape.requests, connections=CONNECTIONS, keys=keys,
    )  # fmt: skip
    asyncio.run(run(replace(load, requests=min(WARM_REQUESTS, shape.requests))))

    def spent() -> dict[str, float]:
        return {part: sum(map(cpu_seconds, found)) for part, found in pids.items()}

    before, upstream_before, generator = spent(), cpu_seconds(upstream), time.process_time()
    result: Result = asyncio.run(run(load))
    generator = time.process_time() - generator
    time.sleep(_AFTER_SECONDS)
    after, each = spent(), 1e6 / load.requests
    return Measured(
        parts={part: each * (after[part] - before[part]) for part in pids},
        upstream=each * (cpu_seconds(upstream) - upstream_before), generator=each * generator, p50=result.quantile(0.5),
        p99=result.quantile(0.99), failures=result.failures, resident_mib=sum(map(resident_mib, next(iter(pids.values())))),
    )  # fmt: skip


def make_callers(road: Installation, key_count: int) -> dict[Caller, tuple[str, ...]]:
    """A tenant for each kind of caller, with so many keys."""
    tenants = {
        Caller.UNLIMITED: road.new_tenant("bench-unlimited"),
        Caller.FAR: road.new_tenant("bench-far", **_ROOMY),
        Caller.ASKED: road.new_tenant("bench-asked", **_ROOMY),
    }
    # Who is under way is never lent, and a quota is.
    for caller, limits in {Caller.FAR: {"monthly_tokens": 10**12}, Caller.ASKED: {"concurrency": 10**6}}.items():
        road.control("PUT", f"/v1/tenants/{tenants[caller].tenant_id}/limits", json=limits).raise_for_status()
    time.sleep(1.0)  # the promise is a second
    return {
        caller: _with_keys(road, tenant, key_count, first=place * key_count) for place, (caller, tenant) in enumerate(tenants.items())
    }


def _with_keys(road: Installation, tenant: Tenant, count: int, *, first: int) -> tuple[str, ...]:
    """Its key and others by COPY, for a hundred thousand calls of the control API would take an hour."""
    if count == 1:
        return (tenant.key,)
    peppers, now = load_peppers(road.home), utc_now()
    version = max(peppers)
    made = []
    state = json.loads((road.home / "run/state.json").read_text())
    password = (road.home / "secrets/postgres-password").read_text().strip()
    with psycopg.connect(psycopg.conninfo.make_conninfo(state["postgres_url"], password=password)) as connection:
        # As many notifications of one transaction are not what is measured.
        connection.execute("set local session_replication_role = replica")
        [(project,)] = connection.execute("select project_id from api_key where key_id = %s", [tenant.key_id]).fetchall()
        with connection.cursor().copy(
            "copy api_key (key_id, tenant_id, project_id, name, environment, key_hash, pepper_version, last_four, created_at, expires_at) "
            "from stdin"
        ) as copy:
            for number in range(first, first + count - 1):
                body = f"peaje_live_{number:012}_{number:032}"
                key = body + keys.checksum(body)
                made.append(key)
                copy.write_row(
                    (f"{number:012}", tenant.tenant_id, project, "bench", "live", keys.hash_key(peppers[version], key), version,
                     key[-4:], now, now + timedelta(days=1))
                )  # fmt: skip
    return (tenant.key, *made)
