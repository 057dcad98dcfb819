# SPDX-License-Identifier: Apache-2.0
"""
Remember what the directory said, for a bounded time and in bounded memory.

Known and unknown ids are bounded apart, so that a flood of garbage cannot push out real keys.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Generic, TypeVar

Value = TypeVar("Value")

#: A revocation is pushed; this bounds how long a lost push can matter.
FRESH_FOR = timedelta(seconds=5)
#: While Postgres is away a key that was good keeps working this long.
GRACE_FOR = timedelta(seconds=300)
#: How long an unknown id stays unknown without asking again.
UNKNOWN_FOR = timedelta(seconds=30)
KNOWN_COUNT_MAX = 100_000
UNKNOWN_COUNT_MAX = 10_000


@dataclass(frozen=True, slots=True)
class Found(Generic[Value]):
    """A remembered answer; *value* None means that the id is known not to exist."""

    value: Value | None
    fetched_at: datetime


class Remembered(Generic[Value]):
    """Two bounded least-recently-used tables: ids that exist, ids that do not."""

    def __init__(
        self, *, known_count_max: int = KNOWN_COUNT_MAX, unknown_count_max: int = UNKNOWN_COUNT_MAX
    ) -> None:
        self._known: OrderedDict[str, Found[Value]] = OrderedDict()
        self._unknown: OrderedDict[str, Found[Value]] = OrderedDict()
        self._known_count_max = known_count_max
        self._unknown_count_max = unknown_count_max

    def fresh(self, key: str, now: datetime) -> Found[Value] | None:
        """The answer for *key* if it is recent enough to act on without asking."""
        return self._younger(self._known, key, now, FRESH_FOR) or self._younger(
            self._unknown, key, now, UNKNOWN_FOR
        )

    def stale(self, key: str, now: datetime) -> Found[Value] | None:
        """The answer for *key* within the outage grace; only keys that existed have one."""
        return self._younger(self._known, key, now, GRACE_FOR)

    def put(self, key: str, value: Value | None, now: datetime) -> None:
        """Remember *value*, dropping the least recently used of its kind beyond the bound."""
        self.drop(key)
        table, most = (
            (self._unknown, self._unknown_count_max) if value is None else (self._known, self._known_count_max)
        )
        table[key] = Found(value, now)
        while len(table) > most:
            table.popitem(last=False)

    def drop(self, key: str) -> None:
        """Forget one id."""
        self._known.pop(key, None)
        self._unknown.pop(key, None)

    def expire_all(self, now: datetime) -> None:
        """Make every answer ask again, keeping known ones for the outage grace."""
        self._unknown.clear()
        for key, found in list(self._known.items()):
            self._known[key] = Found(found.value, min(found.fetched_at, now - FRESH_FOR))

    def __len__(self) -> int:
        return len(self._known) + len(self._unknown)

    @staticmethod
    def _younger(
        table: OrderedDict[str, Found[Value]], key: str, now: datetime, age: timedelta
    ) -> Found[Value] | None:
        found = table.get(key)
        if found is None or now - found.fetched_at >= age:
            return None
        table.move_to_end(key)
        return found
