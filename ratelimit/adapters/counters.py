# SPDX-License-Identifier: Apache-2.0
"""
Where counters live: Valkey/Redis, or this process's own memory while that is away.

One round trip per decision. The store's time is the only clock, so replicas agree.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import orjson
import redis
import structlog

from chassis.errors import Unavailable
from ratelimit.core import bucket
from ratelimit.core.limits import Counter, Unit

log = structlog.get_logger()

#: Longer than any stream lives; an unsettled reservation has long drained by then.
RESERVATION_LIFE_MS: Final = 3_600_000
#: Well below Envoy's 500 ms for the whole decision, well above what a busy host delays a reply.
STORE_TIMEOUT_SECONDS: Final = 0.2
#: Consecutive failures after which the store is left alone, and for how long.
_FAILURES_TO_OPEN = 3
_PROBE_EVERY_SECONDS = 1.0
#: Counters kept in memory while the store is away.
LOCAL_COUNT_MAX: Final = 100_000

_SCRIPTS = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Outcome:
    """Whether all counters had room, and what each says now."""

    admitted: bool
    readings: list[bucket.Reading]


class StoredCounters:
    """Counters in Valkey or Redis (7.0 or later); raises `Unavailable`."""

    def __init__(self, url: str) -> None:
        self._store = redis.Redis.from_url(
            url,
            socket_timeout=STORE_TIMEOUT_SECONDS,
            socket_connect_timeout=STORE_TIMEOUT_SECONDS,
            retry=None,
            client_name="peaje-ratelimit",
        )
        # Registered scripts go by hash and are sent whole once after a restart or flush (NOSCRIPT).
        self._admit = self._store.register_script((_SCRIPTS / "admit.lua").read_text())
        self._settle = self._store.register_script((_SCRIPTS / "settle.lua").read_text())

    def take(self, reservation: str, wanted: Sequence[Counter]) -> Outcome:
        """Take from all *wanted* or from none; a reservation remembers the tokens taken."""
        held = [(c.name, c.limit, c.period_us, c.hits) for c in wanted if c.unit is Unit.TOKENS]
        numbers = [number for c in wanted for number in (c.limit, c.period_us, c.hits)]
        answer = self._call(
            self._admit,
            keys=[reservation, *(c.name for c in wanted)],
            args=[RESERVATION_LIFE_MS, orjson.dumps(held) if held else b"", *numbers],
        )
        debts = [float(debt) for debt in answer[1:]]
        if answer[0]:
            return Outcome(True, [bucket.reading(c, d, wait_us=0) for c, d in zip(wanted, debts, strict=True)])
        return Outcome(False, [bucket.read(c, d) for c, d in zip(wanted, debts, strict=True)])

    def settle(self, reservation: str, actual: int) -> bool:
        """Charge *actual* tokens in place of what *reservation* holds; False if it holds nothing (any more)."""
        try:
            held = self._store.get(reservation)
        except redis.RedisError as exc:
            raise Unavailable("The counter store did not answer.") from exc
        if held is None:
            return False
        counters = orjson.loads(held)
        numbers = [number for counter in counters for number in counter[1:]]
        keys = [reservation, *(counter[0] for counter in counters)]
        return bool(self._call(self._settle, keys=keys, args=[actual, *numbers]))

    def _call(self, script: redis.commands.core.Script, *, keys: list[str], args: list) -> list:
        try:
            return script(keys=keys, args=args)
        except redis.RedisError as exc:
            raise Unavailable("The counter store did not answer.") from exc


class LocalCounters:
    """The same arithmetic in this process's memory: a fraction of each limit, for the store's absence."""

    def __init__(self, *, share: float) -> None:
        self._share = share
        self._levels: OrderedDict[str, bucket.Level] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, wanted: Sequence[Counter], now_us: int) -> Outcome:
        """Take from all *wanted*, each at its local share, or from none."""
        shared = [self._shared(counter) for counter in wanted]
        with self._lock:
            levels = [self._levels.get(counter.name) for counter in shared]
            admitted, readings, after = bucket.take(shared, levels, now_us)
            for counter, level in zip(shared, after, strict=False):
                self._levels[counter.name] = level
                self._levels.move_to_end(counter.name)
            while len(self._levels) > LOCAL_COUNT_MAX:
                self._levels.popitem(last=False)
        return Outcome(admitted, readings)

    def _shared(self, counter: Counter) -> Counter:
        limit = counter.limit and max(1, int(counter.limit * self._share))
        return Counter(
            name=counter.name, unit=counter.unit, limit=limit, period_us=counter.period_us,
            hits=counter.hits, scope=counter.scope,
        )


class Breaker:
    """Leaves a failing store alone: open after consecutive failures, one probe a second."""

    def __init__(self) -> None:
        self._failures = 0
        self._probe_at = 0.0

    def allows(self) -> bool:
        """Whether to ask the store now."""
        if self._failures < _FAILURES_TO_OPEN:
            return True
        now = time.monotonic()
        if now < self._probe_at:
            return False
        self._probe_at = now + _PROBE_EVERY_SECONDS
        return True

    def succeeded(self) -> None:
        """The store answered."""
        if self._failures >= _FAILURES_TO_OPEN:
            log.info("store_back")
        self._failures = 0

    def failed(self) -> None:
        """The store did not answer."""
        self._failures += 1
        if self._failures == _FAILURES_TO_OPEN:
            self._probe_at = time.monotonic() + _PROBE_EVERY_SECONDS
            log.error("store_lost")
