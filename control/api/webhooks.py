# SPDX-License-Identifier: Apache-2.0
"""Routes of webhooks."""

from __future__ import annotations

from typing import Annotated, Any, Final

import structlog
from fastapi import FastAPI, Query
from pydantic import Field

from control import webhooks
from control.api.access import CurrentAct, CurrentOperator, needs
from control.api.bodies import After, Body, Limit, page
from control.api.services import Services
from control.core.roles import Permission, may
from control.durations import duration
from control.operators import Operator
from control.store import PAGE_ROWS_MAX
from metering.core import outgoing

log = structlog.get_logger()

_ATTEMPTS_DEFAULT: Final = 50
#: A kind of event tells what this permission lets its operator read.
_NEEDED: Final = {
    outgoing.USAGE_RECORDED: Permission.USAGE_READ,
    outgoing.USAGE_HOUR: Permission.USAGE_READ,
    outgoing.BUDGET_THRESHOLD: Permission.LIMITS_READ,
    outgoing.KEY_CREATED: Permission.KEYS_READ,
    outgoing.KEY_ROTATED: Permission.KEYS_READ,
    outgoing.KEY_REVOKED: Permission.KEYS_READ,
    outgoing.KEY_EXPIRING: Permission.KEYS_READ,
    outgoing.PERIOD_CLOSED: Permission.PERIODS_READ,
    outgoing.INVOICE_CLOSED: Permission.INVOICES_READ,
}


class NewWebhook(Body):
    """A webhook to make."""

    url: str | None = Field(default=None, description="https only; may be left out for format stripe.")
    name: str = "webhook"
    format: str = Field(default=outgoing.STANDARD, description="standard, cloudevents, cloudevents-batch, lago or stripe.")
    events: list[str] | None = Field(default=None, max_length=20, description="Kinds; all but usage if left out.")
    tenant: str | None = None
    token: str | None = Field(default=None, description="What the receiver knows us by; sent as a bearer token, never shown.")


class SecretRotation(Body):
    """How to rotate the secret."""

    overlap: str = "24h"


class Resumption(Body):
    """How to go on."""

    skip: bool = False


class Customer(Body):
    """What the receiver calls a tenant; null: our own id."""

    customer: str | None


def add(app: FastAPI, services: Services) -> None:
    """Add the routes to *app*."""
    _add_noun(app, services)
    _add_verbs(app, services)


def _add_noun(app: FastAPI, services: Services) -> None:
    store, mint = services.store, services.mint

    @app.post("/v1/webhooks", status_code=201, **needs(Permission.WEBHOOKS_WRITE))
    def create_webhook(body: NewWebhook, act: CurrentAct, operator: CurrentOperator) -> dict[str, Any]:
        asked = webhooks.NewWebhook(
            url=body.url, name=body.name, format=body.format, events=body.events, tenant=body.tenant, credential=body.token
        )
        made = webhooks.create(
            store, act, mint, asked, may_hear=_may_hear(operator), loopback_allowed=services.loopback_allowed
        )
        log.info("webhook_created", webhook=made["webhook_id"], tenant=made["tenant_id"])
        return made

    @app.get("/v1/webhooks", **needs(Permission.WEBHOOKS_READ))
    def list_webhooks(act: CurrentAct, after: After = None, limit: Limit = PAGE_ROWS_MAX) -> dict[str, Any]:
        return page(webhooks.list_page(store, act, after=after, limit=limit), "webhooks", key="webhook_id", limit=limit)

    @app.get("/v1/webhooks/{webhook_id}", **needs(Permission.WEBHOOKS_READ))
    def get_webhook(webhook_id: str, act: CurrentAct) -> dict[str, Any]:
        return webhooks.find(store, act, webhook_id)

    @app.delete("/v1/webhooks/{webhook_id}", **needs(Permission.WEBHOOKS_WRITE))
    def remove_webhook(webhook_id: str, act: CurrentAct) -> dict[str, Any]:
        removed = webhooks.remove(store, act, webhook_id)
        log.info("webhook_removed", webhook=webhook_id)
        return removed


def _add_verbs(app: FastAPI, services: Services) -> None:
    store, mint = services.store, services.mint

    @app.post("/v1/webhooks/{webhook_id}/rotate-secret", status_code=201, **needs(Permission.WEBHOOKS_WRITE))
    def rotate_webhook_secret(webhook_id: str, body: SecretRotation, act: CurrentAct) -> dict[str, Any]:
        return webhooks.rotate_secret(store, act, mint, webhook_id, overlap=duration(body.overlap, what="overlap"))

    @app.post("/v1/webhooks/{webhook_id}/pause", **needs(Permission.WEBHOOKS_WRITE))
    def pause_webhook(webhook_id: str, act: CurrentAct) -> dict[str, Any]:
        return webhooks.pause(store, act, webhook_id)

    @app.post("/v1/webhooks/{webhook_id}/resume", **needs(Permission.WEBHOOKS_WRITE))
    def resume_webhook(webhook_id: str, body: Resumption, act: CurrentAct) -> dict[str, Any]:
        return webhooks.resume(store, act, webhook_id, skip=body.skip)

    @app.post("/v1/webhooks/{webhook_id}/test", status_code=202, **needs(Permission.WEBHOOKS_WRITE))
    def test_webhook(webhook_id: str, act: CurrentAct) -> dict[str, Any]:
        return webhooks.test(store, act, webhook_id)

    @app.get("/v1/webhooks/{webhook_id}/deliveries", **needs(Permission.WEBHOOKS_READ))
    def list_deliveries(
        webhook_id: str, act: CurrentAct, limit: Annotated[int, Query(ge=1, le=PAGE_ROWS_MAX)] = _ATTEMPTS_DEFAULT
    ) -> dict[str, Any]:
        return {"deliveries": webhooks.deliveries(store, act, webhook_id, limit=limit)}

    @app.put("/v1/webhooks/{webhook_id}/customers/{tenant}", **needs(Permission.WEBHOOKS_WRITE))
    def set_customer(webhook_id: str, tenant: str, body: Customer, act: CurrentAct) -> dict[str, Any]:
        return webhooks.set_customer(store, act, webhook_id, tenant, body.customer)


def _may_hear(operator: Operator) -> set[str]:
    return {kind for kind, permission in _NEEDED.items() if may(operator.role, permission, tenant_id=operator.tenant_id)}
