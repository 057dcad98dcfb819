# SPDX-License-Identifier: Apache-2.0
"""Routes of fair shares: capacities of pools, weights of tenants."""

from __future__ import annotations

from typing import Any

import structlog
from fastapi import FastAPI

from control import shares
from control.api.access import CurrentAct, needs
from control.api.bodies import Body
from control.api.services import Services
from control.core.roles import Permission

log = structlog.get_logger()


class NewCapacity(Body):
    """What the servers behind a model can take."""

    model: str
    slots: int | None = None
    tokens_per_second: int | None = None


class NewWeight(Body):
    """A tenant's weight among the others."""

    weight: int


def add(app: FastAPI, services: Services) -> None:
    """Add the routes to *app*."""
    store = services.store

    @app.put("/v1/capacities", **needs(Permission.LIMITS_WRITE))
    def put_capacity(body: NewCapacity, act: CurrentAct) -> dict[str, Any]:
        made = shares.put_capacity(store, act, shares.Capacity(**body.model_dump()), catalogue=services.catalogue())
        log.info("capacity_set", model=made["model"])
        return made

    @app.get("/v1/capacities", **needs(Permission.LIMITS_READ))
    def list_capacities(act: CurrentAct) -> dict[str, Any]:
        return {"capacities": shares.list_capacities(store, act)}

    @app.delete("/v1/capacities", **needs(Permission.LIMITS_WRITE))
    def delete_capacity(model: str, act: CurrentAct) -> dict[str, Any]:
        gone = shares.delete_capacity(store, act, model)
        log.info("capacity_deleted", model=gone["model"])
        return gone

    @app.put("/v1/tenants/{tenant}/weight", **needs(Permission.LIMITS_WRITE))
    def put_weight(tenant: str, body: NewWeight, act: CurrentAct) -> dict[str, Any]:
        made = shares.put_weight(store, act, tenant, body.weight)
        log.info("weight_set", tenant=made["tenant_id"], weight=made["weight"])
        return made

    @app.get("/v1/tenants/{tenant}/weight", **needs(Permission.LIMITS_READ))
    def show_weight(tenant: str, act: CurrentAct) -> dict[str, Any]:
        return shares.weight(store, act, tenant)
