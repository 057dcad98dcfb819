# SPDX-License-Identifier: Apache-2.0
"""The limiter as one would explain it on a blackboard, to compare the real ones with. Exact: fractions, no bounds."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from fractions import Fraction

from ratelimit.core.decide import LEASE_US
from ratelimit.core.demand import Counter, Demand, Kind
from ratelimit.core.limits import Effect, Unit
from ratelimit.core.usage import Report, Usage, hits


def worst(counter: Counter, usage: Usage) -> int:
    """
    The most that *usage* can come to: by each price alone that requests may have, with nothing or all of it cached or reasoning.

    What costs is linear between those ends.
    """
    price = counter.price
    if counter.unit is not Unit.MONEY or price is None:
        return hits(counter.unit, usage, price)
    alone = [replace(price, tiers=())] + [
        replace(
            price, tiers=(), input_nano=tier.input_nano, output_nano=tier.output_nano, cached_nano=tier.cached_nano,
            reasoning_nano=tier.reasoning_nano,
        )
        for tier in price.tiers
        if usage.input > tier.above_tokens or price.reach > tier.above_tokens
    ]
    return max(
        hits(counter.unit, replace(usage, cached=cached, reasoning=reasoning), one)
        for one in alone for cached in (0, usage.input) for reasoning in (0, usage.output)
    )


@dataclass
class Model:
    """Everything that ever happened; what a counter holds is worked out anew each time."""

    buckets: dict[str, tuple[Fraction, int]] = field(default_factory=dict)
    used: dict[str, int] = field(default_factory=dict)
    held: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)
    taken: dict[str, list[tuple[Counter, int]]] = field(default_factory=dict)
    estimates: dict[str, Demand] = field(default_factory=dict)
    #: Output tokens held, and whether that is all there can be.
    granted: dict[str, tuple[int, bool]] = field(default_factory=dict)

    def level(self, counter: Counter, now: int) -> Fraction:
        """Hits in the counter now."""
        if counter.kind is Kind.BUCKET:
            debt, at = self.buckets.get(counter.name, (Fraction(0), now))
            if now < at:  # the clock went back: from here on
                at = now
                self.buckets[counter.name] = (debt, at)
            return max(Fraction(0), debt - Fraction(max(0, now - at) * counter.amount, counter.period_us))
        leases = [hits for hits, ends in self.held.get(counter.name, {}).values() if ends > now]
        return Fraction(self.used.get(counter.name, 0) + sum(leases))

    def take(self, demand: Demand, now: int) -> tuple[str, int]:
        """FULL, LEAN or REFUSED, and the output tokens granted: tried one after the other, the most first."""
        levels = {c.name: self.level(c, now) for c in demand.counters}
        asks = [("FULL", demand.full.output)]
        asks += [("LEAN", output) for output in range(demand.lean.output, demand.output_least - 1, -1)]
        for verdict, output in asks:
            lean = Usage(input=demand.lean.input, output=output)
            asked = [
                (c, c.full if verdict == "FULL" else worst(c, lean) if c.is_hard else c.lean)
                for c in demand.counters
            ]
            fits = {c.name: levels[c.name] + n <= c.burst for c, n in asked}
            spare = verdict == "LEAN" or all(levels[c.name] + n * demand.room_for <= c.amount for c, n in asked if c.is_hard)
            if spare and all(fits[c.name] for c, _ in asked if c.effect is Effect.REFUSE):
                given = [(c, n) for c, n in asked if fits[c.name] or c.effect is not Effect.SHADOW]
                for counter, number in given:
                    if counter.kind is Kind.BUCKET:
                        self.buckets[counter.name] = (self.level(counter, now) + number, now)
                    else:
                        self.held.setdefault(counter.name, {})[demand.request_id] = (number, now + LEASE_US)
                self.taken[demand.request_id], self.estimates[demand.request_id] = given, demand
                self.granted[demand.request_id] = output, verdict == "FULL"
                return verdict, output
        return "REFUSED", 0

    def renew(self, request_id: str, *, input_: int, output: int, more: int, now: int) -> int:
        """Output tokens held after it: tried one after the other, the most first."""
        if request_id not in self.taken:
            return 0
        before, is_full = self.granted[request_id]
        hard = [counter for counter, _ in self.taken[request_id] if counter.is_hard]
        levels = {c.name: self.level(c, now) for c in hard}
        own = {c.name: self.held[c.name].get(request_id, (0, 0)) for c in hard}
        own = {name: hits if ends > now else 0 for name, (hits, ends) in own.items()}
        most = max(output, min(output + more, self.estimates[request_id].full.output))
        for granted in range(most, output - 1, -1) if not is_full else ():
            asked = {c.name: worst(c, Usage(input=input_, output=granted)) for c in hard}
            if all(levels[c.name] - own[c.name] + asked[c.name] <= c.amount for c in hard):
                for counter in hard:
                    self.held[counter.name][request_id] = (asked[counter.name], now + LEASE_US)
                self.granted[request_id] = granted, False
                return granted
        return before

    def settle(self, request_id: str, report: Report, now: int) -> None:
        """Charge what was used, once."""
        actual = report.usage(self.estimates[request_id].lean) if request_id in self.estimates else None
        for counter, number in self.taken.pop(request_id, []):
            assert actual is not None
            used = hits(counter.unit, actual, counter.price)
            if counter.kind is not Kind.BUCKET:
                self.held[counter.name].pop(request_id, None)
                self.used[counter.name] = self.used.get(counter.name, 0) + used * (counter.kind is Kind.QUOTA)
            elif counter.unit is not Unit.REQUESTS:
                self.buckets[counter.name] = (max(Fraction(0), self.level(counter, now) + used - number), now)
