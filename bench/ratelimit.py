# SPDX-License-Identifier: Apache-2.0
"""
`python -m bench.ratelimit`: what a decision costs ratelimit and its store, and what it costs without the store.

The servicer as it is served, one thread, on a Valkey of its own; without Envoy and gRPC, whose shares
`python -m bench` shows. `--write` puts the table into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import redis
import structlog

from chassis import contract
from chassis.clock import utc_now
from chassis.errors import Unavailable
from chassis.wire import ratelimit_pb2 as wire
from ratelimit.adapters.counters import StoredCounters, connect
from ratelimit.adapters.doubts import Doubts
from ratelimit.adapters.loans import Loans
from ratelimit.adapters.local import FAILURES_TO_OPEN, Breaker, LocalCounters
from ratelimit.core.demand import Counter
from ratelimit.core.limits import Limit, LimitTable, OnStoreError, Period, Pool, Share, Unit
from ratelimit.servicer import Servicer
from tests.dataplane.installation import REPOSITORY
from tests.integration.stores import store_server

_DOCUMENT: Final = REPOSITORY / "docs/benchmarks.md"
_BEGIN, _END = "<!-- ratelimit: begin -->", "<!-- ratelimit: end -->"
_TICKS: Final = os.sysconf("SC_CLK_TCK")
#: So far away that no request meets it.
_FAR: Final = 10**12


@dataclass(slots=True)
class Fixed:
    """Limits that are the same for all; what `LimitsSource` is to the servicer, without Postgres."""

    current: LimitTable = field(default_factory=lambda: LimitTable(()))
    pool: Pool | None = None

    def price(self, *, model: str, tenant_id: str) -> None:
        """Nothing has a price."""
        del model, tenant_id

    def share(self, *, model: str, tenant_id: str) -> Share | None:
        """Of one pool."""
        del model, tenant_id
        return None if self.pool is None else Share(pool=self.pool, weight=1)

    def spent(self, counter: Counter) -> int:
        """Nothing was used before."""
        del counter
        return 0


class Counting:
    """A store's client that counts what it sends: each command is a round trip."""

    def __init__(self, store: redis.Redis) -> None:
        self.trips = 0
        self._send = store.execute_command
        store.execute_command = self._count  # type: ignore[method-assign, assignment]

    def _count(self, *arguments: Any, **options: Any) -> Any:
        self.trips += 1
        return self._send(*arguments, **options)


def limits(count: int, *, on_store_error: OnStoreError = OnStoreError.LOCAL) -> LimitTable:
    """*count* limits of all kinds that one request meets."""
    kinds = [
        (Unit.REQUESTS, Period.MINUTE), (Unit.TOKENS, Period.MINUTE), (Unit.TOKENS, Period.CALENDAR_MONTH),
        (Unit.CONCURRENCY, Period.NOW), (Unit.REQUESTS, Period.CALENDAR_DAY), (Unit.INPUT_TOKENS, Period.HOUR),
        (Unit.OUTPUT_TOKENS, Period.HOUR), (Unit.REQUESTS, Period.SECOND),
    ]  # fmt: skip
    return LimitTable(
        Limit(limit_id=number, tenant_id="bench", unit=unit, period=period, amount=_FAR, on_store_error=on_store_error)
        for number, (unit, period) in enumerate(kinds[:count])
    )


class Desk:
    """A servicer on a store, asked with bytes as Envoy sends them."""

    def __init__(self, url: str, source: Fixed) -> None:
        self.store = connect(url, cluster=False)
        self.trips = Counting(self.store)
        self.breaker = Breaker(clock=time.monotonic, opened=lambda: None)
        self.servicer = Servicer(
            source, StoredCounters(self.store), LocalCounters(share=1.0), self.breaker,  # type: ignore[arg-type]
            clock=utc_now, output_cap=16_384, slice_tokens=256, draft_headers=False,
            # Nobody is refused or lent to here.
            doubts=Doubts(StoredCounters(self.store), None),  # type: ignore[arg-type]
            loans=Loans(StoredCounters(self.store), None),  # type: ignore[arg-type]
        )  # fmt: skip
        self._number = 0

    def admit(self) -> str:
        """Ask for one admission; its request id."""
        self._number += 1
        request_id = f"bench-{self._number}"
        self._ask(
            {
                "phase": "admit", "request_id": request_id, "tenant": "bench", "project": "default", "key_id": "k", "model": "m",
                "dialect": "openai.chat", "prompt_bytes": "400", "output_tokens_max": "100", "choices": "1", "lease": "-",
            }
        )  # fmt: skip
        return request_id

    def settle(self, request_id: str) -> None:
        """Say what it used."""
        self._ask(
            {
                "phase": "settle", "request_id": request_id, "tenant": "bench", "model": "m", "prompt_bytes": "400",
                "hold": "yes", "input": "100", "output": "80", "cached": "0", "frames": "0", "seen": "final",
            }
        )  # fmt: skip

    def _ask(self, entries: dict[str, str]) -> None:
        request = wire.RateLimitRequest(domain=contract.RLS_DOMAIN)
        descriptor = request.descriptors.add()
        for key, value in entries.items():
            descriptor.entries.add(key=key, value=value)
        raw = request.SerializeToString()
        self.servicer.should_rate_limit(wire.RateLimitRequest.FromString(raw), None).SerializeToString()  # type: ignore[arg-type]


def measured(calls: Iterable[Callable[[], object]], desk: Desk, store_pid: int) -> tuple[list[object], str]:
    """Make the calls; what they answered, and CPU of both sides, round trips and times as cells of a row."""
    times, answers = [], []
    cpu, store_cpu, trips = time.process_time_ns(), _cpu_seconds(store_pid), desk.trips.trips
    for call in calls:
        began = time.perf_counter_ns()
        answers.append(call())
        times.append(time.perf_counter_ns() - began)
    count = len(times)
    cpu, store_cpu = time.process_time_ns() - cpu, _cpu_seconds(store_pid) - store_cpu
    times.sort()
    cells = (
        f"{cpu / count / 1000:.0f}", f"{1e6 * store_cpu / count:.0f}", f"{(desk.trips.trips - trips) / count:.4g}",
        f"{times[count // 2] / 1000:.0f} / {times[count * 99 // 100] / 1000:.0f}",
    )  # fmt: skip
    return answers, " | ".join(cells)


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=5000, help="decisions of each kind")
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    asked = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    rows: list[str] = []
    sources = {
        "no limit": Fixed(),
        **{f"{count} limits" if count > 1 else "1 limit": Fixed(current=limits(count)) for count in (1, 2, 4, 8)},
        "2 limits and a shared pool": Fixed(
            current=limits(2), pool=Pool(model="m", slots=1_000_000, tokens_per_second=1_000_000_000)
        ),
    }
    for what, source in sources.items():
        with store_server() as url:
            desk = Desk(url, source)
            pid = int(desk.store.info("server")["process_id"])
            for _ in range(200):
                desk.settle(desk.admit())
            admitted, cells = measured([desk.admit] * asked.count, desk, pid)
            rows.append(f"| admit, {what} | {cells} |")
            if what != "no limit":
                settles = [partial(desk.settle, str(request_id)) for request_id in admitted]
                rows.append(f"| settle, {what} | {measured(settles, desk, pid)[1]} |")
    rows += _without_store(asked.count)
    table = "\n".join(
        [
            "| decision | CPU ratelimit, µs | CPU Valkey, µs | round trips | p50 / p99, µs |", "|---|---|---|---|---|", *rows,
        ]
    )
    print(table)
    if asked.write:
        text = _DOCUMENT.read_text()
        _DOCUMENT.write_text(re.sub(f"(?s){_BEGIN}.*{_END}", lambda _: f"{_BEGIN}\n{table}\n{_END}", text))


def _without_store(count: int) -> list[str]:
    """Rows of a store that stalls: the first failures, and what a decision costs once it is left alone."""
    rows = []
    for mode in OnStoreError:
        with store_server() as url:
            desk = Desk(url, Fixed(current=limits(2, on_store_error=mode)))
            desk.admit()
            pid = int(desk.store.info("server")["process_id"])
            os.kill(pid, signal.SIGSTOP)

            def ask(desk: Desk = desk) -> None:
                # Deny is an answer too: Envoy makes 503 of it.
                try:
                    desk.admit()
                except Unavailable:
                    return

            began = time.perf_counter()
            for _ in range(FAILURES_TO_OPEN):
                ask()
            first = 1000 * (time.perf_counter() - began) / FAILURES_TO_OPEN
            rows.append(
                f"| store stalled, 2 limits that say `{mode.value}` (each of the first {FAILURES_TO_OPEN} took {first:.0f} ms) | "
                f"{measured([ask] * count, desk, pid)[1]} |"
            )
            os.kill(pid, signal.SIGCONT)
    return rows


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


if __name__ == "__main__":
    main()
