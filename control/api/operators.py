# SPDX-License-Identifier: Apache-2.0
"""Routes of operators."""

from __future__ import annotations

from typing import Any, Literal

import structlog
from fastapi import FastAPI

from control import operators
from control.api.access import CurrentAct, needs
from control.api.bodies import After, Body, Limit, page
from control.api.services import Services
from control.core.roles import Permission, Role
from control.store import PAGE_ROWS_MAX

log = structlog.get_logger()


class NewOperator(Body):
    """An operator to make; without a tenant, on all of them (an operator of a tenant: on its own)."""

    name: str
    role: Literal["platform-admin", "tenant-admin", "developer", "billing-reader", "billing-admin", "auditor"]
    tenant: str | None = None
    expires: str | None = None


def add(app: FastAPI, services: Services) -> None:
    """Add the routes to *app*."""
    store, mint = services.store, services.mint

    @app.post("/v1/operators", status_code=201, **needs(Permission.OPERATORS_WRITE))
    def create_operator(body: NewOperator, act: CurrentAct) -> dict[str, Any]:
        made = operators.create(
            store, act, mint, name=body.name, role=Role(body.role), tenant=body.tenant, expires=body.expires
        )
        log.info("operator_created", operator=made["operator_id"], role=made["role"], by=act.actor)
        return made

    @app.get("/v1/operators", **needs(Permission.OPERATORS_READ))
    def list_operators(act: CurrentAct, after: After = None, limit: Limit = PAGE_ROWS_MAX) -> dict[str, Any]:
        rows = operators.list_page(store, act, after=after, limit=limit)
        return page(rows, "operators", key="operator_id", limit=limit)

    @app.get("/v1/operators/{operator_id}", **needs(Permission.OPERATORS_READ))
    def get_operator(operator_id: str, act: CurrentAct) -> dict[str, Any]:
        return operators.find(store, act, operator_id)

    @app.post("/v1/operators/{operator_id}/revoke", **needs(Permission.OPERATORS_WRITE))
    def revoke_operator(operator_id: str, act: CurrentAct) -> dict[str, Any]:
        revoked = operators.revoke(store, act, operator_id)
        log.info("operator_revoked", operator=operator_id, by=act.actor)
        return revoked
