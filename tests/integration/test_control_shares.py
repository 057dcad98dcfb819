# SPDX-License-Identifier: Apache-2.0
"""Capacities of pools and weights of tenants as people set them, on a real Postgres."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from chassis.errors import Invalid, NotFound
from chassis.models import ModelCatalogue
from control import limits, shares, tenants
from control.act import OneTenant
from control.shares import Capacity
from control.store import Store
from tests.integration.test_control_limits import ACT, CATALOGUE


@pytest.fixture
def store(postgres_url: str) -> Iterator[Store]:
    """A store with one tenant, acme."""
    made = Store(postgres_url)
    tenants.create(made, ACT, "acme")
    yield made
    made.close()


def test_a_capacity_and_a_weight_are_what_explain_shows(store: Store) -> None:
    """For the model that is asked about, with this tenant's weight."""
    shares.put_capacity(store, ACT, Capacity(model="tiny", slots=8), catalogue=CATALOGUE)
    shares.put_capacity(store, ACT, Capacity(model="tiny", slots=16, tokens_per_second=5000), catalogue=CATALOGUE)
    shares.put_weight(store, ACT, "acme", 3)

    [slots, tokens] = limits.explain(store, ACT, tenant="acme", key_id=None, model="tiny")

    assert ("pool_slots", 16, "pool_tokens_per_second", 5000) == (slots["name"], slots["amount"], tokens["name"], tokens["amount"])
    assert "weight 3" in slots["when_reached"]
    assert [] == limits.explain(store, ACT, tenant="acme", key_id=None, model="other")


def test_without_a_weight_it_is_one_and_a_deleted_capacity_is_gone(store: Store) -> None:
    """And cannot be deleted twice."""
    shares.put_capacity(store, ACT, Capacity(model="tiny", slots=8), catalogue=CATALOGUE)

    shares.delete_capacity(store, ACT, "tiny")

    assert 1 == shares.weight(store, ACT, "acme")["weight"]
    assert [] == shares.list_capacities(store, ACT)
    with pytest.raises(NotFound, match="No capacity"):
        shares.delete_capacity(store, ACT, "tiny")


@pytest.mark.parametrize(
    ("capacity", "says"),
    [
        ({"model": "TINY", "slots": 1}, "not served"),
        ({"model": "tiny"}, "no capacity"),
        ({"model": "tiny", "slots": 0}, "from 1 to"),
        ({"model": "tiny", "slots": shares.SLOTS_MAX + 1}, "from 1 to"),
        ({"model": "tiny", "tokens_per_second": -1}, "from 1 to"),
        ({"model": "tiny", "tokens_per_second": shares.TOKENS_PER_SECOND_MAX + 1}, "from 1 to"),
    ],
)
def test_a_capacity_that_can_never_be_right_changes_nothing(store: Store, capacity: dict[str, Any], says: str) -> None:
    """One sentence."""
    with pytest.raises(Invalid, match=says):
        shares.put_capacity(store, ACT, Capacity(**capacity), catalogue=CATALOGUE)

    assert [] == shares.list_capacities(store, ACT)


@pytest.mark.parametrize("weight", [0, -1, shares.WEIGHT_MAX + 1])
def test_a_weight_out_of_range_changes_nothing(store: Store, weight: int) -> None:
    """Nobody can be starved by a weight of nothing."""
    with pytest.raises(Invalid, match="from 1 to"):
        shares.put_weight(store, ACT, "acme", weight)

    assert 1 == shares.weight(store, ACT, "acme")["weight"]


def test_a_capacity_of_a_model_that_is_served_no_more_is_found(store: Store) -> None:
    """By the checker that refuses what would silently do nothing."""
    shares.put_capacity(store, ACT, Capacity(model="tiny", slots=8), catalogue=CATALOGUE)
    other = ModelCatalogue.parse({"models": [{"name": "b", "engine": "openai", "endpoints": ["127.0.0.1:1"]}]}, source="test")

    assert [] == limits.findings(store, ACT, CATALOGUE)
    [finding] = limits.findings(store, ACT, other)
    assert "'tiny', which is not served" in finding


def test_a_tenant_sees_capacities_and_its_own_weight_and_sets_neither(store: Store, postgres_url: str) -> None:
    """By the database, whatever the code above it says."""
    tenants.create(store, ACT, "rival")
    shares.put_capacity(store, ACT, Capacity(model="tiny", slots=8), catalogue=CATALOGUE)
    shares.put_weight(store, ACT, "acme", 3)
    shares.put_weight(store, ACT, "rival", 5)

    with store.transaction(OneTenant("acme")) as connection:
        seen = connection.execute("select tenant_id, weight from tenant_weight").fetchall()
        capacities = connection.execute("select slots from pool_capacity").fetchall()
        assert 0 == connection.execute("update pool_capacity set slots = 900").rowcount
        assert 0 == connection.execute("delete from pool_capacity").rowcount

    assert [{"tenant_id": "acme", "weight": 3}] == seen
    assert [{"slots": 8}] == capacities
    with pytest.raises(psycopg.errors.InsufficientPrivilege), store.transaction(OneTenant("acme")) as connection:
        connection.execute("insert into pool_capacity values ('x', 1, null, now())")
