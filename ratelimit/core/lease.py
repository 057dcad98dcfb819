# SPDX-License-Identifier: Apache-2.0
"""
Leases: requests and tokens taken in advance for one of Envoy's workers to spend by itself.

**Of buckets**, while at least half of each is left to others. In the bucket a lease does not drain; given
back, what was spent counts as of then; not given back, all of it counts as of its end. So it is never
charged earlier than it was spent, and no bucket is ever overdrawn by it.

**Of calendar quotas and budgets**: so many requests, each of bounded size, are held at what they can use at
worst, until the ledger has every request that passed on the lease and says what they used. Nobody gives one back.

What a lease costs is under-use: what a worker holds, nobody else has. So one of a bucket holds at most a
twentieth of its size, one of a quota a twentieth of what is left of it, all together half. Near its end a quota
lends nothing, and each request is decided.

Concurrency, shares of a pool, buckets of one kind of token and shadow quotas are asked for each request.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Final

from ratelimit.core.demand import Counter, Demand, Kind
from ratelimit.core.limits import Effect, Unit
from ratelimit.core.usage import holds

#: Longer than the gate remembers any decision (5 s), so that it can give back what it did not spend.
LENGTH_US: Final = 7_000_000
#: Requests in one lease. Beyond some hundreds another one saves nothing.
REQUESTS_MAX: Final = 500
#: The part of a bucket's size, or of what is left of a quota, that one lease may hold: 1 in so many.
PART: Final = 20
#: Before a quota's window ends nothing is lent for so long: no request on a lease may begin in the next one. Longer
#: than a lease, by what the clocks of Envoy and the store may differ.
BEFORE_END_US: Final = LENGTH_US + 10_000_000
#: What a lease of quotas holds until the ledger tells; should it never, it is given back after this, as unused as the
#: ledger knows it. Longer than the ledger is ever behind.
HELD_US: Final = 86_400_000_000

_TEXT: Final = re.compile(r"(\d{1,6})(?: ([0-9a-f-]{36}) (\d{1,9}) (-?\d{1,10}))?( quotas)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """So many requests and tokens: asked for, or left of one that is given back (tokens below 0: a debt)."""

    lease_id: str
    requests: int
    tokens: int
    #: Of one that is asked for: what one request takes of each counter of its demand, at worst of a quota. Empty if
    #: no quota is among them.
    each: tuple[int, ...] = ()

    def of(self, requests: int) -> Lease:
        """The same for so many requests: what was given, if that is fewer than were asked for."""
        return replace(self, requests=requests, tokens=self.tokens // max(self.requests, 1) * requests)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What a worker says of leases when it asks: how many requests it would spend, and what it gives back."""

    requests: int
    back: Lease | None
    #: Whether its Envoy can spend leases of quotas: one of before there were any tells nobody what was spent on which.
    has_quotas: bool = False


NOTHING: Final = Wish(requests=0, back=None)


def wish(text: str) -> Wish:
    """
    Read what the gate wrote: `WANTED` or `WANTED ID REQUESTS TOKENS`, and `quotas`; anything else wishes nothing.

    >>> wish("8").requests, wish("-") == NOTHING, wish("8 x 1 1") == NOTHING
    (8, True, True)
    >>> wish("8 quotas")
    Wish(requests=8, back=None, has_quotas=True)
    """
    found = _TEXT.fullmatch(text)
    if found is None:
        return NOTHING
    wanted, lease_id, requests, tokens, quotas = found.groups()
    back = Lease(lease_id=lease_id, requests=int(requests), tokens=int(tokens)) if lease_id else None
    return Wish(requests=int(wanted), back=back, has_quotas=quotas is not None)


def offer(demand: Demand, wished: Wish, *, now_us: int) -> Lease | None:
    """
    The lease that is *wished* of the counters, named after the request that asks; None if there can be none.

    They may give fewer requests, by what is left of a quota. *now_us*: microseconds since 1970.
    """
    requests = min(wished.requests, REQUESTS_MAX)
    each: list[int] = []
    for counter in demand.counters:
        hits = _each(demand, counter, now_us)
        if hits is None or (counter.kind is Kind.QUOTA and not wished.has_quotas):
            return None
        if counter.kind is Kind.BUCKET:
            requests = min(requests, counter.burst // PART // max(hits, 1))
        each.append(hits)
    if requests < 1 or not each:
        return None
    has_quota = any(counter.kind is Kind.QUOTA for counter in demand.counters)
    tokens = requests * (demand.lean.input + demand.lean.output)
    return Lease(lease_id=demand.request_id, requests=requests, tokens=tokens, each=tuple(each) if has_quota else ())


def _each(demand: Demand, counter: Counter, now_us: int) -> int | None:
    """What one request on a lease takes of *counter*: the usual of a bucket, the worst of a quota; None: it is not lent."""
    if counter.kind is Kind.BUCKET and counter.unit in (Unit.REQUESTS, Unit.TOKENS):
        return 1 if counter.unit is Unit.REQUESTS else demand.lean.input + demand.lean.output
    if counter.kind is not Kind.QUOTA or counter.effect is Effect.SHADOW or demand.bounds is None:
        return None
    if now_us + BEFORE_END_US >= counter.ends_us:
        return None
    price = None if counter.price is None else replace(counter.price, reach=demand.bounds.prompt_bytes)
    # All of a prompt may have been cached.
    return holds(counter.unit, replace(demand.bounds.usage, cached=demand.bounds.usage.input), price)
