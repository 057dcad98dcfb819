# SPDX-License-Identifier: Apache-2.0
"""How often somebody may try: a bucket per name that refills evenly, of a bounded number of names."""

from __future__ import annotations

from collections import OrderedDict
from datetime import datetime, timedelta
from typing import Final

#: Names that are remembered; beyond, the one longest unused is forgotten and may start anew.
NAMES_MAX: Final = 10_000
_NOW: Final = timedelta(0)


class Attempts:
    """
    *most* attempts at once for each name, and as many again in every *per*. Not safe for threads by itself.

    >>> from datetime import UTC
    >>> twice, noon = Attempts(most=2, per=timedelta(minutes=1)), datetime(2026, 1, 1, 12, tzinfo=UTC)
    >>> [twice.take("a", noon).total_seconds() for _ in range(3)]
    [0.0, 0.0, 30.0]
    """

    def __init__(self, *, most: int, per: timedelta, names_max: int = NAMES_MAX) -> None:
        self._each = per / most
        self._per = per
        self._names_max = names_max
        #: When each bucket is full again.
        self._full_at: OrderedDict[str, datetime] = OrderedDict()

    def wait(self, name: str, now: datetime) -> timedelta:
        """How long until an attempt would be granted, zero if now; none is made."""
        return max(_NOW, max(self._full_at.get(name, now), now) + self._each - now - self._per)

    def take(self, name: str, now: datetime) -> timedelta:
        """Make an attempt; zero if it is granted, else how long until one would be."""
        wait = self.wait(name, now)
        if not wait:
            self.count(name, now)
        return wait

    def count(self, name: str, now: datetime) -> None:
        """An attempt was made, granted or not: one too many is waited for later."""
        self._full_at[name] = max(self._full_at.get(name, now), now) + self._each
        self._full_at.move_to_end(name)
        if len(self._full_at) > self._names_max:
            self._full_at.popitem(last=False)

    def __len__(self) -> int:
        return len(self._full_at)
