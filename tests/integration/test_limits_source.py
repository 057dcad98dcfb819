# SPDX-License-Identifier: Apache-2.0
"""What ratelimit reads of limits and prices: what changed when it changes, and everything now and then."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from chassis.stores.postgres import ReadPool, read_pool
from ratelimit.adapters import limits_source
from ratelimit.adapters.limits_source import LIMIT_CHANNEL, LimitsSource
from ratelimit.core.limits import OnStoreError

#: A change is pushed within milliseconds; the machine that runs the tests may be busy.
HEARD_SECONDS_MAX = 15.0


@pytest.fixture
def database(postgres_url: str) -> Iterator[psycopg.Connection[Any]]:
    """Three tenants of two limits each, one of them of a key."""
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        for tenant in ("acme", "bolt", "crux"):
            connection.execute("insert into tenant (tenant_id, name, created_at) values (%s, %s, now())", (tenant, tenant))
            connection.execute("insert into project (tenant_id, project_id, created_at) values (%s, 'default', now())", (tenant,))
            connection.execute(
                "insert into api_key (key_id, tenant_id, project_id, name, environment, key_hash, pepper_version, last_four, created_at) "
                "values (%s, %s, 'default', 'x', 'live', decode(repeat('00', 32), 'hex'), 1, 'abcd', now())",
                (f"key0000{tenant}0", tenant),
            )
            limit(connection, tenant, 10)
            limit(connection, tenant, 20, key_id=f"key0000{tenant}0")
        yield connection


@pytest.fixture
def pool(postgres_url: str) -> Iterator[ReadPool]:
    opened = read_pool(postgres_url, name="test", connections=1)
    opened.wait()
    yield opened
    opened.close()


def limit(connection: psycopg.Connection[Any], tenant: str, amount: int, **columns: Any) -> None:
    row = {"tenant_id": tenant, "unit": "requests", "period": "minute", "amount": amount} | columns
    names, holes = ", ".join(row), ", ".join(["%s"] * len(row))
    connection.execute(f"insert into rate_limit ({names}, updated_at) values ({holes}, now())", list(row.values()))  # type: ignore[call-overload]


def amounts(source: LimitsSource) -> dict[str, list[int]]:
    return {tenant: [one.amount for one in source.current.of(tenant)] for tenant in source.current.tenants}


def until(condition: Any) -> None:
    deadline = time.monotonic() + HEARD_SECONDS_MAX
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


@pytest.mark.parametrize("page", [1, 2, 3, 6, 100])
def test_pages_of_any_size_give_everything(
    database: psycopg.Connection[Any], pool: ReadPool, monkeypatch: pytest.MonkeyPatch, page: int
) -> None:
    """No tenant is read in part, none is left out."""
    monkeypatch.setattr(limits_source, "PAGE_LIMITS", page)

    source = LimitsSource(pool)

    assert {"acme": [10, 20], "bolt": [10, 20], "crux": [10, 20]} == amounts(source)
    assert frozenset({OnStoreError.LOCAL}) == source.modes


@pytest.mark.parametrize(("name", "tenant"), [("bolt", "bolt"), ("key0000bolt0", "bolt")])
def test_a_change_that_is_told_is_read_and_no_other(database: psycopg.Connection[Any], pool: ReadPool, name: str, tenant: str) -> None:
    """By the name of its tenant, or of the key that the limit is of."""
    source = LimitsSource(pool)
    database.execute("update rate_limit set amount = amount + 1, on_store_error = 'deny'")

    source.tell(LIMIT_CHANNEL, name)
    read = source.read_changed()

    assert tenant in read
    assert {"acme": [10, 20], "bolt": [11, 21], "crux": [10, 20]} == amounts(source)
    assert frozenset({OnStoreError.LOCAL, OnStoreError.DENY}) == source.modes
    assert frozenset() == source.read_changed()


def test_limits_that_are_gone_are_forgotten(database: psycopg.Connection[Any], pool: ReadPool) -> None:
    """Told of by name; and, of another tenant, found by reading everything."""
    source = LimitsSource(pool)
    database.execute("delete from rate_limit where tenant_id in ('acme', 'bolt')")
    source.tell(LIMIT_CHANNEL, "acme")

    source.read_changed()
    assert {"bolt": [10, 20], "crux": [10, 20]} == amounts(source)
    source.read_all(rest=0.0)

    assert {"crux": [10, 20]} == amounts(source)


def test_what_changes_while_everything_is_read_is_not_undone_by_it(
    database: psycopg.Connection[Any], pool: ReadPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tenant made behind the page, and one of a page that is over who has no limit any more."""
    monkeypatch.setattr(limits_source, "PAGE_LIMITS", 1)
    source = LimitsSource(pool)
    database.execute("insert into tenant (tenant_id, name, created_at) values ('aaa', 'aaa', now())")

    def between(_seconds: float) -> None:
        monkeypatch.undo()
        limit(database, "aaa", 7)
        database.execute("delete from rate_limit where tenant_id = 'acme'")
        source.tell(LIMIT_CHANNEL, "aaa")
        source.tell(LIMIT_CHANNEL, "acme")

    monkeypatch.setattr(limits_source.time, "sleep", between)
    source.read_all(rest=0.0)

    assert {"aaa": [7], "bolt": [10, 20], "crux": [10, 20]} == amounts(source)


@pytest.mark.parametrize("beyond", [0, 1])
def test_more_names_than_are_kept_mean_everything(database: psycopg.Connection[Any], pool: ReadPool, beyond: int) -> None:
    """A change of all tenants at once."""
    source = LimitsSource(pool)

    for number in range(limits_source.NAMES_MAX + beyond):
        source.tell(LIMIT_CHANNEL, f"t{number}")

    assert bool(beyond) == source._heard.is_all
    assert (0 if beyond else limits_source.NAMES_MAX) == len(source._heard.names())


def test_changes_are_in_force_as_they_are_pushed(database: psycopg.Connection[Any], pool: ReadPool, postgres_url: str) -> None:
    """Of a limit, of one that is deleted, of a weight, of a pool, and of a price when its time has come."""
    source = LimitsSource(pool)
    source.watch(postgres_url)

    database.execute("update rate_limit set amount = 11 where tenant_id = 'acme' and key_id is null")
    until(lambda: amounts(source)["acme"] == [11, 20])
    database.execute("delete from rate_limit where key_id = 'key0000bolt0'")
    until(lambda: amounts(source)["bolt"] == [10])
    database.execute("insert into pool_capacity (model, slots, updated_at) values ('m', 3, now())")
    database.execute("insert into tenant_weight (tenant_id, weight, updated_at) values ('crux', 5, now())")
    until(lambda: (share := source.share(model="m", tenant_id="crux")) is not None and share.weight == 5)
    database.execute(
        "insert into rate_card (model, currency, input_nano, output_nano, cached_nano, reasoning_nano, effective, created_at) "
        "values ('m', 'USD', 1, 1, 1, 1, tstzrange(now() + interval '1 second', null), now())"
    )
    until(lambda: source.price(model="m", tenant_id="crux") is not None)
