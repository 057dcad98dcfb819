# SPDX-License-Identifier: Apache-2.0
"""Random lives of a limiter, for whichever limiters a test puts beside the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, precondition, rule

from ratelimit.core.decide import LEASE_US, Outcome, Renewal
from ratelimit.core.demand import Counter, Demand, Kind
from ratelimit.core.limits import Effect, Period, Unit
from ratelimit.core.usage import Price, Report, Tier, Usage, hits, holds
from tests.ratelimit_model import Model

#: 1 March 2030: ahead of any store's own clock, so that nothing it keeps has expired already.
BEGIN_US = 1_898_553_600_000_000
#: The middle tier is the dearest for input, the highest for output.
_PRICE = Price(
    currency="USD", input_nano=150_000_007, output_nano=600_000_001, cached_nano=75_000_003, reasoning_nano=900_000_011, minimum_nano=40_000,
    tiers=(
        Tier(above_tokens=400, input_nano=400_000_009, output_nano=500_000_003, cached_nano=200_000_001),
        Tier(above_tokens=900, input_nano=100_000_003, output_nano=1_100_000_001, cached_nano=1, reasoning_nano=7),
    ),
)  # fmt: skip
#: How many more input tokens than estimated a prompt may have.
_REACH = 300

_TOKEN_UNITS = [Unit.TOKENS, Unit.INPUT_TOKENS, Unit.OUTPUT_TOKENS, Unit.CACHED_TOKENS]
_EFFECTS = st.sampled_from([Effect.REFUSE, Effect.REFUSE, Effect.REFUSE, Effect.COUNT, Effect.SHADOW])
_BUCKETS = st.tuples(
    st.just(Kind.BUCKET), st.sampled_from([Unit.REQUESTS, *_TOKEN_UNITS]),
    st.sampled_from([Period.SECOND, Period.MINUTE, Period.HOUR, Period.DAY]),
    st.integers(0, 2000), st.none() | st.integers(0, 3000), _EFFECTS,
)  # fmt: skip
_QUOTAS = st.tuples(
    st.just(Kind.QUOTA), st.sampled_from([Unit.REQUESTS, Unit.MONEY, *_TOKEN_UNITS]), st.just(Period.CALENDAR_MONTH),
    st.integers(0, 5000), st.none(), _EFFECTS,
)  # fmt: skip
_LEASES = st.tuples(
    st.just(Kind.LEASES), st.just(Unit.CONCURRENCY), st.just(Period.NOW), st.integers(0, 4), st.none(), _EFFECTS
)
LIMITS = st.lists(_BUCKETS | _QUOTAS | _LEASES, min_size=1, max_size=5)
_TOKENS = st.integers(0, 1500)
_LEAST = st.sampled_from([0, 1, 16, 1500])

Take = Callable[[Demand, int], Outcome]
Settle = Callable[[Demand, Report, int], bool]


class Lives(RuleBasedStateMachine):
    """Subclasses say which limiter is compared; time only moves by rule, also back."""

    requests = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        self.now = BEGIN_US
        #: The latest that it was before it went back, by which what was taken then ends; and how far back it may go.
        self.latest, self.earliest = BEGIN_US, BEGIN_US - LEASE_US
        self.model = Model()
        self.number = 0
        self.open: set[str] = set()
        self.limits: list[tuple] = []
        self.tenant = ""

    def take(self, demand: Demand) -> Outcome:
        """The limiter under test."""
        raise NotImplementedError

    def renew(self, demand: Demand, renewal: Renewal) -> int:
        """The limiter under test."""
        raise NotImplementedError

    def settle(self, demand: Demand, report: Report) -> bool:
        """The limiter under test."""
        raise NotImplementedError

    def expire(self) -> None:
        """Do what a limiter's own expiry does, where it does not go by `now`."""

    @precondition(lambda self: not self.limits)
    @rule(limits=LIMITS)
    def set_limits(self, limits: list[tuple]) -> None:
        """Once, before anything else."""
        self.limits = limits

    @precondition(lambda self: self.limits)
    @rule(target=requests, prompt=_TOKENS, least=_LEAST, lean=_TOKENS, more=_TOKENS, is_sliced=st.booleans())
    def admit(self, prompt: int, least: int, lean: int, more: int, *, is_sliced: bool) -> Demand:
        """The verdict, what is granted, the room and what is left are the model's."""
        self.number += 1
        demand = self._demand(
            least=min(least, lean), lean=Usage(input=prompt, output=lean), full=Usage(input=prompt, output=lean + more),
            is_sliced=is_sliced,
        )  # fmt: skip

        outcome = self.take(demand)

        verdict, granted = self.model.take(demand, self.now)
        assert (verdict, granted) == (outcome.verdict.name, outcome.output)
        for reading in outcome.readings:
            level = self.model.level(reading.counter, self.now)
            assert max(0, int(reading.counter.burst - level)) == reading.remaining
            if verdict == "REFUSED" and reading.wait_us and reading.counter.kind is Kind.BUCKET:
                assert self._fits_after(reading.counter, reading.wait_us)
                assert not self._fits_after(reading.counter, reading.wait_us - 2)
        if verdict != "REFUSED":
            self.open.add(demand.request_id)
        return demand

    @precondition(lambda self: self.open)
    @rule(demand=requests, input_=_TOKENS, output=_TOKENS, more=_TOKENS)
    def go_on(self, demand: Demand, input_: int, output: int, more: int) -> None:
        """A stream that is renewed holds what the model says, and so does everybody else."""
        renewal = Renewal(input=input_, output=output, more=more)

        held = self.renew(demand, renewal)

        if demand.settles and demand.request_id in self.open:
            wanted = self.model.renew(demand.request_id, input_=input_, output=output, more=more, now=self.now)
            assert wanted == held
        else:
            assert held == 0

    @precondition(lambda self: self.open)
    @rule(demand=requests, output=_TOKENS, cached=st.integers(0, 2000), reasoning=st.integers(0, 2000), input_=st.none() | _TOKENS)
    def end(self, demand: Demand, output: int, cached: int, reasoning: int, input_: int | None) -> None:
        """Settled once, however often it is said; what was refused has nothing to settle."""
        report = Report(input=input_, output=output, cached=cached, reasoning=reasoning)

        settled = self.settle(demand, report)

        assert settled == (demand.settles and demand.request_id in self.open)
        self.open.discard(demand.request_id)
        self.model.settle(demand.request_id, report, self.now)
        assert not self.settle(demand, report)

    @rule(us=st.integers(0, 200_000_000))
    def pass_time(self, us: int) -> None:
        """Up to some minutes."""
        self.now += us

    @rule(us=st.integers(1, 200_000_000))
    def jump_back(self, us: int) -> None:
        """As a store's clock may, at a failover; not behind the end of a lease that was seen to be over."""
        over = [ends for leases in self.model.held.values() for _, ends in leases.values() if ends <= self.now]
        self.latest = max(self.latest, self.now)
        self.now = max(self.now - us, *over, self.earliest)

    @rule()
    def pass_a_lease(self) -> None:
        """Whatever was not settled by now is given back."""
        ends = [ends for leases in self.model.held.values() for _, ends in leases.values()]
        self.now = max(max(self.now, self.latest) + LEASE_US, *ends, 0)
        self.earliest = self.now
        self.expire()
        self.open.clear()
        self.model.taken.clear()

    @invariant()
    def nothing_is_held_by_nobody(self) -> None:
        """What is held is held by open requests."""
        for leases in self.model.held.values():
            assert {name for name, (_, ends) in leases.items() if ends > self.now} <= self.open

    def _fits_after(self, counter: Counter, wait_us: int) -> bool:
        return self.model.level(counter, self.now + wait_us) + counter.lean <= counter.burst

    def _demand(self, *, least: int, lean: Usage, full: Usage, is_sliced: bool) -> Demand:
        counters = []
        for index, (kind, unit, period, amount, burst, effect) in enumerate(self.limits):
            price = dataclasses.replace(_PRICE, reach=full.input + _REACH) if unit is Unit.MONEY else None
            asked = holds if kind is Kind.QUOTA and effect is Effect.REFUSE else hits
            # Money is in nano-units: a limit of some requests' worth.
            most = amount * 1_000_000 if unit is Unit.MONEY else amount
            counter = Counter(
                name=f"peaje:{{{self.tenant}}}:{index}", limit_id=index, kind=kind, unit=unit, period=period,
                amount=most, burst=most if burst is None else burst, full=asked(unit, full, price),
                lean=asked(unit, lean, price), effect=effect, price=price, ends_us=BEGIN_US + 31 * 86_400_000_000,
            )  # fmt: skip
            if counter.kind is Kind.BUCKET:
                counter = dataclasses.replace(counter, full=counter.lean)
            counters.append(counter)
        return Demand(
            tenant_id=self.tenant, request_id=f"r{self.number}", counters=tuple(counters), full=full, lean=lean,
            output_least=least, is_sliced=is_sliced,
        )  # fmt: skip
