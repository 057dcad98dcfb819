# SPDX-License-Identifier: Apache-2.0
"""
Know which lives of Envoy are over, from the order in which their records stand.

Lives follow each other, so one whose records stand before another's in the same stream of records is
over. Between two streams nothing follows: an earlier life's start may be read after a later life's end.

A life may take over while the one before it goes on with what it has: both write then, and neither is over by the other's
records. They are one family, by their names; it is over when another family's record follows. What one of it has left open
is closed by its silence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from chassis.contract import EPOCH_HEIR

#: Lives that are remembered as over. Their open exchanges are closed within seconds of it.
ENDED_LIVES_MAX = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Lives:
    """What is known of the lives that write one journal."""

    #: Whose record was the last one read, by stream.
    last: Mapping[str, str] = field(default_factory=dict)
    #: In the order in which they were found to be over.
    ended: tuple[str, ...] = ()

    def after(self, stream: str, epochs: Iterable[str]) -> Lives:
        """
        What is known once *epochs*, in the order of their records, were read from *stream*.

        >>> Lives(last={"starts": "a"}).after("starts", ["a", "b"]).after("journal", ["a"]).ended
        ('a',)
        >>> Lives().after("journal", ["a", "a~1", "a"]).after("journal", ["b"]).ended
        ('a', 'a~1')
        """
        last, ended = self.last.get(stream, ""), list(self.ended)
        for epoch in epochs:
            if last and family(epoch) != family(last):
                ended += [life for life in _family_until(last) if life not in ended]
                last = epoch
            elif _number(epoch) >= _number(last):
                last = epoch
        if last == self.last.get(stream, ""):
            return self
        return Lives(last={**self.last, stream: last}, ended=tuple(ended[-ENDED_LIVES_MAX:]))


def family(epoch: str) -> str:
    """The name of the first of those that took over from each other."""
    return epoch.partition(EPOCH_HEIR)[0]


def _number(epoch: str) -> int:
    """Which heir it is; 0 is the first, and who is none of ours."""
    number = epoch.partition(EPOCH_HEIR)[2]
    return min(int(number), ENDED_LIVES_MAX) if number.isdecimal() else 0


def _family_until(epoch: str) -> list[str]:
    first = family(epoch)
    return [first, *(f"{first}{EPOCH_HEIR}{number}" for number in range(1, _number(epoch) + 1))]
