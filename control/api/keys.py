# SPDX-License-Identifier: Apache-2.0
"""Routes of API keys."""

from __future__ import annotations

from typing import Any, Literal

import structlog
from fastapi import FastAPI
from pydantic import Field

from control import keys
from control.api.access import CurrentAct, needs
from control.api.bodies import After, Body, Limit, page
from control.api.services import Services
from control.core.roles import Permission
from control.durations import duration
from control.store import PAGE_ROWS_MAX
from control.tenants import DEFAULT_PROJECT

log = structlog.get_logger()


class NewKey(Body):
    """A key to make. Lists that are left out allow everything; model names may hold `*`."""

    name: str = "key"
    project: str = DEFAULT_PROJECT
    service_account_id: str | None = None
    scopes: list[str] | None = None
    models: list[str] | None = None
    denied_models: list[str] = Field(default_factory=list)
    allowed_cidrs: list[str] | None = None
    expires: str | None = Field(default=None, description="A duration such as 30d, or an ISO date; default 365d.")
    environment: Literal["live", "test"] = "live"


class KeyChange(Body):
    """What may change about a key."""

    state: Literal["active", "disabled"]


class Rotation(Body):
    """How to rotate a key."""

    overlap: str = "24h"


def add(app: FastAPI, services: Services) -> None:
    """Add the routes to *app*."""
    store, mint = services.store, services.mint

    @app.post("/v1/tenants/{tenant}/keys", status_code=201, **needs(Permission.KEYS_WRITE))
    def create_key(tenant: str, body: NewKey, act: CurrentAct) -> dict[str, Any]:
        asked = keys.NewKey(**body.model_dump())
        made = keys.create(store, act, mint, tenant, asked, catalogue=services.catalogue())
        log.info("key_created", tenant=made["tenant_id"], key_id=made["key_id"])
        return made

    @app.get("/v1/tenants/{tenant}/keys", **needs(Permission.KEYS_READ))
    def list_tenant_keys(
        tenant: str, act: CurrentAct, after: After = None, limit: Limit = PAGE_ROWS_MAX
    ) -> dict[str, Any]:
        return page(keys.list_page(store, act, tenant, after=after, limit=limit), "keys", key="key_id", limit=limit)

    @app.get("/v1/keys", **needs(Permission.KEYS_READ))
    def list_keys(act: CurrentAct, after: After = None, limit: Limit = PAGE_ROWS_MAX) -> dict[str, Any]:
        return page(keys.list_page(store, act, None, after=after, limit=limit), "keys", key="key_id", limit=limit)

    @app.get("/v1/keys/{key_id}", **needs(Permission.KEYS_READ))
    def get_key(key_id: str, act: CurrentAct) -> dict[str, Any]:
        return keys.find(store, act, key_id)

    @app.patch("/v1/keys/{key_id}", **needs(Permission.KEYS_WRITE))
    def change_key(key_id: str, body: KeyChange, act: CurrentAct) -> dict[str, Any]:
        changed = keys.set_state(store, act, key_id, body.state)
        log.info("key_changed", key_id=key_id, state=body.state)
        return changed

    @app.post("/v1/keys/{key_id}/rotate", status_code=201, **needs(Permission.KEYS_WRITE))
    def rotate_key(key_id: str, body: Rotation, act: CurrentAct) -> dict[str, Any]:
        made = keys.rotate(store, act, mint, key_id, overlap=duration(body.overlap, what="overlap"))
        log.info("key_rotated", key_id=key_id, new_key_id=made["key_id"])
        return made

    @app.post("/v1/keys/{key_id}/revoke", **needs(Permission.KEYS_WRITE))
    def revoke_key(key_id: str, act: CurrentAct) -> dict[str, Any]:
        revoked = keys.revoke(store, act, key_id)
        log.info("key_revoked", key_id=key_id)
        return revoked
