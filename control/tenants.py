# SPDX-License-Identifier: Apache-2.0
"""Tenants: make, list, suspend. A tenant's id is a slug of its first name and never changes."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Any, Literal

import psycopg

from chassis.errors import Conflict, Invalid, NotFound
from control.store import Store

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
    if not 1 <= len(name) <= NAME_LENGTH_MAX or not name.isprintable():
        raise Invalid(f"A tenant's name has 1 to {NAME_LENGTH_MAX} printable characters.")
    found = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:_SLUG_LENGTH_MAX].strip("-")
    if not found:
        raise Invalid(f"The name {name!r} has no letter or digit to make an id of.")
    return found


def create(store: Store, name: str, *, now: datetime) -> dict[str, Any]:
    """Make a tenant and its default project; `Conflict` if its id exists."""
    tenant_id = slug(name)
    try:
        with store.transaction() as connection:
            tenant = connection.execute(
                f"insert into tenant (tenant_id, name, created_at) values (%s, %s, %s) returning {_COLUMNS}",
                (tenant_id, name, now),
            ).fetchone()
            connection.execute(
                "insert into project (tenant_id, project_id, created_at) values (%s, %s, %s)",
                (tenant_id, DEFAULT_PROJECT, now),
            )
    except psycopg.errors.UniqueViolation as exc:
        raise Conflict(f"There is a tenant {tenant_id!r} already.", mend="Use it, or another name.") from exc
    assert tenant is not None
    return tenant


def list_all(store: Store) -> list[dict[str, Any]]:
    """All tenants, by id."""
    with store.transaction() as connection:
        return connection.execute(f"select {_COLUMNS} from tenant order by tenant_id").fetchall()


def find(store: Store, tenant: str) -> dict[str, Any]:
    """The tenant with that id or that exact name; raises `NotFound`."""
    with store.transaction() as connection:
        found = connection.execute(
            f"select {_COLUMNS} from tenant where tenant_id = %(it)s or name = %(it)s "
            "order by tenant_id <> %(it)s limit 1",
            {"it": tenant},
        ).fetchone()
    if found is None:
        raise NotFound(f"There is no tenant {tenant!r}.", mend="See `peaje tenants list`.")
    return found


def set_state(store: Store, tenant: str, state: State) -> dict[str, Any]:
    """Suspend or activate a tenant; acts on its requests within a second."""
    tenant_id = find(store, tenant)["tenant_id"]
    with store.transaction() as connection:
        changed = connection.execute(
            f"update tenant set state = %s where tenant_id = %s returning {_COLUMNS}", (state, tenant_id)
        ).fetchone()
    assert changed is not None
    return changed
