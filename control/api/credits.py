# SPDX-License-Identifier: Apache-2.0
"""Routes of credits."""

from __future__ import annotations

from typing import Any

import structlog
from fastapi import FastAPI
from pydantic import Field

from control import credits  # noqa: A004 - the noun; nobody uses the interpreter's own
from control.api.access import CurrentAct, needs
from control.api.bodies import Body
from control.api.services import Services
from control.core.roles import Permission
from control.limits import CURRENCY_DEFAULT

log = structlog.get_logger()


class NewGrant(Body):
    """Credits to add; the amount is a decimal text, so that it was never a float."""

    amount: str
    currency: str = CURRENCY_DEFAULT
    expires: str | None = Field(default=None, description="A duration such as 365d, or a date; never if left out.")
    reason: str
    reference: str | None = Field(default=None, description="The payer's own: a second grant with it is the first one again.")


class Expiry(Body):
    """Why a grant ends."""

    reason: str


def add(app: FastAPI, services: Services) -> None:
    """Add the routes to *app*."""
    store, mint = services.store, services.mint

    @app.post("/v1/tenants/{tenant}/credits", status_code=201, **needs(Permission.CREDITS_WRITE))
    def grant_credits(tenant: str, body: NewGrant, act: CurrentAct) -> dict[str, Any]:
        made = credits.grant(store, act, mint, tenant, **body.model_dump())
        log.info("credits_granted", tenant=made["tenant_id"], grant=made["grant_id"])
        return made

    @app.get("/v1/tenants/{tenant}/credits", **needs(Permission.CREDITS_READ))
    def show_credits(tenant: str, act: CurrentAct) -> dict[str, Any]:
        return credits.show(store, act, tenant)

    @app.post("/v1/tenants/{tenant}/credits/{grant_id}/expire", **needs(Permission.CREDITS_WRITE))
    def expire_credits(tenant: str, grant_id: str, body: Expiry, act: CurrentAct) -> dict[str, Any]:
        return credits.expire(store, act, tenant, grant_id, reason=body.reason)
