# SPDX-License-Identifier: Apache-2.0
"""
Remember what the directory said, for a bounded time and in bounded memory.

Known and unknown ids are bounded apart, so that a flood of garbage cannot push out real keys.
A change that is heard of is remembered as a mark with a time: an answer that was asked for
before the mark is not used, whichever of the two arrives first.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Generic, TypeVar

Value = TypeVar("Value")

#: A revocation is pushed; this bounds how long a lost push can matter.
FRESH_FOR = timedelta(seconds=5)
#: While Postgres is away a key that was good keeps working this long.
GRACE_FOR = timedelta(seconds=300)
#: How long an unknown id stays unknown without asking again; one that is made meanwhile is pushed.
UNKNOWN_FOR = timedelta(seconds=60)
KNOWN_COUNT_MAX = 100_000
UNKNOWN_COUNT_MAX = 10_000
#: Changes that are remembered; one more makes every answer outdated, which costs reads and is never wrong.
MARKS_COUNT_MAX = 10_000

_NEVER = datetime.min.replace(tzinfo=UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found(Generic[Value]):
    """A remembered answer; *value* None means that the id is known not to exist."""

    value: Value | None
    #: When it was asked for, not when the answer came.
    asked_at: datetime
    owner: str


class Remembered(Generic[Value]):
    """Two bounded least-recently-used tables: ids that exist, ids that do not. Not safe for threads by itself."""

    def __init__(
        self,
        *,
        known_count_max: int = KNOWN_COUNT_MAX,
        unknown_count_max: int = UNKNOWN_COUNT_MAX,
        marks_count_max: int = MARKS_COUNT_MAX,
    ) -> None:
        self._known: OrderedDict[str, Found[Value]] = OrderedDict()
        self._unknown: OrderedDict[str, Found[Value]] = OrderedDict()
        self._marks: OrderedDict[str, datetime] = OrderedDict()
        #: What was asked for until then is asked for again; until the second, it is not used in an outage either.
        self._floor = _NEVER
        self._outdated_before = _NEVER
        self._known_count_max = known_count_max
        self._unknown_count_max = unknown_count_max
        self._marks_count_max = marks_count_max

    def fresh(self, key: str, now: datetime) -> Found[Value] | None:
        """The answer for *key* if it is recent enough to act on without asking."""
        found = self._known.get(key)
        if found is not None:
            if now - found.asked_at >= FRESH_FOR or found.asked_at <= self._floor or self._is_outdated(key, found):
                return None
            self._known.move_to_end(key)
            return found
        found = self._unknown.get(key)
        if found is None or now - found.asked_at >= UNKNOWN_FOR or self._is_outdated(key, found):
            return None
        self._unknown.move_to_end(key)
        return found

    def has(self, key: str, now: datetime) -> bool:
        """Whether *key* is known to exist or to have existed, or known not to: nobody guesses it by looking."""
        # Looked at in any case: how long a refusal takes must not tell whether there is such a key.
        is_fresh = self.fresh(key, now) is not None
        return is_fresh or key in self._known

    def stale(self, key: str, now: datetime) -> Found[Value] | None:
        """
        The answer for *key* within the outage grace; only ids that existed have one.

        Not one that is known to have changed: an outage must not bring a revoked key back.
        """
        found = self._known.get(key)
        if found is None or now - found.asked_at >= GRACE_FOR or self._is_outdated(key, found):
            return None
        return found

    def put(self, key: str, value: Value | None, asked_at: datetime, *, owner: str = "") -> None:
        """
        Remember *value*, dropping the least recently used of its kind beyond the bound.

        *owner* is the tenant with which it changes.
        """
        self._known.pop(key, None)
        self._unknown.pop(key, None)
        table, most = (
            (self._unknown, self._unknown_count_max) if value is None else (self._known, self._known_count_max)
        )
        table[key] = Found(value=value, asked_at=asked_at, owner=owner)
        while len(table) > most:
            table.popitem(last=False)

    def mark(self, name: str, now: datetime) -> None:
        """Something about this id, or about this owner, has changed: what was asked before now is not used again."""
        self._marks[name] = now
        self._marks.move_to_end(name)
        if len(self._marks) > self._marks_count_max:
            self._marks.clear()
            self._unknown.clear()
            self._outdated_before = now

    def expire_all(self, now: datetime) -> None:
        """Anything may have changed: make every answer ask again, keeping known ones for the outage grace."""
        self._unknown.clear()
        self._floor = now

    def __len__(self) -> int:
        return len(self._known) + len(self._unknown)

    def _is_outdated(self, key: str, found: Found[Value]) -> bool:
        if found.asked_at <= self._outdated_before:
            return True
        marks = self._marks
        if not marks:
            return False
        return found.asked_at <= marks.get(key, _NEVER) or found.asked_at <= marks.get(found.owner, _NEVER)
