# SPDX-License-Identifier: Apache-2.0
"""Leases of quotas and budgets on a real store: held at their worst until the ledger tells, and never overspent."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from ratelimit.adapters.counters import connect
from ratelimit.core.demand import Bounds, Counter, Demand, Kind
from ratelimit.core.lease import BEFORE_END_US, HELD_US, LENGTH_US, Lease, offer, wish
from ratelimit.core.limits import Effect, Period, Unit
from ratelimit.core.usage import Price, Report, Usage
from tests.integration.stores import PATIENCE_SECONDS
from tests.integration.test_counters import set_clock
from tests.integration.test_leases import Store, counter
from tests.ratelimit_model.machine import BEGIN_US

#: Nano-units for a token, whatever kind it is of.
_PRICE = Price(currency="USD", input_nano=3_000_000, output_nano=3_000_000, cached_nano=3_000_000)
#: A request's tokens, and the most that one on a lease may have.
_EACH, _WORST = 10, 40
_MONTH_ENDS_US = BEGIN_US + 10 * 86_400_000_000


def quota(tenant: str, unit: Unit = Unit.TOKENS, *, amount: int = 10_000, hits: int = _EACH, **fields: Any) -> Counter:
    """So much of *unit* a month."""
    asks = {Unit.REQUESTS: 1, Unit.MONEY: 3 * hits}.get(unit, hits)
    return Counter(
        **{
            "name": f"peaje:{{{tenant}}}:q-{unit.value}:2030-03", "limit_id": 2, "kind": Kind.QUOTA, "unit": unit,
            "period": Period.CALENDAR_MONTH, "amount": amount, "burst": amount, "full": asks, "lean": asks,
            "price": _PRICE if unit is Unit.MONEY else None, "starts_us": BEGIN_US, "ends_us": _MONTH_ENDS_US,
        } | fields
    )  # fmt: skip


def demand(tenant: str, number: int, *counters: Counter) -> Demand:
    """A request that may use `_EACH` tokens, as those on a lease may use `_WORST`."""
    usage = Usage(input=_EACH - 2, output=2)
    return Demand(
        tenant_id=tenant, request_id=f"r{number}", counters=counters, full=usage, lean=usage, is_capped=True, epoch="life",
        bounds=Bounds(prompt_bytes=4096, cap=32, usage=Usage(input=_WORST - 32, output=32)),
    )  # fmt: skip


def asking(store: Store, number: int, *counters: Counter, wanted: int, back: Lease | None = None) -> tuple[int, list[int]]:
    """Ask, and for so many more; how many were lent, and what each counter has left then."""
    asked = demand(store.tenant, number, *counters)
    outcome = store.take(asked, lease=offer(asked, wish(f"{wanted} quotas"), now_us=store.now), back=back)
    assert outcome.admitted
    return outcome.lent, [reading.remaining for reading in outcome.readings]


@pytest.fixture
def store(counter_store: str) -> Store:
    """Give an empty store, whose quotas know that nothing was used."""
    made = Store(connect(counter_store, cluster=False, timeout_seconds=PATIENCE_SECONDS))
    for unit in Unit:
        made.client.hset(quota(made.tenant, unit).name, "used", 0)
    return made


@pytest.mark.parametrize(
    ("unit", "own", "each"), [(Unit.TOKENS, 10, 40), (Unit.REQUESTS, 1, 1), (Unit.OUTPUT_TOKENS, 10, 32), (Unit.MONEY, 30, 120), (Unit.CACHED_TOKENS, 10, 8)]
)
def test_a_lease_is_held_at_its_worst_until_it_is_repaid(store: Store, unit: Unit, own: int, each: int) -> None:
    """However little is used: then that is used, and nothing is held."""
    of = quota(store.tenant, unit, amount=100_000)

    assert (5, [100_000 - own - 5 * each]) == asking(store, 1, of, wanted=5)
    assert [True, False] == [store.counters.repay(store.tenant, "r1", {of.name: 7}) for _ in range(2)]

    assert (0, [100_000 - 2 * own - 7]) == asking(store, 2, of, wanted=0)
    assert [b"0", b"7"] == store.client.hmget(of.name, "lent", "used")
    assert [] == store.counters.lent_before(store.tenant, store.now + 1, most=9)


def test_what_is_known_of_a_lease_is_enough_to_repay_it(store: Store) -> None:
    """When it was given, by whom it is spent, and what each of its quotas counts."""
    of = [quota(store.tenant, unit, amount=10**9) for unit in (Unit.REQUESTS, Unit.MONEY)]
    asking(store, 1, *of, counter(store.tenant, amount=1000), wanted=5)

    assert [("r1", store.now)] == store.counters.lent_before(store.tenant, store.now, most=9)
    assert [] == store.counters.lent_before(store.tenant, store.now - 1, most=9)
    loan = store.counters.lent(store.tenant, ["r1", "other"])["r1"]
    assert ("life", {of[0].name: (Unit.REQUESTS, ""), of[1].name: (Unit.MONEY, "USD")}) == (loan.epoch, loan.units)


@pytest.mark.parametrize(("left", "lent"), [(50 * 20 * _WORST, 50), (50 * 20 * _WORST - 1, 49), (2 * 20 * _WORST, 2), (2 * 20 * _WORST - 1, 0)])
def test_a_lease_is_a_twentieth_of_what_is_left(store: Store, left: int, lent: int) -> None:
    """Whole requests of it; a single one is not worth a lease."""
    of = quota(store.tenant, amount=left + _EACH)

    assert (lent, [left - lent * _WORST]) == asking(store, 1, of, wanted=50)


def test_one_request_is_lent_to_who_wants_no_more(store: Store) -> None:
    """Who wants one gets it where there is plenty."""
    assert 1 == asking(store, 1, quota(store.tenant), wanted=1)[0]


def test_all_leases_together_leave_half(store: Store) -> None:
    """Of what is neither used nor held by those who ask."""
    of = quota(store.tenant, amount=100_000)
    lent, number, asked = 0, 0, 0
    while True:
        number, asked = number + 1, asked + _EACH
        given, _ = asking(store, number, of, wanted=20)
        if not given:
            break
        lent += given * _WORST

    free = 100_000 - asked
    assert free / 2 - 21 * _WORST < lent <= free / 2


def test_quotas_and_buckets_are_lent_together_or_not_at_all(store: Store) -> None:
    """The quota's part makes the bucket's smaller; a bucket without room, and nothing is lent of the quota."""
    of, bucket = quota(store.tenant, amount=10 * 20 * _WORST + _EACH), counter(store.tenant, amount=1000)

    assert (10, [190 * _WORST, 1000 - 11]) == asking(store, 1, of, bucket, wanted=40)
    store.take(demand(store.tenant, 2, counter(store.tenant, amount=1000, hits=600)))
    assert 0 == asking(store, 3, of, bucket, wanted=40)[0]
    assert [b"400"] == store.client.hmget(of.name, "lent")


def test_a_bucket_is_given_back_and_a_quota_waits_for_the_ledger(store: Store) -> None:
    """The worker says what it did not spend; of a quota only the ledger is believed."""
    of, bucket = quota(store.tenant, Unit.REQUESTS, amount=1000), counter(store.tenant, amount=1000)
    asking(store, 1, of, bucket, wanted=10)

    assert (0, [1000 - 2 - 10, 1000 - 2 - 3]) == asking(store, 2, of, bucket, wanted=0, back=Lease(lease_id="r1", requests=7, tokens=0))
    store.counters.repay(store.tenant, "r1", {of.name: 3})
    assert (0, [1000 - 3 - 3, 1000 - 3 - 3]) == asking(store, 3, of, bucket, wanted=0)


def test_without_word_from_the_ledger_it_is_held_for_a_day(store: Store) -> None:
    """Then it is as unused as the ledger knows it, and a late word changes nothing."""
    of = quota(store.tenant)
    asking(store, 1, of, wanted=5)

    store.now += HELD_US - 1
    assert b"200" == store.client.hget(of.name, "lent")
    assert [10_000 - _EACH - 5 * _WORST] == asking(store, 2, of, wanted=0)[1]
    store.now += 1
    assert [10_000 - 2 * _EACH] == asking(store, 3, of, wanted=0)[1]
    store.counters.repay(store.tenant, "r1", {of.name: 40})
    assert [10_000 - 3 * _EACH] == asking(store, 4, of, wanted=0)[1]


def test_an_amount_that_no_double_holds_is_repaid_exactly(store: Store) -> None:
    """Nano-units of a large bill."""
    of = quota(store.tenant, Unit.MONEY, amount=2**60)
    asking(store, 1, of, wanted=5)

    store.counters.repay(store.tenant, "r1", {of.name: 2**53 + 1})

    assert str(2**53 + 1).encode() == store.client.hget(of.name, "used")


def test_usage_from_outside_is_added_beside_what_is_lent(store: Store) -> None:
    """The ledger may have what came of the lease already: counted once, whoever says it first."""
    of = quota(store.tenant, Unit.REQUESTS, amount=10_000)
    asking(store, 1, of, wanted=10)
    raised = [store.counters.raise_used(of.name, spent) for spent in (10, 1000)]

    assert [False, True] == raised
    store.counters.repay(store.tenant, "r1", {of.name: 6})
    assert b"996" == store.client.hget(of.name, "used")
    assert store.counters.raise_used(of.name, 1000)


@pytest.mark.parametrize(
    "fields",
    [
        {"effect": Effect.SHADOW}, {"kind": Kind.LEASES, "unit": Unit.CONCURRENCY}, {"ends_us": BEGIN_US + BEFORE_END_US},
    ],
)  # fmt: skip
def test_what_is_not_offered(fields: dict[str, Any]) -> None:
    """A shadow quota, who is under way, and a window that ends before a request on the lease must have begun."""
    wished = wish("9 quotas")

    assert offer(demand("t", 1, quota("t")), wished, now_us=BEGIN_US) is not None
    assert offer(demand("t", 1, quota("t"), quota("t", **fields)), wished, now_us=BEGIN_US) is None


def test_an_older_envoy_is_lent_no_quota() -> None:
    """It would not say which request passed on which lease."""
    assert offer(demand("t", 1, quota("t")), wish("9"), now_us=BEGIN_US) is None
    assert offer(demand("t", 1, counter("t", amount=1000)), wish("9"), now_us=BEGIN_US) is not None


def test_a_soft_budget_is_lent_whatever_is_left_of_it(store: Store) -> None:
    """It refuses nobody; what was used is counted all the same."""
    of = quota(store.tenant, amount=100, effect=Effect.COUNT)

    assert 20 == asking(store, 1, of, wanted=20)[0]
    store.counters.repay(store.tenant, "r1", {of.name: 170})
    assert b"170" == store.client.hget(of.name, "used")


class Spenders(RuleBasedStateMachine):
    """Workers with leases of a hard quota, others who ask, a ledger that tells late: by what was really used."""

    client: Any

    def __init__(self) -> None:
        super().__init__()
        self.store = Store(self.client)
        self.quota = quota(self.store.tenant, amount=6_000)
        self.client.hset(self.quota.name, "used", 0)
        self.number = 0
        #: By lease: requests left, when the worker forgets it, and what was used on it.
        self.leases: dict[str, list[int]] = {}
        self.open: list[str] = []
        self.truth = 0

    @rule(wanted=st.sampled_from([0, 0, 5, 20]))
    def ask(self, wanted: int) -> None:
        """One who asks, and may be lent to."""
        self.number += 1
        asked = demand(self.store.tenant, self.number, self.quota)
        outcome = self.store.take(asked, lease=offer(asked, wish(f"{wanted} quotas"), now_us=self.store.now))
        if outcome.admitted:
            self.open.append(asked.request_id)
        if outcome.lent:
            self.leases[asked.request_id] = [outcome.lent, self.store.now + LENGTH_US, 0]

    @precondition(lambda self: self.open)
    @rule(used=st.integers(0, _EACH))
    def end(self, used: int) -> None:
        """Envoy settles one that asked."""
        request_id = self.open.pop(0)
        set_clock(self.client, self.store.now)
        self.store.counters.settle(tenant_id=self.store.tenant, request_id=request_id, report=Report(input=0, output=used))
        self.truth += used

    @precondition(lambda self: self.leases)
    @rule(count=st.integers(1, 20), used=st.integers(0, _WORST), which=st.integers(0, 9))
    def spend(self, count: int, used: int, which: int) -> None:
        """Requests pass on a lease."""
        it = self.leases[sorted(self.leases)[which % len(self.leases)]]
        passed = min(count, it[0]) if self.store.now < it[1] else 0
        it[0] -= passed
        it[2] += passed * used
        self.truth += passed * used

    @precondition(lambda self: self.leases)
    @rule(which=st.integers(0, 9))
    def tell(self, which: int) -> None:
        """The ledger has all of a lease whose time is over."""
        name = sorted(self.leases)[which % len(self.leases)]
        if self.store.now >= self.leases[name][1]:
            set_clock(self.client, self.store.now)
            assert self.store.counters.repay(self.store.tenant, name, {self.quota.name: self.leases.pop(name)[2]})

    @rule(us=st.sampled_from([1_000_000, 7_000_000, 60_000_000]))
    def pass_time(self, us: int) -> None:
        """Some seconds."""
        self.store.now += us

    @invariant()
    def nothing_is_overspent(self) -> None:
        """Not even if all that is held were used in this moment; and what is known to be used was."""
        worst = sum(it[0] * _WORST for it in self.leases.values() if self.store.now < it[1]) + len(self.open) * _EACH
        assert self.truth + worst <= self.quota.amount
        used, held, lent = (int(it or 0) for it in self.client.hmget(self.quota.name, "used", "held", "lent"))
        assert used == self.truth - sum(it[2] for it in self.leases.values())
        assert held == lent + len(self.open) * _EACH

    def teardown(self) -> None:
        """All is told and ended: used is what was used, and nothing is held."""
        self.store.now += LENGTH_US
        while self.leases:
            self.tell(0)
        while self.open:
            self.end(1)
        assert [str(self.truth).encode(), b"0"] == [
            it or b"0" for it in self.client.hmget(self.quota.name, "used", "held")
        ] or not self.number  # fmt: skip


def test_no_quota_is_overspent_whenever_leases_are_spent_and_told_of(counter_store: str) -> None:
    """By what was really used, and to the token."""
    machine = type("StoredSpenders", (Spenders,), {"client": connect(counter_store, cluster=False, timeout_seconds=PATIENCE_SECONDS)})
    run_state_machine_as_test(
        machine, settings=settings(max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    )
