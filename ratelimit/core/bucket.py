# SPDX-License-Identifier: Apache-2.0
"""
The arithmetic of a counter (GCRA, as a leaky bucket), shared in meaning with `admit.lua`.

A counter's debt is in hits × microseconds: each hit adds the period's length, each microsecond
that passes removes the limit's worth. A request passes if its hits fit on top:
`debt + hits × period <= limit × period`. The burst is one period's limit. Kept as a debt and
not as a theoretical arrival time, because a time since 1970 in a double leaves no precision
for fractions of a microsecond, and a token limit needs them.

    limit 60 a minute: after 60 requests at once the debt is full;
    one second later it has drained by one request, so one more passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ratelimit.core.limits import Counter


@dataclass(frozen=True, slots=True)
class Level:
    """A counter's debt at a moment (microseconds since some fixed origin)."""

    debt: float
    at_us: int


@dataclass(frozen=True, slots=True)
class Reading:
    """A counter as the caller may see it: what is left, when it is full again, how long to wait."""

    counter: Counter
    remaining: int
    reset_us: int
    #: 0 if this counter allows; -1 if it never will (the hits exceed the limit); else the wait.
    wait_us: int


def drained(level: Level | None, counter: Counter, now_us: int) -> float:
    """The debt of *level* at *now_us*; a clock that went back drains nothing and adds nothing."""
    if level is None:
        return 0.0
    elapsed = max(0, now_us - level.at_us)
    return max(0.0, level.debt - elapsed * counter.limit)


def read(counter: Counter, debt: float) -> Reading:
    """What *counter* says to its own hits at *debt*, before anything is taken."""
    capacity = counter.limit * counter.period_us
    excess = debt + counter.hits * counter.period_us - capacity
    if excess <= 0:
        wait = 0
    elif counter.hits > counter.limit:
        wait = -1
    else:
        wait = int(-(-excess // counter.limit))
    return reading(counter, debt, wait_us=wait)


def reading(counter: Counter, debt: float, *, wait_us: int) -> Reading:
    """A reading of *counter* at *debt*."""
    left = (counter.limit * counter.period_us - debt) / counter.period_us
    reset = int(-(-debt // counter.limit)) if counter.limit else counter.period_us
    return Reading(counter, remaining=max(0, int(left)), reset_us=reset, wait_us=wait_us)


def take(
    wanted: Sequence[Counter], levels: Sequence[Level | None], now_us: int
) -> tuple[bool, list[Reading], list[Level]]:
    """Take from all counters or from none: (admitted, readings after, levels to store if admitted)."""
    debts = [drained(level, counter, now_us) for level, counter in zip(levels, wanted, strict=True)]
    before = [read(counter, debt) for counter, debt in zip(wanted, debts, strict=True)]
    if any(reading_.wait_us for reading_ in before):
        return False, before, []
    taken = [debt + counter.hits * counter.period_us for counter, debt in zip(wanted, debts, strict=True)]
    after = [reading(counter, debt, wait_us=0) for counter, debt in zip(wanted, taken, strict=True)]
    return True, after, [Level(debt, now_us) for debt in taken]


def settle(counter: Counter, level: Level | None, *, actual: int, now_us: int) -> Level:
    """
    Replace the *counter*'s reserved hits by *actual*: a refund, or a debt that delays the next.

    A refund never goes below empty: what has drained meanwhile was not held any more.
    """
    debt = drained(level, counter, now_us) + (actual - counter.hits) * counter.period_us
    return Level(max(0.0, debt), now_us)
