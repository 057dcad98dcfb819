# SPDX-License-Identifier: Apache-2.0
"""Usage that was posted counts for quotas, once, whoever has it first."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest
import redis

from chassis.stores.postgres import read_pool
from ratelimit.adapters.counters import StoredCounters, connect
from ratelimit.adapters.limits_source import LimitsSource
from ratelimit.adapters.outside import LATELY, Outside
from ratelimit.core.demand import demand
from ratelimit.core.estimate import Estimates
from ratelimit.core.limits import Ask
from ratelimit.core.usage import Report

NOW = datetime.now(UTC)
TENANT = "outside"


class World:
    """A tenant with a monthly quota of 1000 tokens, a ledger and a store."""

    def __init__(self, url: str, store: redis.Redis) -> None:
        self.url, self.store = url, store
        store.delete(*store.keys(f"peaje:{{{TENANT}}}:*") or ["none"])
        self.execute("insert into tenant (tenant_id, name, created_at) values (%s, 'x', now())", TENANT)
        self.execute(
            "insert into rate_limit (tenant_id, unit, period, amount, updated_at) values (%s, 'tokens', 'calendar_month', 1000, now()), "
            "(%s, 'tokens', 'minute', 1000, now())",
            TENANT, TENANT,
        )
        self.pool = read_pool(url, name="test", connections=1)
        self.limits = LimitsSource(self.pool)
        self.stored = StoredCounters(store)
        self.outside = Outside(self.stored, self.pool, self.limits.current.of, self.limits.spent)

    def execute(self, query: str, *arguments: object) -> None:
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(query.encode(), arguments)

    def ledger(self, tokens: int, *, posted: bool) -> None:
        """Add to the ledger's hour, and say that it was posted if it was."""
        self.execute(
            "insert into usage_hour (hour, tenant_id, project_id, key_id, model, request_count, input_tokens, output_tokens, "
            "cached_tokens, reasoning_tokens) values (date_trunc('hour', %s, 'UTC'), %s, 'default', 'k', 'm', 1, %s, 0, 0, 0) "
            "on conflict (hour, tenant_id, project_id, key_id, model, currency, meter) do update set "
            "input_tokens = usage_hour.input_tokens + excluded.input_tokens",
            NOW, TENANT, tokens,
        )
        if posted:
            self.execute(
                "insert into external_usage values (gen_random_uuid()::text, %s, gen_random_uuid()::text, 'op', %s)", TENANT, NOW
            )

    def request(self, name: str, tokens: int) -> bool:
        """One that passes by, and is settled; whether it was admitted."""
        ask = Ask(
            request_id=name, tenant_id=TENANT, project_id="default", key_id="k", model="m", dialect="openai.chat", prompt_bytes=1,
            output_tokens_max=10, choices=1,
        )
        asked = demand(ask, self.limits.current.match(ask), estimates=Estimates(), price=None, output_cap=10, now=NOW)
        seeds = {it.name: self.limits.spent(it) for it in asked.counters if it.ends_us}
        admitted = self.stored.take(asked, seeds).admitted
        self.stored.settle(tenant_id=TENANT, request_id=name, report=Report(input=tokens, output=0))
        return admitted

    @property
    def used(self) -> list[int]:
        """What the store has of the quota; nothing if it does not know it."""
        found: list[Any] = self.store.keys(f"peaje:{{{TENANT}}}:*:*-*")
        names = [name for name in found if not name.endswith(b":held")]
        return [int(self.store.hget(name, "used") or 0) for name in names]


@pytest.fixture
def world(postgres_url: str, counter_store: str) -> Iterator[World]:
    made = World(postgres_url, connect(counter_store, cluster=False))
    yield made
    made.pool.close()
    made.store.close()


def test_what_was_posted_is_in_the_quota_once_however_often_it_is_looked_at(world: World) -> None:
    """Beside what passed by and is, or is not yet, in the ledger."""
    assert world.request("one", 100)
    world.ledger(100, posted=False)
    world.ledger(700, posted=True)
    looks = [world.outside.run(NOW) for _ in range(3)]
    after = world.used
    assert world.request("two", 150)
    # The ledger has not heard of the second one yet: nothing is taken back.
    world.outside.run(NOW)

    assert ([1, 0, 0], [800], [950]) == (looks, after, world.used)
    world.ledger(150, posted=False)
    assert 0 == world.outside.run(NOW)
    world.ledger(50, posted=True)
    world.outside.run(NOW)
    assert [1000] == world.used and not world.request("three", 1)


def test_a_quota_that_the_store_does_not_know_is_left_to_its_seed(world: World) -> None:
    """Which has what was posted in it: not twice."""
    world.ledger(300, posted=True)

    assert (0, []) == (world.outside.run(NOW), world.used)
    assert world.request("one", 10)
    assert 0 == world.outside.run(NOW)
    assert [310] == world.used


def test_tenants_for_whom_nothing_was_posted_lately_are_not_looked_at(world: World) -> None:
    """Their store has everything that passed."""
    world.request("one", 10)
    world.ledger(500, posted=False)
    assert 0 == world.outside.run(NOW)
    world.ledger(0, posted=True)
    assert 0 == world.outside.run(NOW + LATELY)
    assert [10] == world.used
