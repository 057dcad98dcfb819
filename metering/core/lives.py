# SPDX-License-Identifier: Apache-2.0
"""
Know which lives of Envoy are over, from the order in which their records stand.

Lives follow each other, so one whose records stand before another's in the same stream of records is
over. Between two streams nothing follows: an earlier life's start may be read after a later life's end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

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
        """
        last, ended = self.last.get(stream, ""), list(self.ended)
        for epoch in epochs:
            if last and epoch != last and last not in ended:
                ended.append(last)
            last = epoch
        if last == self.last.get(stream, ""):
            return self
        return Lives(last={**self.last, stream: last}, ended=tuple(ended[-ENDED_LIVES_MAX:]))
