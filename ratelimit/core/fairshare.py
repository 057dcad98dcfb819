# SPDX-License-Identifier: Apache-2.0
"""
A fair share of a pool of model servers: who waits once it is full.

A pool has a capacity, in requests under way and in tokens a second. While it has room nobody is held
back: a tenant that is alone may use all of it. Once it is full, a tenant that has more than its part
of it waits, and one that has less goes on. The part is its weight among the weights of those who have
anything in the pool, itself included. One number says both: the level as this tenant sees it,

    seen = min(total, mine + capacity - share)

leaves room below the capacity if the pool has room, or if the tenant is below its share. So a newcomer
never waits for those who came while there was room. A crowd of newcomers is bounded: each has a share of
at least one request, but requests under way are never more than twice the slots. Of tokens each tenant
may have one request beyond its share, however large it is; what it is too much delays its next.

Tokens drain as in generalised processor sharing: the pool's tokens a second are divided among the
tenants that have a backlog, by weight, and what one leaves over is the others'. Kept in virtual time
(how far a weight of one has been served), so that a decision looks at no other tenant:

    two tenants of weight 1 and 3 with a backlog of 100 tokens each, 40 tokens a second:
    10 a second for the first and 30 for the second until that one is through, then 40 for the first.

The same arithmetic as `fairshare.lua`; tests run the two side by side.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ratelimit.core.demand import Counter
from ratelimit.core.reading import LEASE_WAIT_US


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """A pool as one tenant sees it."""

    #: To be compared with the capacity: hits; of a backlog hits times microseconds.
    level: float
    #: Microseconds after which one hit more passes, however busy those keep the pool who are in it now.
    wait_us: float


@dataclass(slots=True)
class Slots:
    """Who has requests under way in a pool."""

    #: Request to tenant and when its lease ends.
    held: dict[str, tuple[str, int]] = field(default_factory=dict)
    #: Weight of each tenant as of its last request.
    weights: dict[str, int] = field(default_factory=dict)

    def standing(self, counter: Counter, tenant_id: str, now_us: int) -> Standing:
        """Forget leases that are over; the level is in requests."""
        for request_id in [request_id for request_id, (_, ends) in self.held.items() if ends <= now_us]:
            del self.held[request_id]
        counts = [owner for owner, _ in self.held.values()]
        weights = sum(self.weights[owner] for owner in set(counts) - {tenant_id}) + counter.weight
        share = max(1.0, counter.amount * counter.weight / weights)
        seen = _seen(total=len(counts), mine=counts.count(tenant_id), share=share, capacity=counter.amount)
        return Standing(level=max(seen, len(counts) - counter.amount), wait_us=LEASE_WAIT_US)

    def take(self, counter: Counter, tenant_id: str, request_id: str, ends_us: int) -> None:
        """Count a request as under way."""
        self.held[request_id] = (tenant_id, ends_us)
        self.weights[tenant_id] = counter.weight

    def leave(self, request_id: str) -> None:
        """It is not any more."""
        self.held.pop(request_id, None)


@dataclass(slots=True)
class Backlog:
    """Tokens that a pool has been given and not yet had the time for, in hits × microseconds."""

    at_us: int = 0
    #: How far a weight of one has been served since the backlog was last empty.
    virtual: float = 0.0
    total: float = 0.0
    #: Tenant to the virtual time at which its part is through, and its weight.
    parts: dict[str, tuple[float, int]] = field(default_factory=dict)

    def standing(self, counter: Counter, tenant_id: str, now_us: int) -> Standing:
        """Drain until now; the level is a debt."""
        self._drain(counter, now_us)
        capacity, one = float(counter.burst * counter.period_us), float(counter.period_us)
        part = counter.weight / (self._weight - self.parts.get(tenant_id, (0, 0))[1] + counter.weight)
        share, mine = max(one, capacity * part), self._mine(tenant_id)
        return Standing(
            level=_seen(total=self.total, mine=mine, share=share, capacity=capacity),
            wait_us=max(0.0, (mine + one - share) / (counter.amount * part)),
        )

    def add(self, counter: Counter, tenant_id: str, tokens: int, now_us: int) -> None:
        """Put *tokens* on top of the tenant's part; less than 0 takes back, never below none."""
        self._drain(counter, now_us)
        mine = self._mine(tenant_id)
        after = max(0.0, mine + tokens * counter.period_us)
        self.total = max(0.0, self.total + after - mine)
        self.parts.pop(tenant_id, None)
        if after > 0:
            self.parts[tenant_id] = (self.virtual + after / counter.weight, counter.weight)

    @property
    def _weight(self) -> int:
        return sum(weight for _, weight in self.parts.values())

    def _mine(self, tenant_id: str) -> float:
        finish, weight = self.parts.get(tenant_id, (self.virtual, 0))
        return (finish - self.virtual) * weight

    def _drain(self, counter: Counter, now_us: int) -> None:
        # A clock that went back drains nothing, and counts from what it shows now.
        left = float(max(0, now_us - self.at_us) * counter.amount)
        self.at_us, self.total = now_us, max(0.0, self.total - left)
        while self.parts and left > 0:
            first, (finish, _) = min(self.parts.items(), key=lambda part: part[1])
            weight = self._weight
            needed = (finish - self.virtual) * weight
            if needed > left:
                self.virtual += left / weight
                return
            left -= needed
            self.virtual = finish
            del self.parts[first]
        if not self.parts:
            self.virtual = self.total = 0.0


def _seen(*, total: float, mine: float, share: float, capacity: float) -> float:
    return min(total, mine + capacity - share)
