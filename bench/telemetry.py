# SPDX-License-Identifier: Apache-2.0
"""
`python -m bench.telemetry`: what telemetry costs, as CPU per request with it over CPU without, in one run.

Two installations stand before one model server. One shows its metrics and traces one request in a hundred; the other shows
no metrics and traces nothing (what it counts, it counts all the same). Cycle by cycle each is sent the same requests, in an
order by chance, and what both have cost meanwhile is compared: a machine that gets slower does so for both. A scrape costs
the same however many requests there were, so it is measured by itself, and its part at the shipped interval and at the
cycle's own rate is added. Half of the cycles are with two installations that are started anew, so that no figure rests
on how one process happens to lie in memory. `--write` puts the table into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from math import comb
from pathlib import Path
from typing import Final

import httpx
import yaml

from bench.cpu import cpu_nanoseconds
from bench.load import Load, run
from tests.dataplane.installation import REPOSITORY, Installation, Tenant, free_ports, running
from tests.otlp import collecting_traces

_DOCUMENT: Final = REPOSITORY / "docs/benchmarks.md"
_BEGIN, _END = "<!-- telemetry: begin -->", "<!-- telemetry: end -->"
#: As charts/monitoring/prometheus.yaml has it.
_SCRAPE_EVERY_SECONDS: Final = 15.0
_SCRAPES: Final = 10
_SHOW_METRICS: Final = ("extauth", "ratelimit", "metering", "collector", "beacon", "events")
_COUNTED: Final = ("envoy", "extauth", "ratelimit", "metering", "collector", "events", "beacon", "valkey", "postgres")
_CONNECTIONS: Final = 16
_WARM_REQUESTS: Final = 400
#: At the end of a cycle: the collector and settlements finish what it made.
_AFTER_SECONDS: Final = 0.8
#: Times that both installations are started.
_STARTS: Final = 2
#: Chance that the true median is outside of what is told as its interval, at the most.
_DOUBT: Final = 0.05
_BODY: Final = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "hello there"}], "max_tokens": 4}).encode()


@dataclass(frozen=True, slots=True, kw_only=True)
class Cycle:
    """CPU microseconds a request without telemetry, and with it; a scrape's by itself."""

    off: float
    on: float
    #: Microseconds of CPU, by all that is scraped.
    scrape: float
    #: Requests a second of the installation with telemetry, while it had them.
    rate: float

    @property
    def with_scrapes(self) -> float:
        """What a request costs with telemetry, its part of the scrapes too."""
        return self.on + self.scrape / (_SCRAPE_EVERY_SECONDS * self.rate)

    @property
    def ratio(self) -> float:
        """With over without."""
        return self.with_scrapes / self.off


def interval(values: Sequence[float]) -> tuple[float, float]:
    """
    Between which two of *values* their median lies, with 95 % confidence or more, whatever they are distributed like.

    >>> interval([float(number) for number in range(1, 11)])
    (2.0, 9.0)
    """
    ordered, count = sorted(values), len(values)
    outside, rank = 0.0, 0
    while 2 * (outside + comb(count, rank) / 2**count) <= _DOUBT:
        outside += comb(count, rank) / 2**count
        rank += 1
    return ordered[max(0, rank - 1)], ordered[min(count - 1, count - rank)]


def row(lane: str, cycles: Sequence[Cycle]) -> str:
    """A line of the table."""
    ratios = [cycle.ratio for cycle in cycles]
    low, high = interval(ratios)
    off, on = (statistics.median(values) for values in ([c.off for c in cycles], [c.with_scrapes for c in cycles]))
    scrape, rate = statistics.median(c.scrape for c in cycles), statistics.median(c.rate for c in cycles)
    return f"| {lane} | {rate:.0f} | {off:.0f} | {on:.0f} | {scrape / 1000:.0f} | {100 * (statistics.median(ratios) - 1):+.1f} % | {100 * (low - 1):+.1f} to {100 * (high - 1):+.1f} % | {len(cycles)} |"


def main() -> None:
    """Measure and print, or write into the document."""
    parser = argparse.ArgumentParser(prog="python -m bench.telemetry", description=__doc__)
    parser.add_argument("--cycles", type=int, default=20, help="of each lane, with each pair of installations")
    parser.add_argument("--requests", type=int, default=300, help="to each installation in a cycle")
    parser.add_argument("--write", action="store_true", help=f"put the table into {_DOCUMENT.name}")
    options = parser.parse_args()

    found: dict[str, list[Cycle]] = {}
    for _ in range(_STARTS):
        for lane, cycles in _measure(options.cycles, options.requests).items():
            found.setdefault(lane, []).extend(cycles)
            print(row(lane, found[lane]), flush=True)
    if options.write:
        lines = [
            "| lane | requests a second | without, µs | with, µs | of it a scrape, ms | more, median | 95 % interval | cycles |",
            "|---|---|---|---|---|---|---|---|",
            *(row(lane, cycles) for lane, cycles in found.items()),
        ]  # fmt: skip
        text = "\n".join(lines)
        _DOCUMENT.write_text(re.sub(f"(?s){_BEGIN}.*{_END}", f"{_BEGIN}\n{text}\n{_END}", _DOCUMENT.read_text()))


def _measure(cycles: int, requests: int) -> dict[str, list[Cycle]]:
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="peaje-bench-")))
        models = home / "models.yaml"
        models.write_text(yaml.safe_dump(
            {"models": [{"name": "tiny", "engine": "openai", "endpoints": [f"127.0.0.1:{stack.enter_context(_upstream())}"]}]}
        ))  # fmt: skip
        port, *ports = free_ports(len(_SHOW_METRICS) + 1)
        collected = stack.enter_context(collecting_traces(port))
        shown = {f"PEAJE_{part.upper()}_METRICS_PORT": str(one) for part, one in zip(_SHOW_METRICS, ports, strict=True)}
        common = {"PEAJE_MODELS": str(models), "PEAJE_COLLECTOR_CONSERVATION_SECONDS": "0"}
        off = stack.enter_context(running(home / "off", environment=common))
        on = stack.enter_context(running(home / "on", environment=common | shown | {"PEAJE_TRACES_URL": collected.url}))
        on.metrics_ports = dict(zip(_SHOW_METRICS, ports, strict=True))
        tenants = {road.port: _tenants(road) for road in (off, on)}
        pids = {road.port: _pids(road) for road in (off, on)}
        scrape = _scrape(on, pids[on.port])
        order, found = random.Random(cycles), {}
        for lane in tenants[off.port]:
            for road in (off, on):
                _send(road, tenants[road.port][lane], _WARM_REQUESTS)
            found[lane] = [
                _cycle(
                    order.sample([off, on], 2), {port: those[lane] for port, those in tenants.items()}, pids, requests, off=off.port,
                    scrape=scrape,
                )
                for _ in range(cycles)
            ]
        if not collected.spans:
            raise RuntimeError("no span has come: nothing was measured")
    return found


def _cycle(
    roads: Sequence[Installation], tenants: Mapping[int, Tenant], pids: Mapping[int, Sequence[int]], requests: int, *, off: int,
    scrape: float,
) -> Cycle:
    before = {port: sum(map(cpu_nanoseconds, those)) for port, those in pids.items()}
    seconds = {road.port: _send(road, tenants[road.port], requests) for road in roads}
    time.sleep(_AFTER_SECONDS)
    spent = {port: (sum(map(cpu_nanoseconds, those)) - before[port]) / 1000 / requests for port, those in pids.items()}
    [on] = spent.keys() - {off}
    return Cycle(off=spent[off], on=spent[on], scrape=scrape, rate=requests / seconds[on])


def _scrape(road: Installation, pids: Sequence[int]) -> float:
    """Microseconds of CPU that one scrape of everything costs."""
    before = sum(map(cpu_nanoseconds, pids))
    for _ in range(_SCRAPES):
        for part in (*road.metrics_ports, "envoy"):
            road.scrape(part)
    return (sum(map(cpu_nanoseconds, pids)) - before) / 1000 / _SCRAPES


def _send(road: Installation, tenant: Tenant, requests: int) -> float:
    result = asyncio.run(run(Load(
        port=road.port, path="/v1/chat/completions", body=_BODY, requests=requests, connections=_CONNECTIONS,
        headers={"authorization": f"Bearer {tenant.key}", "content-type": "application/json"},
    )))  # fmt: skip
    if result.failures:
        raise RuntimeError(f"{result.failures} of {requests} requests failed")
    return result.seconds


def _tenants(road: Installation) -> dict[str, Tenant]:
    exact = road.new_tenant("exact")
    # Who is under way is never lent.
    road.control("PUT", f"/v1/tenants/{exact.tenant_id}/limits", json={"concurrency": 10**6}).raise_for_status()
    time.sleep(1.0)  # the promise is one second
    return {"nobody asked (express)": road.new_tenant("express"), "ratelimit asked each time": exact}


def _pids(road: Installation) -> list[int]:
    found = {part["name"]: part["pid"] for part in road.status()["parts"]}
    return [int(found[name]) for name in _COUNTED]


@contextmanager
def _upstream() -> Iterator[int]:
    [port] = free_ports(1)
    process = subprocess.Popen([sys.executable, "-m", "bench.upstream", str(port)], cwd=REPOSITORY, stdin=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while True:
            with suppress(httpx.HTTPError):
                if httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", content=_BODY, timeout=5).status_code == 200:
                    break
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the upstream did not start")
            time.sleep(0.05)
        yield port
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


if __name__ == "__main__":
    main()
