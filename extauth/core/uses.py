# SPDX-License-Identifier: Apache-2.0
"""
Collect the uses of keys until they are due to be written: at most once per key and minute.

Pure: when it is due is asked, the time is an argument. Bounded: beyond its bound a further key's
use is dropped and counted, since a late `last_used_at` must not cost memory without limit.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from datetime import datetime, timedelta

#: No key is written more often than this.
WRITE_EVERY = timedelta(seconds=60)
PENDING_COUNT_MAX = 100_000
WRITTEN_COUNT_MAX = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """What is to be written of one key."""

    key_id: str
    last_used_at: datetime
    #: How often it was used although it has a successor.
    after_rotation_count: int


class Uses:
    """Uses not yet written, and when each key was last written. Not safe for threads by itself."""

    def __init__(
        self, *, pending_count_max: int = PENDING_COUNT_MAX, written_count_max: int = WRITTEN_COUNT_MAX
    ) -> None:
        self._pending: dict[str, tuple[datetime, int]] = {}
        self._written: OrderedDict[str, datetime] = OrderedDict()
        self._pending_count_max = pending_count_max
        self._written_count_max = written_count_max
        self.lost_count = 0

    def add(self, key_id: str, now: datetime, *, after_rotation_count: int = 0) -> None:
        """Take note of a use; *after_rotation_count* of them by a key that has a successor."""
        pending = self._pending.get(key_id)
        if pending is None and len(self._pending) >= self._pending_count_max:
            self.lost_count += 1
            return
        seen, count = pending or (now, 0)
        self._pending[key_id] = (max(seen, now), count + after_rotation_count)

    def take_due(self, now: datetime, count_max: int) -> list[Use]:
        """Up to *count_max* uses whose key was not written for a minute, by key id; they count as written."""
        due = [
            key_id for key_id in self._pending if now - self._written.get(key_id, now - WRITE_EVERY) >= WRITE_EVERY
        ]
        taken = []
        for key_id in sorted(due)[:count_max]:
            seen, count = self._pending.pop(key_id)
            taken.append(Use(key_id=key_id, last_used_at=seen, after_rotation_count=count))
            self._written[key_id] = now
            self._written.move_to_end(key_id)
        while len(self._written) > self._written_count_max:
            self._written.popitem(last=False)
        return taken

    def give_back(self, uses: list[Use]) -> None:
        """Take back what could not be written; it is due again at once."""
        for use in uses:
            self._written.pop(use.key_id, None)
            self.add(use.key_id, use.last_used_at, after_rotation_count=use.after_rotation_count)

    def __len__(self) -> int:
        return len(self._pending)
