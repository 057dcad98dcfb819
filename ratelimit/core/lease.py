# SPDX-License-Identifier: Apache-2.0
"""
Leases: requests and tokens taken in advance for one of Envoy's workers to spend by itself.

A lease is taken from all buckets that bind the caller, while at least half of each is left to
others. In the bucket it does not drain; given back, what was spent counts as of then; not given
back, all of it counts as of its end. So it is never charged earlier than it was spent, and no
bucket is ever overdrawn by it. What it costs is under-use: what a worker holds, nobody else has.

Only buckets of requests and of tokens are leased. Concurrency, quotas, budgets and buckets of
one kind of token are asked for each request.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from ratelimit.core.demand import Demand, Kind
from ratelimit.core.limits import Unit

#: Longer than the gate remembers any decision (5 s), so that it can give back what it did not spend.
LENGTH_US: Final = 7_000_000
#: Requests in one lease. Beyond some hundreds another one saves nothing.
REQUESTS_MAX: Final = 500
#: The part of a bucket's size that one lease may hold: 1 in so many.
PART_OF_BURST: Final = 20

_TEXT: Final = re.compile(r"(\d{1,6})(?: ([0-9a-f-]{36}) (\d{1,9}) (-?\d{1,10}))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """So many requests and tokens: asked for, or left of one that is given back (tokens below 0: a debt)."""

    lease_id: str
    requests: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What a worker says of leases when it asks: how many requests it would spend, and what it gives back."""

    requests: int
    back: Lease | None


NOTHING: Final = Wish(requests=0, back=None)


def wish(text: str) -> Wish:
    """
    Read what the gate wrote: `WANTED` or `WANTED ID REQUESTS TOKENS`; anything else wishes nothing.

    >>> wish("8").requests, wish("-"), wish("8 x 1 1") == NOTHING
    (8, Wish(requests=0, back=None), True)
    """
    found = _TEXT.fullmatch(text)
    if found is None:
        return NOTHING
    wanted, lease_id, requests, tokens = found.groups()
    back = Lease(lease_id=lease_id, requests=int(requests), tokens=int(tokens)) if lease_id else None
    return Wish(requests=int(wanted), back=back)


def offer(demand: Demand, wanted: int) -> Lease | None:
    """The lease to ask the counters for, named after the request that asks; None if there can be none."""
    requests = min(wanted, REQUESTS_MAX)
    tokens = demand.lean.input + demand.lean.output
    for counter in demand.counters:
        if counter.kind is not Kind.BUCKET or counter.unit not in (Unit.REQUESTS, Unit.TOKENS):
            return None
        each = 1 if counter.unit is Unit.REQUESTS else max(tokens, 1)
        requests = min(requests, counter.burst // PART_OF_BURST // each)
    if requests < 1 or not demand.counters:
        return None
    return Lease(lease_id=demand.request_id, requests=requests, tokens=requests * tokens)
