# SPDX-License-Identifier: Apache-2.0
"""Routes of tenants."""

from __future__ import annotations

from typing import Any, Literal

import structlog
from fastapi import FastAPI
from pydantic import Field

from control import tenants
from control.api.access import CurrentAct, needs
from control.api.bodies import After, Body, Limit, page
from control.api.services import Services
from control.core.roles import Permission
from control.store import PAGE_ROWS_MAX

log = structlog.get_logger()


class NewTenant(Body):
    """A tenant to make."""

    name: str = Field(max_length=tenants.NAME_LENGTH_MAX)


class TenantChange(Body):
    """What may change about a tenant."""

    state: Literal["active", "suspended"]


def add(app: FastAPI, services: Services) -> None:
    """Add the routes to *app*."""
    store = services.store

    @app.post("/v1/tenants", status_code=201, **needs(Permission.TENANTS_WRITE))
    def create_tenant(body: NewTenant, act: CurrentAct) -> dict[str, Any]:
        made = tenants.create(store, act, body.name)
        log.info("tenant_created", tenant=made["tenant_id"])
        return made

    @app.get("/v1/tenants", **needs(Permission.TENANTS_READ))
    def list_tenants(act: CurrentAct, after: After = None, limit: Limit = PAGE_ROWS_MAX) -> dict[str, Any]:
        rows = tenants.list_page(store, act, after=after, limit=limit)
        return page(rows, "tenants", key="tenant_id", limit=limit)

    @app.get("/v1/tenants/{tenant}", **needs(Permission.TENANTS_READ))
    def get_tenant(tenant: str, act: CurrentAct) -> dict[str, Any]:
        return tenants.find(store, act, tenant)

    @app.patch("/v1/tenants/{tenant}", **needs(Permission.TENANTS_WRITE))
    def change_tenant(tenant: str, body: TenantChange, act: CurrentAct) -> dict[str, Any]:
        changed = tenants.set_state(store, act, tenant, body.state)
        log.info("tenant_changed", tenant=changed["tenant_id"], state=body.state)
        return changed
