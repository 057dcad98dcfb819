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
from ratelimit.core.decide import Outcome, Renewal
from ratelimit.core.demand import Demand, Kind
from ratelimit.core.usage import Report
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
