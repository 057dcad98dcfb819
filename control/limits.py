# SPDX-License-Identifier: Apache-2.0
"""Limits: set, show, delete. One per tenant, key and model; a change acts within a second."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from chassis.errors import Invalid, NotFound
from chassis.models import ModelCatalogue
from control import audit, keys, tenants
from control.act import Act
from control.store import Connection, Store

REQUESTS_MAX = 1_000_000_000
TOKENS_MAX = 1_000_000_000_000

_COLUMNS = "limit_id, tenant_id, key_id, model, requests_per_minute, tokens_per_minute, updated_at"
_UPSERT = f"""
insert into rate_limit (tenant_id, key_id, model, requests_per_minute, tokens_per_minute, updated_at)
values (%(tenant_id)s, %(key_id)s, %(model)s, %(rpm)s, %(tpm)s, %(now)s)
on conflict (tenant_id, key_id, model) do update set
    requests_per_minute = case when %(set_rpm)s then excluded.requests_per_minute else rate_limit.requests_per_minute end,
    tokens_per_minute   = case when %(set_tpm)s then excluded.tokens_per_minute   else rate_limit.tokens_per_minute   end,
    updated_at          = excluded.updated_at
returning {_COLUMNS}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """What a limit binds; None means any."""

    tenant: str
    key_id: str | None = None
    model: str | None = None


def put(
    store: Store, act: Act, scope: Scope, changes: dict[str, int | None], *, catalogue: ModelCatalogue
) -> dict[str, Any]:
    """
    Set the numbers in *changes* (`requests_per_minute`, `tokens_per_minute`; None removes one).

    Numbers not in *changes* stay. A limit without any number would be no limit: `Invalid`.
    """
    _refuse_bad_numbers(changes)
    if scope.model is not None:
        keys.refuse_unknown_models([scope.model], catalogue)
    with store.transaction(act.scope) as connection:
        row = _resolved(connection, scope)
        existing = connection.execute(
            f"select {_COLUMNS} from rate_limit "
            "where (tenant_id, key_id, model) is not distinct from (%(tenant_id)s, %(key_id)s::text, %(model)s::text) "
            "for update",
            row,
        ).fetchone()
        kept = {name: (existing or {}).get(name) for name in ("requests_per_minute", "tokens_per_minute")}
        if all(value is None for value in (kept | changes).values()):
            raise Invalid("That would leave no limit.", mend="Use `peaje limits delete`.")
        limit = connection.execute(
            _UPSERT,
            row
            | {
                "rpm": changes.get("requests_per_minute"), "set_rpm": "requests_per_minute" in changes,
                "tpm": changes.get("tokens_per_minute"), "set_tpm": "tokens_per_minute" in changes, "now": act.now,
            },
        ).fetchone()
        assert limit is not None
        audit.append(
            connection, act, "limit.set", str(limit["limit_id"]), tenant_id=limit["tenant_id"], before=existing,
            after=limit,
        )
    return limit


def list_all(store: Store, act: Act, tenant: str | None) -> list[dict[str, Any]]:
    """Limits of a tenant, or of all in scope if the caller says None."""
    with store.transaction(act.scope) as connection:
        return connection.execute(
            f"select {_COLUMNS} from rate_limit where %(it)s::text is null or tenant_id = %(it)s "
            "order by tenant_id, key_id nulls first, model nulls first",
            {"it": tenants.resolve_id(connection, tenant)},
        ).fetchall()


def delete(store: Store, act: Act, scope: Scope) -> dict[str, Any]:
    """Remove exactly the limit of *scope*; raises `NotFound`."""
    with store.transaction(act.scope) as connection:
        gone = connection.execute(
            "delete from rate_limit "
            "where (tenant_id, key_id, model) is not distinct from (%(tenant_id)s, %(key_id)s::text, %(model)s::text) "
            f"returning {_COLUMNS}",
            _resolved(connection, scope),
        ).fetchone()
        if gone is None:
            raise NotFound("There is no such limit.", mend="See `peaje limits show`.")
        audit.append(
            connection, act, "limit.deleted", str(gone["limit_id"]), tenant_id=gone["tenant_id"], before=gone
        )
    return gone


def findings(store: Store, act: Act, catalogue: ModelCatalogue) -> list[str]:
    """Limits that can never act: on a model that is not served (any more), or on a key that is over."""
    with store.transaction(act.scope) as connection:
        rows = connection.execute(
            "select l.tenant_id, l.key_id, l.model, k.revoked_at from rate_limit l left join api_key k using (key_id) "
            "order by l.limit_id"
        ).fetchall()
    found = []
    for row in rows:
        if row["model"] is not None and row["model"] not in catalogue.served:
            found.append(f"A limit of tenant {row['tenant_id']} is on model {row['model']!r}, which is not served.")
        if row["revoked_at"] is not None:
            found.append(f"A limit of tenant {row['tenant_id']} is on key {row['key_id']}, which is revoked.")
    return found


def _resolved(connection: Connection, scope: Scope) -> dict[str, Any]:
    tenant_id = tenants.resolve(connection, scope.tenant)["tenant_id"]
    if scope.key_id is not None and keys.resolve(connection, scope.key_id)["tenant_id"] != tenant_id:
        raise keys.no_such(scope.key_id)
    return {"tenant_id": tenant_id, "key_id": scope.key_id, "model": scope.model}


def _refuse_bad_numbers(changes: dict[str, int | None]) -> None:
    if not changes:
        raise Invalid("No limit is given.", mend="Give --rpm, --tpm, or both.")
    for name, most in (("requests_per_minute", REQUESTS_MAX), ("tokens_per_minute", TOKENS_MAX)):
        number = changes.get(name)
        if number is not None and not 0 <= number <= most:
            raise Invalid(f"{name} is {number}; it must be from 0 to {most}.", mend="0 stops all requests.")
