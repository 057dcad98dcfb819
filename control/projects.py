# SPDX-License-Identifier: Apache-2.0
"""Projects: what a tenant divides its keys by. Its id is a slug of its first name; policies read its labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import psycopg
from psycopg.types.json import Jsonb

from chassis.errors import Conflict, Invalid, NotFound
from control import audit, tenants
from control.act import Act
from control.core import rights
from control.store import Connection, Store

State = Literal["active", "suspended"]

NAME_LENGTH_MAX = 100

_COLUMNS = "tenant_id, project_id, name, state, labels, created_at"


def create(store: Store, act: Act, tenant: str, *, name: str, labels: Mapping[str, str]) -> dict[str, Any]:
    """Make a project; `Conflict` if the tenant has one of that id."""
    project_id = tenants.slug(rights.name(name, what="A project's", length_max=NAME_LENGTH_MAX))
    checked = rights.labels(labels)
    with store.transaction(act.scope) as connection:
        tenant_id = tenants.resolve(connection, tenant)["tenant_id"]
        try:
            with connection.transaction():
                made = connection.execute(
                    "insert into project (tenant_id, project_id, name, labels, created_at) "
                    f"values (%s, %s, %s, %s, %s) returning {_COLUMNS}",
                    (tenant_id, project_id, name, Jsonb(checked), act.now),
                ).fetchone()
        except psycopg.errors.UniqueViolation as exc:
            raise Conflict(f"There is a project {project_id!r} already.", mend="Use it, or another name.") from exc
        assert made is not None
        audit.append(connection, act, "project.created", f"{tenant_id}/{project_id}", tenant_id=tenant_id, after=made)
    return made


def list_page(store: Store, act: Act, tenant: str, *, after: str | None, limit: int) -> list[dict[str, Any]]:
    """Projects of a tenant by id, those after *after*."""
    with store.transaction(act.scope) as connection:
        tenant_id = tenants.resolve(connection, tenant)["tenant_id"]
        return connection.execute(
            f"select {_COLUMNS} from project where tenant_id = %s and project_id > coalesce(%s, '') "
            "order by project_id limit %s",
            (tenant_id, after, limit),
        ).fetchall()


def find(store: Store, act: Act, tenant: str, project: str) -> dict[str, Any]:
    """One project of a tenant; raises `NotFound`."""
    with store.transaction(act.scope) as connection:
        return resolve(connection, tenants.resolve(connection, tenant)["tenant_id"], project)


def resolve(connection: Connection, tenant_id: str, project: str) -> dict[str, Any]:
    """The project with that id, in a use case's own transaction; raises `NotFound`."""
    found = connection.execute(
        f"select {_COLUMNS} from project where tenant_id = %s and project_id = %s", (tenant_id, project)
    ).fetchone()
    if found is None:
        raise NotFound(f"Tenant {tenant_id!r} has no project {project!r}.", mend="See `peaje projects list`.")
    return found


def change(
    store: Store, act: Act, tenant: str, project: str, *, state: State | None, labels: Mapping[str, str] | None
) -> dict[str, Any]:
    """Suspend or activate a project, or replace its labels; what is None stays. Acts within a second."""
    if state is None and labels is None:
        raise Invalid("Nothing is to be changed.", mend="Give a state, labels, or both.")
    checked = None if labels is None else Jsonb(rights.labels(labels))
    with store.transaction(act.scope) as connection:
        tenant_id = tenants.resolve(connection, tenant)["tenant_id"]
        connection.execute(
            "select from project where tenant_id = %s and project_id = %s for update", (tenant_id, project)
        )
        before = resolve(connection, tenant_id, project)
        after = connection.execute(
            "update project set state = coalesce(%s, state), labels = coalesce(%s, labels) "
            f"where tenant_id = %s and project_id = %s returning {_COLUMNS}",
            (state, checked, before["tenant_id"], before["project_id"]),
        ).fetchone()
        assert after is not None
        audit.append(
            connection, act, "project.changed", f"{after['tenant_id']}/{after['project_id']}",
            tenant_id=after["tenant_id"], before=before, after=after,
        )
    return after
