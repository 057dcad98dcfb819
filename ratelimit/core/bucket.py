# SPDX-License-Identifier: Apache-2.0
"""
The arithmetic of a bucket (GCRA, kept as a debt), shared in meaning with `counters.lua`.

A bucket's debt is in hits × microseconds: each hit adds the period's length, each microsecond
that passes removes the limit's worth. A request passes if its hits fit on top:
`debt + hits × period <= burst × period`. Kept as a debt and not as a theoretical arrival
time, because a time since 1970 in a double leaves no precision for fractions of a
microsecond, and a token limit needs them.

    limit 60 a minute, burst 60: after 60 requests at once the debt is full;
    one second later it has drained by one request, so one more passes.
"""

from __future__ import annotations

from ratelimit.core.demand import Counter


def drained(counter: Counter, *, debt: float, at_us: int, now_us: int) -> float:
    """What *debt* (as of *at_us*) has become at *now_us*; a clock that went back drains nothing."""
    return max(0.0, debt - max(0, now_us - at_us) * counter.amount)


def fits(counter: Counter, *, debt: float, hits: int) -> bool:
    """Whether *hits* fit on top of *debt*."""
    return debt + hits * counter.period_us <= counter.burst * counter.period_us


def wait_us(counter: Counter, *, debt: float, hits: int) -> int | None:
    """Microseconds until *hits* fit, rounded up; 0 if they do now, None if they never will."""
    excess = debt + hits * counter.period_us - counter.burst * counter.period_us
    if excess <= 0:
        return 0
    if hits > counter.burst or counter.amount == 0:
        return None
    return int(-(-excess // counter.amount))


def missing(counter: Counter, *, debt: float, hits: int) -> int:
    """How many of *hits* do not fit now, a part of one counted whole."""
    excess = debt + hits * counter.period_us - counter.burst * counter.period_us
    return max(0, int(-(-excess // counter.period_us)))


def remaining(counter: Counter, *, debt: float) -> int:
    """Whole hits that would still fit."""
    return max(0, int((counter.burst * counter.period_us - debt) // counter.period_us))


def reset_us(counter: Counter, *, debt: float) -> int:
    """Microseconds until the bucket is empty again, if nobody comes."""
    return int(-(-debt // counter.amount)) if counter.amount else counter.period_us
