# SPDX-License-Identifier: Apache-2.0
"""Limits as people set them, on a real Postgres."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

from chassis.errors import Invalid, NotFound
from chassis.models import ModelCatalogue
from chassis.schema import migrate as migrate_module
from chassis.schema.migrate import migrate
from control import keys, limits, prices, tenants
from control.act import ALL_TENANTS, Act
from control.limits import Manner, Scope
from control.minting import Mint
from control.store import Store

NOW = datetime(2026, 11, 25, 12, tzinfo=UTC)
ACT = Act(actor="test", scope=ALL_TENANTS, request_id="r", now=NOW)
MINT = Mint(peppers={1: b"p" * 32}, random_bytes=os.urandom)
CATALOGUE = ModelCatalogue.parse(
    {"models": [{"name": "tiny", "engine": "openai", "endpoints": ["127.0.0.1:1"]}]}, source="test"
)
ACME = Scope(tenant="acme")


@pytest.fixture
def store(postgres_url: str) -> Iterator[Store]:
    """A store with one tenant, acme."""
    made = Store(postgres_url)
    tenants.create(made, ACT, "acme")
    yield made
    made.close()


_MANNER = Manner()


def put(store: Store, scope: Scope = ACME, manner: Manner = _MANNER, **changes: Any) -> dict[str, Any]:
    return limits.put(store, ACT, scope, changes, manner=manner, catalogue=CATALOGUE)


def key_of_acme(store: Store) -> str:
    return str(keys.create(store, ACT, MINT, "acme", keys.NewKey(), catalogue=CATALOGUE)["key_id"])


def test_numbers_that_are_not_named_stay_and_none_removes_one(store: Store) -> None:
    """A change says what changes."""
    put(store, requests_per_minute=10, tokens_per_minute=1000)
    put(store, concurrency=3, tokens_per_minute=None)

    [scope] = limits.list_all(store, ACT, "acme")

    assert (10, None, 3) == (scope["requests_per_minute"], scope["tokens_per_minute"], scope["concurrency"])
    assert {"requests_per_minute", "concurrency"} == set(scope["limits"])


@pytest.mark.parametrize("amount", ["100.00", "0.000000001", "9000000.00", "0.00"])
def test_money_is_kept_to_the_nano_unit(store: Store, amount: str) -> None:
    """What was written is what is shown."""
    made = put(store, monthly_budget=amount)

    assert amount == made["monthly_budget"]
    assert "USD" == made["limits"]["monthly_budget"]["currency"]


@pytest.mark.parametrize(
    ("changes", "manner", "says"),
    [
        ({}, Manner(), "No limit is given"),
        ({"requests_per_minute": -1}, Manner(), "from 0 to"),
        ({"requests_per_minute": limits.REQUESTS_MAX + 1}, Manner(), "from 0 to"),
        ({"tokens_per_minute": "5"}, Manner(), "whole number"),
        ({"requests_per_fortnight": 1}, Manner(), "no limit called"),
        ({"monthly_budget": "much"}, Manner(), "amount of money"),
        ({"monthly_budget": "NaN"}, Manner(), "with at most nine decimals"),
        ({"monthly_budget": "-0.01"}, Manner(), "from 0 to"),
        ({"monthly_budget": "0.0000000001"}, Manner(), "nine decimals"),
        ({"monthly_budget": "9000000.01"}, Manner(), "from 0 to"),
        ({"monthly_budget": "1"}, Manner(currency="usd"), "three capital letters"),
        ({"monthly_tokens": 5}, Manner(currency="USD"), "belongs to a budget"),
        ({"monthly_tokens": 5}, Manner(burst=5), "burst belongs"),
        ({"requests_per_minute": 5}, Manner(burst=0), "from 1 to"),
        ({"requests_per_minute": None}, Manner(), "no limit"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_limit_that_can_never_be_right_is_refused_and_changes_nothing(
    store: Store, changes: dict[str, Any], manner: Manner, says: str
) -> None:
    """In one sentence that says what would be right."""
    with pytest.raises(Invalid, match=says):
        limits.put(store, ACT, ACME, changes, manner=manner, catalogue=CATALOGUE)

    assert [] == limits.list_all(store, ACT, "acme")


@pytest.mark.parametrize(
    ("wide", "narrow", "manner"),
    [
        ({"requests_per_second": 1}, {"requests_per_minute": 60}, Manner()),
        ({"requests_per_minute": 60}, {"requests_per_hour": 3600}, Manner()),
        ({"monthly_tokens": 100}, {"daily_tokens": 100}, Manner()),
    ],
)
def test_a_limit_in_another_one_s_shadow_is_refused(
    store: Store, wide: dict[str, int], narrow: dict[str, int], manner: Manner
) -> None:
    """It could never bind; what would bind is accepted."""
    put(store, **wide)

    with pytest.raises(Invalid, match="can never bind"):
        put(store, manner=manner, **narrow)

    assert 1 == len(limits.list_all(store, ACT, "acme")[0]["limits"])
    put(store, **{name: amount - 1 for name, amount in narrow.items()})


def test_a_key_s_limit_above_its_tenant_s_is_refused_and_below_it_is_not(store: Store) -> None:
    """The same number for all of a tenant's keys together is always reached first."""
    key_id = key_of_acme(store)
    put(store, requests_per_minute=50)

    with pytest.raises(Invalid, match=f"key {key_id} can never bind"):
        put(store, Scope(tenant="acme", key_id=key_id), requests_per_minute=50)

    put(store, Scope(tenant="acme", key_id=key_id), requests_per_minute=49)


def test_a_tenant_s_limit_that_makes_a_key_s_pointless_is_found(store: Store) -> None:
    """Lowering the wide one is allowed; `check` says what became of the narrow one."""
    key_id = key_of_acme(store)
    put(store, Scope(tenant="acme", key_id=key_id), requests_per_minute=49)
    assert [] == limits.findings(store, ACT, CATALOGUE)

    put(store, requests_per_minute=10)

    [finding] = limits.findings(store, ACT, CATALOGUE)
    assert "can never bind" in finding


def test_a_limit_on_what_is_served_no_more_or_revoked_is_found(store: Store) -> None:
    """It was right when it was set, and can never act again."""
    key_id = key_of_acme(store)
    put(store, Scope(tenant="acme", model="tiny"), requests_per_minute=5)
    put(store, Scope(tenant="acme", key_id=key_id), requests_per_minute=4)
    keys.revoke(store, ACT, key_id)
    other = ModelCatalogue.parse({"models": [{"name": "b", "engine": "openai", "endpoints": ["127.0.0.1:1"]}]}, source="test")

    [on_model, on_key] = sorted(limits.findings(store, ACT, other), key=lambda finding: "is revoked" in finding)

    assert "model 'tiny', which is not served" in on_model
    assert f"key {key_id}, which is revoked" in on_key


def test_a_budget_in_a_currency_without_a_price_is_found(store: Store) -> None:
    """Nothing would ever use it up, and whoever set it would believe that it holds."""
    put(store, Scope(tenant="acme"), Manner(currency="EUR"), monthly_budget="10.00")

    [finding] = limits.findings(store, ACT, CATALOGUE)
    assert "monthly_budget of tenant acme is in EUR" in finding
    prices.put(store, ACT, prices.Price(model="tiny", input="1", output="1"), catalogue=CATALOGUE, clock=lambda: NOW)
    assert [finding] == limits.findings(store, ACT, CATALOGUE)
    prices.put(store, ACT, prices.Price(model="tiny", input="1", output="1", currency="EUR", tenant="acme"), catalogue=CATALOGUE, clock=lambda: NOW)
    assert [] == limits.findings(store, ACT, CATALOGUE)


def test_scopes_that_do_not_exist_are_refused(store: Store) -> None:
    """A model nobody serves, a project or key of nobody, a key with another project."""
    key_id = key_of_acme(store)
    tenants.create(store, ACT, "other")
    with store.transaction(ALL_TENANTS) as connection:
        connection.execute("insert into project (tenant_id, project_id, created_at) values ('acme', 'elsewhere', now())")

    with pytest.raises(Invalid, match="not served"):
        put(store, Scope(tenant="acme", model="TINY"), requests_per_minute=1)
    with pytest.raises(NotFound):
        put(store, Scope(tenant="acme", project_id="nowhere"), requests_per_minute=1)
    with pytest.raises(NotFound):
        put(store, Scope(tenant="other", key_id=key_id), requests_per_minute=1)
    with pytest.raises(Invalid, match="never bind"):
        put(store, Scope(tenant="acme", key_id=key_id, project_id="elsewhere"), requests_per_minute=1)

    assert [] == limits.list_all(store, ACT, None)


def test_explain_says_what_a_request_would_meet(store: Store) -> None:
    """Only the limits that match, and what each does."""
    key_id = key_of_acme(store)
    put(store, requests_per_minute=50)
    put(store, Scope(tenant="acme", model="tiny"), Manner(effect="shadow"), concurrency=2)
    put(store, Scope(tenant="acme", project_id="default"), monthly_budget="5.00")

    found = limits.explain(store, ACT, tenant="acme", key_id=key_id, model="other")

    assert [("requests_per_minute", "tenant"), ("monthly_budget", "project default")] == [
        (limit["name"], limit["binds"]) for limit in found
    ]


def test_a_rotated_key_keeps_its_limits(store: Store) -> None:
    """All of them, with their manner."""
    key_id = key_of_acme(store)
    put(store, Scope(tenant="acme", key_id=key_id), Manner(burst=7, on_store_error="deny"), requests_per_minute=5)

    made = keys.rotate(store, ACT, MINT, key_id, overlap=timedelta(hours=1))

    both = {scope["key_id"]: scope["limits"]["requests_per_minute"] for scope in limits.list_all(store, ACT, "acme")}
    assert {key_id, made["key_id"]} == set(both)
    assert (5, 7, "deny") == tuple(both[made["key_id"]][name] for name in ("amount", "burst", "on_store_error"))


def test_the_migration_keeps_limits_that_were_set_before(empty_database: Callable[[], str]) -> None:
    """One row with two numbers becomes two rows with one."""
    url = empty_database()
    versions = Path(migrate_module.__file__).parent / "versions"
    with psycopg.connect(url, autocommit=True) as connection:
        for name in ("0001_road.sql", "0002_identity.sql"):
            connection.execute((versions / name).read_text())  # type: ignore[call-overload]
        connection.execute("create table alembic_version (version_num varchar(32) primary key)")
        connection.execute("insert into alembic_version values ('0002')")
        connection.execute("insert into tenant values ('t', 't', 'active', now())")
        connection.execute("insert into rate_limit (tenant_id, requests_per_minute, tokens_per_minute, updated_at) values ('t', 5, 600, now())")
    migrate(url, NOW.date())

    with psycopg.connect(url) as connection:
        rows = connection.execute("select unit, period, amount from rate_limit order by unit").fetchall()
    assert [("requests", "minute", 5), ("tokens", "minute", 600)] == rows
