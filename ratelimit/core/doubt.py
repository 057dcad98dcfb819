# SPDX-License-Identifier: Apache-2.0
"""
Judge a refusal afterwards: would it have passed, had nothing been held but what was used?

What is held is an estimate until it is settled. A refusal is *false* if what the reservations in its way gave back
would have left room in every limit that refused; else it was *just*. Only tokens and money are estimated: a request is
one request, and who is under way is under way.

    1,000 tokens are left, 400 are asked for, and three streams hold 300 each: refused, 300 are missing.
    The three use 100, 250 and 200: they gave back 350, so it was refused falsely.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from ratelimit.core.demand import Counter, Kind
from ratelimit.core.limits import Unit
from ratelimit.core.reading import Reading
from ratelimit.core.usage import Usage, hits

_COUNTED_AS_THEY_ARE = (Unit.REQUESTS, Unit.CONCURRENCY)


class Judgement(StrEnum):
    """What is known of a refusal in the end."""

    FALSE = "false"
    JUST = "just"
    #: Too many at once to look at, or what was in its way is under way for too long.
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold:
    """What one reservation holds of a counter."""

    request_id: str
    hits: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Obstacle:
    """A limit that refused, how much was missing, and who held what of it then."""

    counter: Counter
    missing: int
    holds: tuple[Hold, ...]

    def gives_way(self, used: Mapping[str, Usage]) -> bool:
        """Whether what its holds did not use would have been enough; *used* has all of them."""
        returned = sum(hold.hits - hits(self.counter.unit, used[hold.request_id], self.counter.price) for hold in self.holds)
        return returned >= self.missing


def is_doubtful(readings: Sequence[Reading]) -> bool:
    """Whether every limit that refused counts by estimates, so that it may turn out to have had room."""
    refusing = [reading for reading in readings if reading.refuses]
    return bool(refusing) and all(_is_estimated(reading.counter) for reading in refusing)


def judge(obstacles: Sequence[Obstacle], used: Mapping[str, Usage]) -> Judgement | None:
    """The judgement once all that was held has ended; None before. It was false if no obstacle would have been left."""
    if any(hold.request_id not in used for obstacle in obstacles for hold in obstacle.holds):
        return None
    return Judgement.FALSE if all(obstacle.gives_way(used) for obstacle in obstacles) else Judgement.JUST


def _is_estimated(counter: Counter) -> bool:
    return counter.kind in (Kind.QUOTA, Kind.BUCKET) and counter.unit not in _COUNTED_AS_THEY_ARE
