# SPDX-License-Identifier: Apache-2.0
"""What a counter says to a request: what is left, when it is whole again, how long to wait."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from ratelimit.core import bucket
from ratelimit.core.demand import Counter, Kind
from ratelimit.core.limits import Effect, Period

#: When a slot becomes free or what is held comes back is nobody's to know; asking again each second is cheap for both sides.
LEASE_WAIT_US: Final = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One counter, as the caller may see it."""

    counter: Counter
    remaining: int
    #: Microseconds until all of it is free; None if that has no date (concurrency, prepaid).
    reset_us: int | None
    #: Microseconds until this request would pass: 0 now, None never.
    wait_us: int | None
    #: What was asked for.
    hits: int = 0
    #: How much of that has no room.
    missing: int = 0

    @property
    def refuses(self) -> bool:
        """Whether this counter turns the request away."""
        return self.wait_us != 0 and self.counter.effect is Effect.REFUSE


def read(counter: Counter, level: float, *, held: int = 0, hits: int, now_us: int, wait_us: float = 0.0) -> Reading:
    """
    What *counter* says to *hits* more at *level*.

    The level is a bucket's debt, a quota's used and held, the number of leases, a pool as the tenant sees it.
    *held* is the part of a quota's that is held: nobody knows when it comes back, but it will be before the quota
    starts anew. *wait_us* is for how long a pool has no room.
    """
    if counter.is_shared:
        one = counter.period_us or 1
        has_room = hits == 0 or level + one <= counter.burst * one
        return Reading(counter=counter, remaining=0, reset_us=None, wait_us=0 if has_room else max(1, math.ceil(wait_us)))
    if counter.kind is Kind.BUCKET:
        return Reading(
            counter=counter, remaining=bucket.remaining(counter, debt=level),
            reset_us=bucket.reset_us(counter, debt=level), wait_us=bucket.wait_us(counter, debt=level, hits=hits),
            hits=hits, missing=bucket.missing(counter, debt=level, hits=hits),
        )  # fmt: skip
    left = counter.amount - int(level)
    reset = max(0, counter.ends_us - now_us) if counter.period not in (Period.EVER, Period.NOW) else None
    if hits <= left:
        wait: int | None = 0
    elif counter.kind is Kind.LEASES:
        wait = LEASE_WAIT_US if counter.amount else None
    elif hits <= left + held:
        wait = LEASE_WAIT_US if reset is None else min(LEASE_WAIT_US, reset)
    else:
        wait = reset if hits <= counter.amount else None
    return Reading(
        counter=counter, remaining=max(0, left), reset_us=reset, wait_us=wait, hits=hits, missing=max(0, hits - left)
    )
