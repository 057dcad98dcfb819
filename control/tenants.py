# SPDX-License-Identifier: Apache-2.0
"""Tenants: make, list, suspend. A tenant's id is a slug of its first name and never changes."""

from __future__ import annotations

import re
from typing import Any, Literal

import psycopg

from chassis.errors import Conflict, Invalid, NotFound
from control import audit
from control.act import Act
from control.core import rights
from control.store import Connection, Store

State = Literal["active", "suspended"]

NAME_LENGTH_MAX = 100
_SLUG_LENGTH_MAX = 63
DEFAULT_PROJECT = "default"

_COLUMNS = "tenant_id, name, state, created_at"


def slug(name: str) -> str:
    """
    The id that *name* becomes; raises `Invalid` if nothing is left of it.

    >>> slug("Acme, Inc.")
    'acme-inc'
    """
    rights.name(name, what="A tenant's", length_max=NAME_LENGTH_MAX)
    found = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:_SLUG_LENGTH_MAX].strip("-")
    if not found:
        raise Invalid(f"The name {name!r} has no letter or digit to make an id of.")
    return found


def create(store: Store, act: Act, name: str) -> dict[str, Any]:
    """Make a tenant and its default project; `Conflict` if its id exists."""
    tenant_id = slug(name)
    try:
        with store.transaction(act.scope) as connection:
            tenant = connection.execute(
                f"insert into tenant (tenant_id, name, created_at) values (%s, %s, %s) returning {_COLUMNS}",
                (tenant_id, name, act.now),
            ).fetchone()
            connection.execute(
                "insert into project (tenant_id, project_id, created_at) values (%s, %s, %s)",
                (tenant_id, DEFAULT_PROJECT, act.now),
            )
            audit.append(connection, act, "tenant.created", tenant_id, tenant_id=tenant_id, after=tenant)
    except psycopg.errors.UniqueViolation as exc:
        raise Conflict(f"There is a tenant {tenant_id!r} already.", mend="Use it, or another name.") from exc
    assert tenant is not None
    return tenant


def list_page(store: Store, act: Act, *, after: str | None, limit: int) -> list[dict[str, Any]]:
    """Tenants by id, those after *after*."""
    with store.transaction(act.scope) as connection:
        return connection.execute(
            f"select {_COLUMNS} from tenant where tenant_id > coalesce(%(after)s, '') "
            "and (%(own)s::text is null or tenant_id = %(own)s) order by tenant_id limit %(limit)s",
            {"after": after, "own": act.tenant_id, "limit": limit},
        ).fetchall()


def find(store: Store, act: Act, tenant: str) -> dict[str, Any]:
    """The tenant with that id or that exact name; raises `NotFound`."""
    with store.transaction(act.scope) as connection:
        return resolve(connection, tenant)


def resolve(connection: Connection, tenant: str) -> dict[str, Any]:
    """The tenant with that id or that exact name, in a use case's own transaction; raises `NotFound`."""
    found = connection.execute(
        f"select {_COLUMNS} from tenant where tenant_id = %(it)s or name = %(it)s "
        "order by tenant_id <> %(it)s limit 1",
        {"it": tenant},
    ).fetchone()
    if found is None:
        raise NotFound(f"There is no tenant {tenant!r}.", mend="See `peaje tenants list`.")
    return found


def resolve_id(connection: Connection, tenant: str | None) -> str | None:
    """The id of *tenant*; None, for every tenant of the scope, stays None."""
    return None if tenant is None else resolve(connection, tenant)["tenant_id"]


def set_state(store: Store, act: Act, tenant: str, state: State) -> dict[str, Any]:
    """Suspend or activate a tenant; acts on its requests within a second."""
    with store.transaction(act.scope) as connection:
        before = connection.execute(
            f"select {_COLUMNS} from tenant where tenant_id = %s for update", (resolve(connection, tenant)["tenant_id"],)
        ).fetchone()
        assert before is not None
        after = connection.execute(
            f"update tenant set state = %s where tenant_id = %s returning {_COLUMNS}", (state, before["tenant_id"])
        ).fetchone()
        assert after is not None
        action = "tenant.suspended" if state == "suspended" else "tenant.activated"
        audit.append(connection, act, action, after["tenant_id"], tenant_id=after["tenant_id"], before=before, after=after)
    return after
