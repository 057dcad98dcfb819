# SPDX-License-Identifier: Apache-2.0
"""
Memory is flat: a hundred thousand keys in turn, and ten million that nobody has, for ten minutes.

`./peaje test --soak tests/chaos/test_soak.py [--soak-seconds 30]`: a shorter one has as much less of everything.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from statistics import median

import grpc
import pytest
from psycopg.conninfo import make_conninfo

from bench import waterfall
from bench.cpu import anonymous_mib, descendants
from bench.extauth import request_of
from bench.load import Load, run
from bench.steps import Caller
from chassis import contract
from chassis.wire import ext_authz_pb2 as wire
from extauth.servicer import METHOD
from tests.chaos.garbage import garbage
from tests.dataplane.installation import REPOSITORY, Installation, running

pytestmark = [pytest.mark.soak, pytest.mark.timeout(7200)]

_SECONDS = 600
_KEYS, _GARBAGE = 100_000, 10_000_000
#: Requests after which what Envoy's workers remember is as much as it will be, also where each collects its garbage late.
_FILLING = 80_000
#: Through Envoy, between two looks at memory: half with a key, half with garbage.
_ROUND = 1000
_CALLS_AT_ONCE = 8
#: What may come from the second quarter to the last: allocators' own ways, and tables that are not full in a short soak.
_GROWTH_SHARE, _GROWTH_MIB = 0.05, 8.0


def test_memory_is_flat(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Of every process of an installation, and of a servicer that is asked about nothing but garbage."""
    seconds = request.config.getoption("--soak-seconds")
    scale = seconds / _SECONDS
    seen: dict[str, list[float]] = {}
    with running(tmp_path / "home", "--engine", "fake") as road:
        known = _known(road, int(_KEYS * scale))
        pids = {part["name"]: int(part["pid"]) for part in road.status()["parts"] if part.get("pid")}
        load = Load(
            port=road.port, path="/v1/chat/completions", headers={"content-type": "application/json"},
            body=waterfall.shapes(1.0)[0].body, requests=_ROUND, connections=16,
        )  # fmt: skip
        filling = cycle(known)
        for _ in range(int(_FILLING * scale) // _ROUND):
            assert 0 == asyncio.run(run(replace(load, keys=tuple(islice(filling, _ROUND))))).failures
        with _refusing(road, int(_GARBAGE * scale)) as refused:
            mixed, ends = _mixed(known), time.monotonic() + seconds
            while time.monotonic() < ends:
                result = asyncio.run(run(replace(load, keys=tuple(islice(mixed, _ROUND)))))
                assert _ROUND // 2 == result.failures
                for name, pid in pids.items():
                    seen.setdefault(name, []).append(sum(map(anonymous_mib, (pid, *descendants(pid)))))
        seen["the servicer, garbage alone"] = refused

    rounds = len(next(iter(seen.values())))
    print(f"{len(known):,} keys, {rounds * _ROUND // 2:,} garbage keys through Envoy, {int(_GARBAGE * scale):,} to the servicer; MiB:")
    for name, sizes in seen.items():
        print(f"{name}: {' '.join(f'{middle:.0f}' for middle in _quarters(sizes))}")
    grown = {name: _quarters(sizes) for name, sizes in seen.items() if not _is_flat(sizes)}
    assert not grown


def _quarters(sizes: Sequence[float]) -> list[float]:
    each = max(1, len(sizes) // 4)
    return [median(sizes[begin : begin + each]) for begin in range(0, 4 * each, each) if sizes[begin : begin + each]]


def _is_flat(sizes: Sequence[float]) -> bool:
    _, second, *_, last = _quarters(sizes)
    return last <= second * (1 + _GROWTH_SHARE) + _GROWTH_MIB


def _mixed(known: Sequence[str]) -> Iterator[str]:
    for number, key in enumerate(cycle(known)):
        yield key
        yield from garbage(number, 1)


def _known(road: Installation, count: int) -> list[str]:
    """Keys of two callers, without limits and with; extauth has been asked about each, for its memory is filled once."""
    callers = waterfall.make_callers(road, count // 2)
    known = [key for caller in (Caller.UNLIMITED, Caller.FAR) for key in callers[caller]]
    at_once = threading.Semaphore(_CALLS_AT_ONCE)
    with grpc.insecure_channel(f"unix:{road.home / contract.SOCKETS[contract.CLUSTER_EXTAUTH]}") as channel:
        check = channel.unary_unary(METHOD, response_deserializer=wire.CheckResponse.FromString)
        calls = []
        for key in known:
            at_once.acquire()
            call = check.future(request_of(key, "tiny"))
            call.add_done_callback(lambda _: at_once.release())
            calls.append(call)
        assert {"ok_response"} == {call.result().WhichOneof("http_response") for call in calls}
    return known


@contextmanager
def _refusing(road: Installation, count: int) -> Iterator[list[float]]:
    """A servicer in a process of its own that refuses so many; its memory as it went, once the block is left."""
    state = json.loads((road.home / "run/state.json").read_text())
    password = (road.home / "secrets/postgres-password").read_text().strip()
    url = make_conninfo(state["postgres_url"], password=password)
    sizes: list[float] = []
    with subprocess.Popen(
        [sys.executable, "-m", "tests.chaos.garbage", str(road.home), url, str(count)], cwd=REPOSITORY, stdout=subprocess.PIPE,
        text=True, stdin=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    ) as process:  # fmt: skip
        try:
            yield sizes
        except BaseException:
            process.kill()
            raise
        said, _ = process.communicate()
    assert 0 == process.returncode
    sizes += [float(line.split()[1]) for line in said.splitlines()]
