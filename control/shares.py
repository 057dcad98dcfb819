# SPDX-License-Identifier: Apache-2.0
"""
Fair shares: what a pool of model servers can take, and each tenant's weight in it.

Once a pool is full, its tenants have it in parts by weight; before that nobody is held back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from chassis.errors import Invalid, NotFound
from chassis.models import ModelCatalogue
from control import audit, keys, tenants
from control.act import Act
from control.store import Connection, Store

SLOTS_MAX: Final = 1_000_000
TOKENS_PER_SECOND_MAX: Final = 1_000_000_000
WEIGHT_MAX: Final = 1000
WEIGHT_DEFAULT: Final = 1

_CAPACITY = "model, slots, tokens_per_second, updated_at"


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """What the servers behind a model can take; None leaves it open."""

    model: str
    #: Requests under way.
    slots: int | None = None
    tokens_per_second: int | None = None


def put_capacity(store: Store, act: Act, capacity: Capacity, *, catalogue: ModelCatalogue) -> dict[str, Any]:
    """Set a pool's capacity, both numbers at once; raises `Invalid`."""
    keys.refuse_unknown_models([capacity.model], catalogue)
    _refuse_out_of_range("slots", capacity.slots, SLOTS_MAX)
    _refuse_out_of_range("tokens_per_second", capacity.tokens_per_second, TOKENS_PER_SECOND_MAX)
    if capacity.slots is None and capacity.tokens_per_second is None:
        raise Invalid("That would be no capacity.", mend="Use `peaje limits capacity delete`.")
    with store.transaction(act.scope) as connection:
        before = _capacity(connection, capacity.model)
        after = connection.execute(
            "insert into pool_capacity (model, slots, tokens_per_second, updated_at) values (%s, %s, %s, %s) "
            "on conflict (model) do update set slots = excluded.slots, tokens_per_second = excluded.tokens_per_second, "
            f"updated_at = excluded.updated_at returning {_CAPACITY}",
            (capacity.model, capacity.slots, capacity.tokens_per_second, act.now),
        ).fetchone()
        assert after is not None
        audit.append(connection, act, "capacity.set", capacity.model, tenant_id=None, before=before, after=after)
    return after


def list_capacities(store: Store, act: Act) -> list[dict[str, Any]]:
    """All pools with a capacity, by model."""
    with store.transaction(act.scope) as connection:
        return connection.execute(f"select {_CAPACITY} from pool_capacity order by model").fetchall()


def delete_capacity(store: Store, act: Act, model: str) -> dict[str, Any]:
    """Share a pool no more: whoever comes first is served; raises `NotFound`."""
    with store.transaction(act.scope) as connection:
        gone = connection.execute(f"delete from pool_capacity where model = %s returning {_CAPACITY}", (model,)).fetchone()
        if gone is None:
            raise NotFound(f"No capacity is set for model {model!r}.", mend="See `peaje limits capacity show`.")
        audit.append(connection, act, "capacity.deleted", model, tenant_id=None, before=gone)
    return gone


def put_weight(store: Store, act: Act, tenant: str, weight: int) -> dict[str, Any]:
    """Set a tenant's weight in all pools; raises `Invalid` or `NotFound`."""
    _refuse_out_of_range("weight", weight, WEIGHT_MAX)
    with store.transaction(act.scope) as connection:
        tenant_id = tenants.resolve(connection, tenant)["tenant_id"]
        before = {"tenant_id": tenant_id, "weight": _weight(connection, tenant_id)}
        connection.execute(
            "insert into tenant_weight (tenant_id, weight, updated_at) values (%s, %s, %s) "
            "on conflict (tenant_id) do update set weight = excluded.weight, updated_at = excluded.updated_at",
            (tenant_id, weight, act.now),
        )
        after = {"tenant_id": tenant_id, "weight": weight}
        audit.append(connection, act, "weight.set", tenant_id, tenant_id=tenant_id, before=before, after=after)
    return after


def weight(store: Store, act: Act, tenant: str) -> dict[str, Any]:
    """A tenant's weight; raises `NotFound`."""
    with store.transaction(act.scope) as connection:
        tenant_id = tenants.resolve(connection, tenant)["tenant_id"]
        return {"tenant_id": tenant_id, "weight": _weight(connection, tenant_id)}


def explain(connection: Connection, tenant_id: str, model: str | None) -> list[dict[str, Any]]:
    """The shares that a request of *tenant_id* would meet, as `limits explain` shows them; None means any model."""
    weight_ = _weight(connection, tenant_id)
    found = connection.execute(
        f"select {_CAPACITY} from pool_capacity where %(it)s::text is null or model = %(it)s order by model", {"it": model}
    ).fetchall()
    return [
        {
            "limit_id": None, "name": f"pool_{name}", "amount": row[name], "binds": f"all tenants of model {row['model']}",
            "when_reached": f"refuses a tenant that is above its share (weight {weight_})", "when_store_is_away": "local",
        }
        for row in found
        for name in ("slots", "tokens_per_second")
        if row[name] is not None
    ]  # fmt: skip


def findings(connection: Connection, catalogue: ModelCatalogue) -> list[str]:
    """Capacities that can never act: of models that are not served."""
    models = [row["model"] for row in connection.execute("select model from pool_capacity order by model").fetchall()]
    return [f"A capacity is set for model {model!r}, which is not served." for model in models if model not in catalogue.served]


def _capacity(connection: Connection, model: str) -> dict[str, Any] | None:
    return connection.execute(f"select {_CAPACITY} from pool_capacity where model = %s for update", (model,)).fetchone()


def _weight(connection: Connection, tenant_id: str) -> int:
    row = connection.execute("select weight from tenant_weight where tenant_id = %s", (tenant_id,)).fetchone()
    return WEIGHT_DEFAULT if row is None else int(row["weight"])


def _refuse_out_of_range(name: str, value: int | None, most: int) -> None:
    if value is not None and not 1 <= value <= most:
        raise Invalid(f"{name} is {value}; it must be a whole number from 1 to {most}.")
