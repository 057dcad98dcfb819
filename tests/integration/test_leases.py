# SPDX-License-Identifier: Apache-2.0
"""Leases on a real store: never charged earlier than they were spent, and given back whole."""

from __future__ import annotations

import itertools
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from ratelimit.adapters import counters as adapter
from ratelimit.adapters.counters import StoredCounters, connect
from ratelimit.core.decide import Outcome
from ratelimit.core.demand import Counter, Demand, Kind
from ratelimit.core.lease import LENGTH_US, REQUESTS_MAX, Lease, Wish, offer
from ratelimit.core.limits import Effect, Period, Unit
from ratelimit.core.usage import Usage
from tests.integration.stores import PATIENCE_SECONDS
from tests.integration.test_counters import with_clock
from tests.ratelimit_model.machine import BEGIN_US

_TENANTS = itertools.count()
#: What the gate remembers at the most.
_REMEMBERED_US = 5_000_000
_EACH = 10


def counter(tenant: str, unit: Unit = Unit.REQUESTS, *, amount: int = 100, hits: int = 1, **fields: Any) -> Counter:
    """A bucket of so many a minute."""
    return Counter(
        **{
            "name": f"peaje:{{{tenant}}}:{unit.value}", "limit_id": 1, "kind": Kind.BUCKET, "unit": unit, "period": Period.MINUTE,
            "amount": amount, "burst": amount, "full": hits, "lean": hits,
        } | fields
    )  # fmt: skip


def demand(tenant: str, number: int, *counters: Counter) -> Demand:
    """A request of `_EACH` tokens."""
    usage = Usage(input=_EACH - 1, output=1)
    return Demand(tenant_id=tenant, request_id=f"r{number}", counters=counters, full=usage, lean=usage)


class Store:
    """Counters with a clock of their own, for one tenant."""

    def __init__(self, client: Any) -> None:
        self.client, self.counters, self.tenant, self.now = client, with_clock(client), f"lease-{next(_TENANTS)}", BEGIN_US
        # Keys end by the store's clock, whatever the scripts' says: on a busy machine too soon.
        text = self.counters._admit.text.replace("redis.call('PEXPIRE',", "tostring(")
        self.counters._admit = adapter._script(text)
        text = self.counters._settle.text.replace("redis.call('PEXPIRE',", "tostring(")
        self.counters._settle = adapter._script(text)

    def take(self, asked: Demand, **leases: Lease | None) -> Outcome:
        """Ask now."""
        seconds, micros = divmod(self.now, 1_000_000)
        self.client.pipeline().delete("test:clock").rpush("test:clock", seconds, micros).execute()
        return self.counters.take(asked, {}, **leases)

    def left(self, asked: Demand) -> list[int]:
        """What the buckets of *asked* have left, by a request that is refused."""
        looked = Demand(
            tenant_id=asked.tenant_id, request_id="look", full=asked.full, lean=asked.lean,
            counters=tuple(counter(self.tenant, c.unit, amount=c.amount, hits=c.amount + 1) for c in asked.counters),
        )  # fmt: skip
        return [reading.remaining for reading in self.take(looked).readings]


@pytest.fixture
def store(counter_store: str) -> Store:
    """Give an empty store."""
    return Store(connect(counter_store, cluster=False, timeout_seconds=PATIENCE_SECONDS))


def test_a_lease_is_taken_on_top_and_given_back(store: Store) -> None:
    """Held it counts as used, and does not drain; back, only what was spent of it does."""
    asked = demand(store.tenant, 1, counter(store.tenant), counter(store.tenant, Unit.TOKENS, amount=1000, hits=_EACH))
    lease = Lease(lease_id="r1", requests=4, tokens=40)

    assert store.take(asked, lease=lease).leased
    assert [95, 950] == store.left(asked)
    store.now += 6_000_000
    # One request and ten tokens have drained; the lease has not.
    assert [96, 960] == store.left(asked)

    outcome = store.take(demand(store.tenant, 2, *asked.counters), back=Lease(lease_id="r1", requests=1, tokens=15))
    assert outcome.admitted
    assert [96, 965] == store.left(asked)


def test_given_back_twice_it_is_given_back_once(store: Store) -> None:
    """A call that Envoy repeats, or a lease that had ended before."""
    asked = demand(store.tenant, 1, counter(store.tenant))
    store.take(asked, lease=Lease(lease_id="r1", requests=5, tokens=0))
    back = Lease(lease_id="r1", requests=5, tokens=0)

    for number in (2, 3):
        store.take(demand(store.tenant, number, *asked.counters), back=back)

    assert [97] == store.left(asked)


def test_a_debt_is_charged_when_the_lease_is_given_back(store: Store) -> None:
    """More tokens than were lent."""
    asked = demand(store.tenant, 1, counter(store.tenant, Unit.TOKENS, amount=1000, hits=_EACH))
    store.take(asked, lease=Lease(lease_id="r1", requests=2, tokens=20))

    store.take(demand(store.tenant, 2, *asked.counters), back=Lease(lease_id="r1", requests=0, tokens=-30))

    assert [1000 - 2 * _EACH - 50] == store.left(asked)


def test_a_lease_that_is_not_given_back_counts_as_spent_at_its_end(store: Store) -> None:
    """And then it drains as anything else."""
    asked = demand(store.tenant, 1, counter(store.tenant, amount=60))
    store.take(asked, lease=Lease(lease_id="r1", requests=3, tokens=0))

    store.now += LENGTH_US
    assert [57] == store.left(asked)
    store.now += 2_000_000
    assert [59] == store.left(asked)
    store.now += 60_000_000
    assert [60] == store.left(asked)


def test_what_drains_while_a_lease_is_held_is_not_the_lease(store: Store) -> None:
    """Others may take all the rest, and the lease can still be spent at once without overdrawing the bucket."""
    asked = demand(store.tenant, 1, counter(store.tenant, amount=60))
    store.take(asked, lease=Lease(lease_id="r1", requests=15, tokens=0))

    store.now += 4_900_000
    others = 0
    while store.take(demand(store.tenant, 2 + others, *asked.counters)).admitted:
        others += 1

    assert 60 == others + 15


@pytest.mark.parametrize(("used", "lent"), [(40, 10), (41, 9), (48, 2), (49, 0)])
def test_half_of_each_bucket_is_left_to_those_who_ask(store: Store, used: int, lent: int) -> None:
    """At the bound and above it, down to one request, which is of no use; the one that asks passes in any case."""
    asked = counter(store.tenant)
    store.take(demand(store.tenant, 1, counter(store.tenant, hits=used - 1)))

    outcome = store.take(demand(store.tenant, 2, asked), lease=Lease(lease_id="r2", requests=10, tokens=0))

    assert (True, lent) == (outcome.admitted, outcome.lent)
    assert [100 - used - lent] == store.left(demand(store.tenant, 3, asked))


def test_if_one_bucket_has_too_little_none_lends(store: Store) -> None:
    """All or nothing, as with the request itself."""
    narrow = counter(store.tenant, Unit.TOKENS, amount=50, hits=_EACH)
    asked = demand(store.tenant, 1, counter(store.tenant), narrow)

    outcome = store.take(asked, lease=Lease(lease_id="r1", requests=2, tokens=20))

    assert (True, False) == (outcome.admitted, outcome.leased)
    assert [99, 40] == store.left(asked)


def test_a_clock_that_went_back_ends_leases(store: Store) -> None:
    """Rather than to hold them until it has caught up."""
    asked = demand(store.tenant, 1, counter(store.tenant, amount=60))
    store.take(asked, lease=Lease(lease_id="r1", requests=3, tokens=0))

    store.now -= 3_600_000_000
    assert [56] == store.left(asked)
    store.now += 60_000_000
    assert [60] == store.left(asked)


def test_what_is_kept_of_a_lease_is_gone_when_it_has_drained(store: Store) -> None:
    """Each key has an end."""
    asked = demand(store.tenant, 1, counter(store.tenant))
    StoredCounters(store.client).take(asked, {}, lease=Lease(lease_id="r1", requests=4, tokens=0))

    keys = list(store.client.scan_iter(f"peaje:{{{store.tenant}}}*"))

    assert 2 == len(keys)
    assert all(0 < store.client.pttl(key) < 120_000 for key in keys)


class Workers(RuleBasedStateMachine):
    """Workers that spend leases at any time, beside requests that ask: checked against what really passed, when."""

    client: Any

    def __init__(self) -> None:
        super().__init__()
        self.store = Store(self.client)
        self.number = 0
        self.limits = (counter(self.store.tenant, amount=60), counter(self.store.tenant, Unit.TOKENS, amount=800, hits=_EACH))
        #: Per worker: its lease, what is left of it, when the worker forgets it.
        self.held: dict[int, tuple[str, int, int, int]] = {}
        #: The buckets as they would be, had every request been charged in the moment that it passed.
        self.truth = {c.name: Fraction(0) for c in self.limits}
        self.at = self.store.now

    @rule(worker=st.integers(0, 1), wanted=st.sampled_from([0, 10, 14, 14]))
    def ask(self, worker: int, wanted: int) -> None:
        """Give back what is held, ask for more: for larger leases than are offered, so that they matter soon."""
        held = self.held.pop(worker, None)
        back = held and Lease(lease_id=held[0], requests=held[1], tokens=held[2])
        lease = Lease(lease_id=f"r{self.number}", requests=wanted, tokens=wanted * _EACH) if wanted else None
        if given := self._ask(lease=lease, back=back).lent:
            assert lease is not None
            lease = lease.of(given)
            self.held[worker] = (lease.lease_id, lease.requests, lease.tokens, self.store.now + _REMEMBERED_US)

    @rule(us=st.sampled_from([0, 1_000_001, 4_999_999]))
    def others_take_all(self, us: int) -> None:
        """A little later, callers without a lease ask until they are refused."""
        self.store.now += us
        while self._ask().admitted:
            pass

    @rule(worker=st.integers(0, 1), count=st.integers(1, 15))
    def spend(self, worker: int, count: int) -> None:
        """Let requests pass without asking."""
        for _ in range(count):
            lease_id, requests, tokens, until = self.held.get(worker, ("", 0, 0, 0))
            if requests < 1 or tokens < _EACH or self.store.now >= until:
                return
            self.held[worker] = (lease_id, requests - 1, tokens - _EACH, until)
            self._passed()

    @rule(us=st.sampled_from([1, 1_500_000, 5_000_000, 60_000_000, 60_000_000]))
    def pass_time(self, us: int) -> None:
        """Some seconds, or enough for every bucket to be empty."""
        self.store.now += us

    @invariant()
    def nothing_is_overdrawn(self) -> None:
        """Not even if all that is held were spent in this moment."""
        self._drain()
        held = [lease for lease in self.held.values() if self.store.now < lease[3]]
        for limit in self.limits:
            could_pass = sum(lease[1] if limit.unit is Unit.REQUESTS else lease[2] for lease in held)
            assert self.truth[limit.name] + could_pass <= limit.burst

    def _ask(self, **leases: Lease | None) -> Outcome:
        self.number += 1
        outcome = self.store.take(demand(self.store.tenant, self.number, *self.limits), **leases)
        if outcome.admitted:
            self._passed()
        return outcome

    def _passed(self) -> None:
        self._drain()
        for limit in self.limits:
            self.truth[limit.name] += limit.full

    def _drain(self) -> None:
        for limit in self.limits:
            gone = Fraction((self.store.now - self.at) * limit.amount, limit.period_us)
            self.truth[limit.name] = max(Fraction(0), self.truth[limit.name] - gone)
        self.at = self.store.now


def test_no_bucket_is_overdrawn_whenever_leases_are_spent(counter_store: str) -> None:
    """Requests and tokens: zero over the limit, by what really passed."""
    machine = type("StoredWorkers", (Workers,), {"client": connect(counter_store, cluster=False, timeout_seconds=PATIENCE_SECONDS)})
    run_state_machine_as_test(
        machine, settings=settings(max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    )


@pytest.mark.parametrize(
    ("fields", "wanted", "requests"),
    [
        ({"amount": 200}, 99, 10), ({"amount": 200}, 3, 3), ({"amount": 19}, 99, None), ({"amount": 200}, 0, None),
        ({"amount": 10**6}, 10**6, REQUESTS_MAX), ({"amount": 200, "unit": Unit.TOKENS}, 99, 1), ({"amount": 199, "unit": Unit.TOKENS}, 99, None),
        ({"amount": 200, "unit": Unit.INPUT_TOKENS}, 99, None), ({"amount": 200, "kind": Kind.QUOTA}, 99, None),
        ({"amount": 200, "kind": Kind.LEASES, "unit": Unit.CONCURRENCY}, 99, None), ({"amount": 200, "effect": Effect.SHADOW}, 99, 10),
    ],
)  # fmt: skip
def test_what_is_offered(fields: dict[str, Any], wanted: int, requests: int | None) -> None:
    """A twentieth of each bucket at the most; nothing where something else than requests and tokens is counted."""
    unit = fields.pop("unit", Unit.REQUESTS)
    lease = offer(demand("t", 1, counter("t", unit, **fields)), Wish(requests=wanted, back=None), now_us=BEGIN_US)

    assert requests == (lease and lease.requests)
    assert lease is None or lease.tokens == lease.requests * _EACH
