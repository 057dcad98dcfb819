# SPDX-License-Identifier: Apache-2.0
"""Routes of service accounts."""

from __future__ import annotations

from typing import Any, Literal

import structlog
from fastapi import FastAPI
from pydantic import Field

from control import service_accounts
from control.api.access import CurrentAct, needs
from control.api.bodies import After, Body, Limit, page
from control.api.services import Services
from control.core.roles import Permission
from control.durations import duration
from control.store import PAGE_ROWS_MAX
from control.tenants import DEFAULT_PROJECT

log = structlog.get_logger()


class NewServiceAccount(Body):
    """A service account to make. Lists that are left out allow everything; model names may hold `*`."""

    name: str
    project: str = DEFAULT_PROJECT
    scopes: list[str] | None = None
    models: list[str] | None = None
    denied_models: list[str] = Field(default_factory=list)


class ServiceAccountChange(Body):
    """What may change about a service account."""

    state: Literal["active", "suspended"]


class SecretRotation(Body):
    """How to rotate a client secret."""

    overlap: str = "24h"


def add(app: FastAPI, services: Services) -> None:
    """Add the routes to *app*."""
    store, mint = services.store, services.mint

    @app.post("/v1/tenants/{tenant}/service-accounts", status_code=201, **needs(Permission.SERVICE_ACCOUNTS_WRITE))
    def create_service_account(tenant: str, body: NewServiceAccount, act: CurrentAct) -> dict[str, Any]:
        asked = service_accounts.NewServiceAccount(**body.model_dump())
        made = service_accounts.create(store, act, mint, tenant, asked, catalogue=services.catalogue())
        log.info("service_account_created", tenant=made["tenant_id"], service_account=made["service_account_id"])
        return made

    @app.get("/v1/tenants/{tenant}/service-accounts", **needs(Permission.SERVICE_ACCOUNTS_READ))
    def list_service_accounts(
        tenant: str, act: CurrentAct, after: After = None, limit: Limit = PAGE_ROWS_MAX
    ) -> dict[str, Any]:
        rows = service_accounts.list_page(store, act, tenant, after=after, limit=limit)
        return page(rows, "service_accounts", key="service_account_id", limit=limit)

    @app.get("/v1/service-accounts/{service_account_id}", **needs(Permission.SERVICE_ACCOUNTS_READ))
    def get_service_account(service_account_id: str, act: CurrentAct) -> dict[str, Any]:
        return service_accounts.find(store, act, service_account_id)

    @app.patch("/v1/service-accounts/{service_account_id}", **needs(Permission.SERVICE_ACCOUNTS_WRITE))
    def change_service_account(service_account_id: str, body: ServiceAccountChange, act: CurrentAct) -> dict[str, Any]:
        changed = service_accounts.set_state(store, act, service_account_id, body.state)
        log.info("service_account_changed", service_account=service_account_id, state=body.state)
        return changed

    @app.post(
        "/v1/service-accounts/{service_account_id}/rotate", status_code=201,
        **needs(Permission.SERVICE_ACCOUNTS_WRITE),
    )
    def rotate_secret(service_account_id: str, body: SecretRotation, act: CurrentAct) -> dict[str, Any]:
        overlap = duration(body.overlap, what="overlap")
        made = service_accounts.rotate_secret(store, act, mint, service_account_id, overlap=overlap)
        log.info("service_account_secret_rotated", service_account=service_account_id)
        return made
