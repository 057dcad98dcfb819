# SPDX-License-Identifier: Apache-2.0
"""Whoever stays below the limit is served: the scripts in a real store, in simulated time."""

from __future__ import annotations

from random import Random

from ratelimit.adapters.counters import connect
from ratelimit.core.decide import Outcome
from ratelimit.core.demand import Demand, Kind
from ratelimit.core.limits import Limit, Period, Unit
from ratelimit.core.usage import Report
from tests.integration.stores import PATIENCE_SECONDS
from tests.integration.test_counters import set_clock, with_clock
from tests.ratelimit_model.traffic import agents, play, steady


def test_the_scripts_refuse_nobody_who_could_pass(counter_store: str) -> None:
    """At nine tenths of a rate, with the bursts of coding agents on top, and a quota that is far away."""
    store = connect(counter_store, cluster=False, timeout_seconds=PATIENCE_SECONDS)
    stored = with_clock(store)
    limits = [
        Limit(limit_id=1, tenant_id="steady", unit=Unit.TOKENS, period=Period.MINUTE, amount=600_000),
        Limit(limit_id=2, tenant_id="steady", unit=Unit.TOKENS, period=Period.CALENDAR_MONTH, amount=5_000_000),
    ]
    offers = [*steady(Random(6), count=900, tokens_per_minute=500_000), *agents(Random(7), bursts=6, at_once=20)]

    def take(asked: Demand, now_us: int) -> Outcome:
        set_clock(store, now_us)
        return stored.take(asked, {c.name: 0 for c in asked.counters if c.kind is Kind.QUOTA})

    def settle(asked: Demand, report: Report, now_us: int) -> bool:
        set_clock(store, now_us)
        return stored.settle(tenant_id=asked.tenant_id, request_id=asked.request_id, report=report) is not None

    played = play(offers, limits, take=take, settle=settle)

    assert 10_000 * played.refused_falsely <= played.offered
    assert played.refused_by_flat_hold > 0
    assert played.used > 1_000_000
