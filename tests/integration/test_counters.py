# SPDX-License-Identifier: Apache-2.0
"""The limiter in the store against the model, and what only a real store can show."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from ratelimit.adapters import counters as adapter
from ratelimit.adapters.counters import StoredCounters, connect
from ratelimit.core.decide import Outcome, Renewal, Verdict
from ratelimit.core.demand import Counter, Demand, Kind
from ratelimit.core.doubt import Hold
from ratelimit.core.limits import Period, Unit
from ratelimit.core.usage import Price, Report, Tier, Usage
from tests.integration.stores import PATIENCE_SECONDS, debian_redis, store_server
from tests.ratelimit_model.machine import Lives

_TENANTS = itertools.count()


def with_clock(store: Any) -> StoredCounters:
    """Counters whose scripts read the time from a list in the store instead of its clock."""
    made = StoredCounters(store)
    for name in ("_admit", "_renew", "_settle"):
        text = getattr(made, name).text.replace("redis.call('TIME')", "redis.call('LRANGE', 'test:clock', 0, 1)")
        setattr(made, name, adapter._script(text))
    return made


def set_clock(store: Any, now_us: int) -> None:
    """Set what `with_clock` reads."""
    with store.pipeline() as pipeline:
        pipeline.delete("test:clock").rpush("test:clock", *divmod(now_us, 1_000_000)).execute()


def lives(store: Any) -> type[Lives]:
    """The machine on *store*."""
    stored = with_clock(store)

    class Stored(Lives):
        """`admit.lua`, `renew.lua` and `settle.lua` beside the model."""

        def __init__(self) -> None:
            super().__init__()
            self.tenant = f"model-{next(_TENANTS)}"

        def take(self, demand: Demand) -> Outcome:
            self._set_clock()
            return stored.take(demand, {c.name: 0 for c in demand.counters if c.kind is Kind.QUOTA})

        def renew(self, demand: Demand, renewal: Renewal) -> int:
            self._set_clock()
            return stored.renew(tenant_id=self.tenant, request_id=demand.request_id, renewal=renewal)

        def settle(self, demand: Demand, report: Report) -> bool:
            self._set_clock()
            return stored.settle(tenant_id=self.tenant, request_id=demand.request_id, report=report) is not None

        def expire(self) -> None:
            for request_id in self.open:
                store.delete(adapter.reservation_key(self.tenant, request_id))

        def _set_clock(self) -> None:
            set_clock(store, self.now)

    return Stored


_LIVES = settings(
    max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def test_the_scripts_agree_with_the_model_on_valkey(counter_store: str) -> None:
    """Admissions, refusals, settles, leases and time, in any order."""
    run_state_machine_as_test(lives(connect(counter_store, cluster=False, timeout_seconds=PATIENCE_SECONDS)), settings=_LIVES)


@pytest.mark.skipif(debian_redis() is None, reason="no redis-server on PATH")
def test_the_scripts_agree_with_the_model_on_the_distribution_s_redis() -> None:
    """Redis 7.0 is the oldest that is supported."""
    with store_server(debian_redis()) as url:
        run_state_machine_as_test(lives(connect(url, cluster=False, timeout_seconds=PATIENCE_SECONDS)), settings=_LIVES)


def test_what_a_budget_holds_is_told_by_the_dearest_price(counter_store: str) -> None:
    """Of a request that was given less than it asked for: tokens as they were granted, at the price of reasoning and of its tier."""
    stored = connect(counter_store, cluster=False, timeout_seconds=PATIENCE_SECONDS)
    price = Price(
        currency="USD", input_nano=1_000_000, output_nano=2_000_000, cached_nano=0, reasoning_nano=5_000_000, reach=30,
        tiers=(Tier(above_tokens=20, input_nano=3_000_000, output_nano=4_000_000, cached_nano=0),),
    )  # fmt: skip
    budget = Counter(
        name="peaje:{told}:1:2030-03", limit_id=1, kind=Kind.QUOTA, unit=Unit.MONEY, period=Period.CALENDAR_MONTH, amount=100, burst=100,
        full=1000, lean=50, price=price, ends_us=2**52,
    )  # fmt: skip
    asked = Demand(
        tenant_id="told", request_id="r", counters=(budget,), full=Usage(input=8, output=200), lean=Usage(input=8, output=4), is_capped=True
    )

    outcome = StoredCounters(stored).take(asked, {budget.name: 0})

    assert (Verdict.LEAN, 4) == (outcome.verdict, outcome.output)
    assert [(Hold(request_id="r", hits=8 * 3 + 4 * 4),)] == StoredCounters(stored).holds("told", [budget])
