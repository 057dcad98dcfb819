# SPDX-License-Identifier: Apache-2.0
"""
Deciding while the counter store is away: this process alone, with its share of each limit.

A hard budget may not be guessed for long: it counts on from what the store last said, for at
most `BUDGET_LOCAL_SECONDS`, and then refuses to decide.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

import structlog

from chassis.errors import Unavailable
from ratelimit.core.decide import Memory, Outcome, Renewal, renew, settle, take
from ratelimit.core.demand import Counter, Demand, Kind
from ratelimit.core.limits import Effect, OnStoreError
from ratelimit.core.usage import Report

log = structlog.get_logger()

#: Counters and reservations kept in memory; beyond it the longest unused is forgotten.
LOCAL_COUNT_MAX: Final = 100_000
#: How long a hard quota is decided without the store.
BUDGET_LOCAL_SECONDS: Final = 60.0
#: Consecutive failures after which the store is left alone.
FAILURES_TO_OPEN: Final = 3
PROBE_EVERY_SECONDS: Final = 1.0


class LocalCounters:
    """The limiter in memory; *share* is the fraction of each limit that this process may give out."""

    def __init__(self, *, share: float) -> None:
        self._share = share
        self._memory = Memory(levels=_Bounded(), reservations=_Bounded())
        #: What the store last said of quotas: used and held, by name.
        self._last_known: OrderedDict[str, int] = _Bounded()
        self._lock = threading.Lock()

    def note(self, outcome: Outcome) -> None:
        """Remember what the store says of hard quotas, for when it is away."""
        with self._lock:
            for reading in outcome.readings:
                if reading.counter.kind is Kind.QUOTA:
                    self._last_known[reading.counter.name] = reading.counter.amount - reading.remaining

    def take(self, demand: Demand, *, now_us: int, away_seconds: float) -> Outcome:
        """
        Decide as each limit says: at its local share, or not at all; raises `Unavailable` if one says so.

        *away_seconds* is for how long the store has been away.
        """
        counted = [c for c in demand.counters if c.on_store_error is not OnStoreError.ALLOW]
        for counter in counted:
            if counter.on_store_error is OnStoreError.DENY and counter.effect is Effect.REFUSE:
                raise Unavailable("The counter store did not answer, and a limit says to deny then.")
        with self._lock:
            shared = tuple(self._shared(counter, away_seconds) for counter in counted)
            return take(self._memory, dataclasses.replace(demand, counters=shared), now_us)

    def renew(self, request_id: str, renewal: Renewal, now_us: int) -> int:
        """Renew what was decided here; 0 if it was not."""
        with self._lock:
            return renew(self._memory, request_id, renewal, now_us)

    def settle(self, request_id: str, report: Report, now_us: int) -> bool:
        """Settle what was decided here; False if it was not."""
        with self._lock:
            return settle(self._memory, request_id, report, now_us)

    def _shared(self, counter: Counter, away_seconds: float) -> Counter:
        if counter.kind is Kind.QUOTA and counter.effect is Effect.REFUSE:
            known = self._last_known.get(counter.name)
            if known is None or away_seconds > BUDGET_LOCAL_SECONDS:
                raise Unavailable("The counter store did not answer, and what is left of a quota is not known.")
            # Its share of what was left when the store was last heard.
            left = int(max(0, counter.amount - known) * self._share)
            return dataclasses.replace(counter, amount=left, burst=left)
        return dataclasses.replace(counter, amount=self._part(counter.amount), burst=self._part(counter.burst))

    def _part(self, number: int) -> int:
        return number and max(1, int(number * self._share))


class _Bounded(OrderedDict):  # type: ignore[type-arg]
    def __setitem__(self, name: str, value: object) -> None:
        super().__setitem__(name, value)
        self.move_to_end(name)
        if len(self) > LOCAL_COUNT_MAX:
            self.popitem(last=False)


class Breaker:
    """
    Leaves a failing store alone: open after consecutive failures, until `probe_until_back` is through.

    *opened* is called once when it opens and starts the probing: no request waits for a store that is away.
    """

    def __init__(self, *, clock: Callable[[], float], opened: Callable[[], None]) -> None:
        self._clock = clock
        self._opened = opened
        self._failures = 0
        self._failed_at: float | None = None
        self._lock = threading.Lock()

    @property
    def is_open(self) -> bool:
        """Whether to decide without the store."""
        return self._failures >= FAILURES_TO_OPEN

    @property
    def away_seconds(self) -> float:
        """For how long the store has failed."""
        failed_at = self._failed_at
        return 0.0 if failed_at is None else self._clock() - failed_at

    def succeeded(self) -> None:
        """A request was answered by the store; one that was under way does not close an open breaker."""
        if self._failures and not self.is_open:
            self.close()

    def failed(self) -> None:
        """The store did not answer."""
        with self._lock:
            self._failures += 1
            if self._failed_at is None:
                self._failed_at = self._clock()
            opens = self._failures == FAILURES_TO_OPEN
        if opens:
            log.error("store_lost")
            self._opened()

    def close(self) -> None:
        """The store is back."""
        with self._lock:
            if self.is_open:
                log.info("store_back")
            self._failures, self._failed_at = 0, None


def probe_until_back(breaker: Breaker, probe: Callable[[], bool], *, sleep: Callable[[float], object] = time.sleep) -> None:
    """Ask once a second, on a thread of its own, until the store takes a write again."""
    while not probe():
        sleep(PROBE_EVERY_SECONDS)
    breaker.close()
