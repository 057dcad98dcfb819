# SPDX-License-Identifier: Apache-2.0
"""
Find out how many refusals were false: who was in the way is asked of the store, what they used of the ledger.

By a thread of its own, after the answer: nothing waits for a judgement. Bounded in number and in time; what is beyond
is `unknown`. What was settled between the refusal and the look at the store is missed, and so is what workers of
Envoy hold in advance (they do only while half a limit is free): a few false ones are taken for just.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final, LiteralString, Protocol

import structlog

from chassis.errors import Unavailable
from chassis.stores.postgres import ReadPool, fetch_all
from ratelimit.adapters import metrics
from ratelimit.core.demand import Counter
from ratelimit.core.doubt import Hold, Judgement, Obstacle, is_doubtful, judge
from ratelimit.core.reading import Reading
from ratelimit.core.usage import Usage

log = structlog.get_logger()

#: Refusals that wait to be looked at, and those whose obstacles are under way. A storm of refusals is judged by a part.
WAITING_MAX: Final = 100
PENDING_MAX: Final = 500
#: Longer than nearly every answer takes.
JUDGED_WITHIN: Final = timedelta(minutes=15)
_JUDGE_EVERY_SECONDS: Final = 5.0
_USED: Final[LiteralString] = """
select request_id, input_tokens, output_tokens, cached_tokens, quantity, reasoning_tokens from usage_event
where started_at > %s and request_id = any(%s)
"""
#: An exchange may have begun so long before the refusal that it was in the way of: no reservation is older.
_HELD_SINCE: Final = timedelta(hours=1)


class Counters(Protocol):
    """The part of `StoredCounters` that this needs."""

    def holds(self, tenant_id: str, counters: Sequence[Counter]) -> list[tuple[Hold, ...]] | None:
        """What is held of each counter; None if it is more than can be looked at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Refusal:
    tenant_id: str
    request_id: str
    refusing: tuple[Reading, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pending:
    refusal: _Refusal
    obstacles: tuple[Obstacle, ...]
    at: datetime


class Doubts:
    """Refusals of one process that may have been false."""

    def __init__(self, counters: Counters, pool: ReadPool) -> None:
        self._counters = counters
        self._pool = pool
        self._waiting: deque[_Refusal] = deque()
        self._pending: list[_Pending] = []
        self._heard = threading.Event()

    def refused(self, *, tenant_id: str, request_id: str, readings: Sequence[Reading]) -> None:
        """Take note of a refusal; returns at once."""
        if not is_doubtful(readings):
            metrics.judged(Judgement.JUST)
        elif len(self._waiting) >= WAITING_MAX:
            metrics.judged(Judgement.UNKNOWN)
        else:
            refusing = tuple(reading for reading in readings if reading.refuses)
            self._waiting.append(_Refusal(tenant_id=tenant_id, request_id=request_id, refusing=refusing))
            self._heard.set()

    def look(self, now: datetime) -> None:
        """Ask the store who is in the way of those that wait. Raises `Unavailable`, and then nothing is known of one."""
        while self._waiting:
            refusal = self._waiting.popleft()
            found = None
            try:
                if len(self._pending) < PENDING_MAX:
                    found = self._counters.holds(refusal.tenant_id, [reading.counter for reading in refusal.refusing])
            finally:
                if found is None:
                    metrics.judged(Judgement.UNKNOWN)
            if found is not None:
                obstacles = tuple(
                    Obstacle(counter=reading.counter, missing=reading.missing, holds=holds)
                    for reading, holds in zip(refusal.refusing, found, strict=True)
                )
                self._pending.append(_Pending(refusal=refusal, obstacles=obstacles, at=now))

    def judge(self, now: datetime) -> None:
        """Judge those whose obstacles have all ended, and give up on old ones. Raises `Unavailable`."""
        if not self._pending:
            return
        ids = sorted({hold.request_id for one in self._pending for obstacle in one.obstacles for hold in obstacle.holds})
        rows = fetch_all(self._pool, _USED, (now - JUDGED_WITHIN - _HELD_SINCE, ids)) if ids else []
        used = {row[0]: Usage(input=row[1], output=row[2], cached=row[3], quantity=row[4], reasoning=row[5]) for row in rows}
        still = []
        for one in self._pending:
            judgement = judge(one.obstacles, used) or (Judgement.UNKNOWN if now - one.at > JUDGED_WITHIN else None)
            if judgement is None:
                still.append(one)
                continue
            metrics.judged(judgement)
            if judgement is Judgement.FALSE:
                limits = sorted({obstacle.counter.limit_id for obstacle in one.obstacles})
                log.info("refused_falsely", request_id=one.refusal.request_id, tenant=one.refusal.tenant_id, limits=limits)
        self._pending = still

    def watch_for_ever(self, clock: Callable[[], datetime]) -> None:
        """Look at once when there is something to look at, judge every few seconds."""
        judged_at = clock()
        while True:
            self._heard.wait(_JUDGE_EVERY_SECONDS)
            self._heard.clear()
            try:
                self.look(clock())
                if (clock() - judged_at).total_seconds() >= _JUDGE_EVERY_SECONDS:
                    judged_at = clock()
                    self.judge(judged_at)
            except Unavailable:
                log.warning("refusals_not_judged")
