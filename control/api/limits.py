# SPDX-License-Identifier: Apache-2.0
"""Routes of limits."""

from __future__ import annotations

from typing import Any

import structlog
from fastapi import FastAPI

from control import limits
from control.api.access import CurrentAct, needs
from control.api.bodies import Body
from control.api.services import Services
from control.core.roles import Permission

log = structlog.get_logger()


class LimitChange(Body):
    """Numbers to set; null removes one, a missing one stays."""

    key_id: str | None = None
    model: str | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None


def add(app: FastAPI, services: Services) -> None:
    """Add the routes to *app*."""
    store = services.store

    @app.put("/v1/tenants/{tenant}/limits", **needs(Permission.LIMITS_WRITE))
    def put_limit(tenant: str, body: LimitChange, act: CurrentAct) -> dict[str, Any]:
        numbers = ("requests_per_minute", "tokens_per_minute")
        changes = {name: getattr(body, name) for name in numbers if name in body.model_fields_set}
        scope = limits.Scope(tenant=tenant, key_id=body.key_id, model=body.model)
        limit = limits.put(store, act, scope, changes, catalogue=services.catalogue())
        log.info("limit_set", tenant=limit["tenant_id"], limit_id=limit["limit_id"])
        return limit

    @app.get("/v1/tenants/{tenant}/limits", **needs(Permission.LIMITS_READ))
    def list_tenant_limits(tenant: str, act: CurrentAct) -> dict[str, Any]:
        return {"limits": limits.list_all(store, act, tenant)}

    @app.delete("/v1/tenants/{tenant}/limits", **needs(Permission.LIMITS_WRITE))
    def delete_limit(
        tenant: str, act: CurrentAct, key_id: str | None = None, model: str | None = None
    ) -> dict[str, Any]:
        gone = limits.delete(store, act, limits.Scope(tenant=tenant, key_id=key_id, model=model))
        log.info("limit_deleted", tenant=gone["tenant_id"], limit_id=gone["limit_id"])
        return gone

    @app.get("/v1/limits", **needs(Permission.LIMITS_READ))
    def list_limits(act: CurrentAct) -> dict[str, Any]:
        return {"limits": limits.list_all(store, act, None)}

    @app.get("/v1/limits/findings", **needs(Permission.LIMITS_CHECK))
    def limit_findings(act: CurrentAct) -> dict[str, Any]:
        return {"findings": limits.findings(store, act, services.catalogue())}
