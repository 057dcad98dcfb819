# SPDX-License-Identifier: Apache-2.0
"""Routes of invoices and months."""

from __future__ import annotations

from typing import Any

import structlog
from fastapi import FastAPI
from fastapi.responses import PlainTextResponse

from control import invoices
from control.api.access import CurrentAct, needs
from control.api.bodies import Body
from control.api.services import Services
from control.core.roles import Permission

log = structlog.get_logger()


class Closing(Body):
    """How to close a month."""

    exception: str | None = None


def add(app: FastAPI, services: Services) -> None:
    """Add the routes to *app*."""
    store = services.store

    @app.get("/v1/tenants/{tenant}/invoices/{month}", **needs(Permission.INVOICES_READ))
    def get_invoice(tenant: str, month: str, act: CurrentAct) -> dict[str, Any]:
        return invoices.invoice(store, act, tenant, invoices.month(month))

    @app.get("/v1/tenants/{tenant}/invoices/{month}/csv", **needs(Permission.INVOICES_READ))
    def get_invoice_csv(tenant: str, month: str, act: CurrentAct) -> PlainTextResponse:
        document = invoices.invoice(store, act, tenant, invoices.month(month))
        return PlainTextResponse(invoices.as_csv(document), media_type="text/csv")

    @app.get("/v1/periods", **needs(Permission.PERIODS_READ))
    def list_periods(act: CurrentAct) -> dict[str, Any]:
        return {"periods": invoices.list_periods(store, act)}

    @app.post("/v1/periods/{month}/close", status_code=201, **needs(Permission.PERIODS_CLOSE))
    def close_period(month: str, body: Closing, act: CurrentAct) -> dict[str, Any]:
        closed = invoices.close(store, act, invoices.month(month), exception=body.exception)
        log.info("period_closed", period=closed["period"], root_hash=closed["root_hash"])
        return closed

    @app.get("/v1/periods/{month}/verification", **needs(Permission.LEDGER_VERIFY))
    def verify_period(month: str, act: CurrentAct) -> dict[str, Any]:
        return invoices.verify(store, act, invoices.month(month))
