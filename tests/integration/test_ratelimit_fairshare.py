# SPDX-License-Identifier: Apache-2.0
"""Fair shares in a real store: the scripts against the core, many at once, and through the servicer."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from random import Random

import orjson
import pytest

from ratelimit.adapters.counters import ClusterCounters, StoredCounters, connect
from ratelimit.core.decide import LEASE_US, Memory, settle, take
from ratelimit.core.demand import Demand, Kind, demand, pool_place
from ratelimit.core.estimate import Estimates
from ratelimit.core.limits import Ask, Pool, Share
from ratelimit.core.usage import Report
from tests.integration.stores import PATIENCE_SECONDS
from tests.integration.test_counters import set_clock, with_clock
from tests.integration.test_ratelimit_stores import NOW, OK, OVER, Desk, header, own_store
from tests.integration.test_ratelimit_stores import demand as bucket
from tests.ratelimit_model.machine import BEGIN_US

__all__ = ["own_store"]

_NUMBERS = itertools.count()


def asked(model: str, tenant: str, *, weight: int = 1, tokens: int = 10, **capacity: int) -> Demand:
    """A request to a pool of its own test."""
    pool = Pool(model=model, slots=capacity.get("slots"), tokens_per_second=capacity.get("tokens_per_second"))
    ask = Ask(
        request_id=f"f{next(_NUMBERS)}", tenant_id=tenant, project_id="p", key_id="k", model=model, dialect="openai.chat",
        prompt_bytes=0, output_tokens_max=tokens, choices=1,
    )  # fmt: skip
    return demand(
        ask, (), estimates=Estimates(), price=None, output_cap=10**6, now=NOW, share=Share(pool=pool, weight=weight)
    )


@pytest.mark.parametrize("seed", range(3))
def test_the_scripts_decide_as_the_core_does(counter_store: str, seed: int) -> None:
    """Admissions, refusals, waits, settles, ends of leases, changed weights and clocks that go back, in any order."""
    store, order = connect(counter_store, cluster=False, timeout_seconds=PATIENCE_SECONDS), Random(seed)
    stored, memory, model = with_clock(store), Memory(), f"agree-{seed}"
    now = BEGIN_US
    under_way: list[tuple[Demand, int]] = []
    verdicts: Counter[str] = Counter()

    for _ in range(250):
        now += order.choice([0, 1, 1000, 100_000, 3_000_000, 3_000_000, -500_000, 1_800_000_000 if order.random() < 0.1 else 0])
        set_clock(store, now)
        # A lease that is over has nothing to settle; the store itself knows by its own clock, not by this one.
        under_way = [(one, ends) for one, ends in under_way if now < ends]
        if order.random() < 0.4 and under_way:
            one, _ = under_way.pop(order.randrange(len(under_way)))
            report = Report(input=0, output=order.randrange(600))
            there = stored.settle(tenant_id=one.tenant_id, request_id=one.request_id, report=report)
            assert settle(memory, one.request_id, report, now) == (there is not None)
            continue
        one = asked(
            model, f"t{order.randrange(6)}", weight=order.choice([1, 1, 2, 5]), tokens=order.randrange(1, 400),
            slots=7, tokens_per_second=200,
        )  # fmt: skip
        here, stored_ = take(memory, one, now), stored.take(one, {})

        verdicts[here.verdict.name] += 1
        assert here.verdict == stored_.verdict
        for ours, theirs in zip(here.readings, stored_.readings, strict=True):
            assert pytest.approx(ours.wait_us, abs=2) == theirs.wait_us
        if here.admitted:
            under_way.append((one, now + LEASE_US))

    assert min(verdicts["FULL"], verdicts["REFUSED"]) > 20


def test_nothing_is_left_of_a_pool_in_which_nobody_is(counter_store: str) -> None:
    """Neither slots nor weights."""
    store = connect(counter_store, cluster=False, timeout_seconds=PATIENCE_SECONDS)
    stored = StoredCounters(store)
    requests = [asked("empties", f"t{number % 3}", weight=1 + number % 4, slots=20) for number in range(15)]
    for one in requests:
        stored.take(one, {})

    tenants = stored.under_way("empties")
    for one in requests:
        stored.settle(tenant_id=one.tenant_id, request_id=one.request_id, report=Report(input=1, output=1))

    assert ["t0", "t1", "t2"] == sorted(tenants)
    assert [] == stored.under_way("empties")
    assert {b"W": b"0"} == store.hgetall("peaje:{pool:empties}:slots:by")
    assert 0 == store.zcard("peaje:{pool:empties}:slots")


@pytest.mark.parametrize("name", ["a/b", "{x}", "a:b", "line\nbreak", "n:W", "é" * 300])
def test_a_name_of_any_shape_is_only_a_name(counter_store: str, name: str) -> None:
    """Of a tenant or a model: it is counted as itself, and what it holds it gives back."""
    store = connect(counter_store, cluster=False, timeout_seconds=PATIENCE_SECONDS)
    stored = StoredCounters(store)
    one, other = (asked(name, tenant, slots=1, tokens_per_second=10**6) for tenant in (name, "plain"))

    admitted = [stored.take(request, {}).admitted for request in (one, asked(name, name, slots=1), other)]
    under_way = stored.under_way(name)
    for request in (one, other):
        assert stored.settle(tenant_id=request.tenant_id, request_id=request.request_id, report=Report(input=0, output=10))

    assert [True, False, True] == admitted
    assert sorted([name, "plain"]) == sorted(under_way)
    assert [] == stored.under_way(name)


def test_many_at_once_get_exactly_the_slots(counter_store: str) -> None:
    """One script: no two of them see the same last slot; and a tenant that comes after has its half."""
    stored = StoredCounters(connect(counter_store, cluster=False, timeout_seconds=PATIENCE_SECONDS))

    with ThreadPoolExecutor(16) as pool:
        batch = list(pool.map(lambda _: stored.take(asked("rush", "batch", slots=10), {}).admitted, range(100)))
        chat = list(pool.map(lambda _: stored.take(asked("rush", "chat", slots=10), {}).admitted, range(100)))

    assert (10, 5) == (sum(batch), sum(chat))


def test_a_tenant_s_own_limit_that_refuses_leaves_the_pool_untouched(own_store: str, postgres_url: str) -> None:
    """All or nothing, the pool's slot included."""
    desk = Desk(postgres_url, own_store)
    desk.limit("requests", "day", 1)
    desk.connection.execute("insert into pool_capacity values ('m', 10, null, now())")
    desk.open()

    codes = [desk.admit(f"r{number}").overall_code for number in range(3)]

    assert [OK, OVER, OVER] == codes
    assert 1 == desk.store.zcard("peaje:{pool:m}:slots")
    desk.close()


@pytest.fixture
def desk(postgres_url: str, own_store: str) -> Iterator[Desk]:
    """A servicer of a tenant without any limit, whose model has two slots."""
    made = Desk(postgres_url, own_store)
    made.connection.execute("insert into pool_capacity values ('m', 2, null, now())")
    yield made
    made.close()


def test_a_tenant_without_limits_has_its_share_too(desk: Desk) -> None:
    """And is told so, with a code of its own; what ends gives its slot back."""
    desk.open()

    first, second, third = (desk.admit(name) for name in ("one", "two", "three"))
    other = desk.admit("other", tenant="another")
    desk.settle("one")
    desk.settle("other", tenant="another")
    again = desk.admit("four")
    elsewhere = desk.admit("five", model="n")

    assert [OK, OK, OVER, OK, OK, OK] == [a.overall_code for a in (first, second, third, other, again, elsewhere)]
    assert "fair_share" == orjson.loads(third.raw_body)["error"]["code"]
    assert "1" == header(third, "retry-after")
    # Whoever shares a pool asks each time: no worker may remember that nothing applies.
    assert "unlimited" not in first.dynamic_metadata.fields
    assert elsewhere.dynamic_metadata.fields["unlimited"].bool_value


def test_in_a_cluster_the_pool_is_asked_first_and_given_back(counter_cluster: str) -> None:
    """On nodes of their own; what the tenant's limits refuse leaves the pool as it was, what ends leaves both."""
    stored = ClusterCounters(connect(counter_cluster, cluster=True, timeout_seconds=PATIENCE_SECONDS))
    own = bucket("lone", amount=15, kinds=(Kind.BUCKET,)).counters
    requests = [asked("clustered", tenant, slots=2) for tenant in ("lone", "lone", "batch", "batch", "chat")]
    requests[0], requests[1] = (dataclasses.replace(one, counters=(*own, *one.counters)) for one in requests[:2])

    verdicts = [stored.take(one, {}).admitted for one in requests]
    under_way = stored.under_way("clustered")
    settled = [
        stored.settle(tenant_id=one.tenant_id, request_id=one.request_id, report=Report(input=1, output=1), model="clustered")
        for one in requests
    ]  # fmt: skip

    # Ten of fifteen tokens are the first's, so the second is refused by them and has no slot; the third is the batch's
    # only one; the newcomer is below its share.
    assert [True, False, True, False, True] == verdicts
    assert ["batch", "chat", "lone"] == sorted(under_way)
    assert verdicts == [one is not None for one in settled]
    assert [] == stored.under_way("clustered")
    assert [] == [held for place in ("lone", pool_place("clustered")) for held in stored.opened_before(place, 1 << 60, most=9)]


def test_a_weight_acts_on_the_next_request(desk: Desk) -> None:
    """Three of four slots for a tenant of weight three."""
    desk.connection.execute("update pool_capacity set slots = 4")
    desk.connection.execute("insert into tenant_weight values (%s, 3, now())", (desk.tenant,))
    desk.open()
    for number in range(4):
        desk.admit(f"b{number}", tenant="batch")

    codes = [desk.admit(f"r{number}").overall_code for number in range(4)]

    assert [OK, OK, OK, OVER] == codes


def test_without_its_store_a_pool_is_shared_by_what_one_process_sees(desk: Desk) -> None:
    """Its part of the slots; nobody gets an error."""
    desk.connection.execute("update pool_capacity set slots = 4")
    desk.open()
    desk.servicer._stored = StoredCounters(connect("redis://127.0.0.1:1", cluster=False))

    codes = [desk.admit(f"r{number}").overall_code for number in range(4)]

    assert [OK, OK, OVER, OVER] == codes
