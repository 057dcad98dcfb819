# SPDX-License-Identifier: Apache-2.0
"""Invoices and months over HTTP."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

import structlog
from fastapi import APIRouter
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, ConfigDict

from control import invoices
from control.store import Store

log = structlog.get_logger()


class Closing(BaseModel):
    """How to close a month."""

    model_config = ConfigDict(extra="forbid", strict=True)

    exception: str | None = None


def router(store: Store, *, clock: Callable[[], datetime]) -> APIRouter:
    """Routes of invoices and months."""
    routes = APIRouter()

    @routes.get("/v1/tenants/{tenant}/invoices/{month}")
    def get_invoice(tenant: str, month: str) -> dict[str, Any]:
        return invoices.invoice(store, tenant, invoices.month(month))

    @routes.get("/v1/tenants/{tenant}/invoices/{month}/csv")
    def get_invoice_csv(tenant: str, month: str) -> PlainTextResponse:
        document = invoices.invoice(store, tenant, invoices.month(month))
        return PlainTextResponse(invoices.as_csv(document), media_type="text/csv")

    @routes.get("/v1/periods")
    def list_periods() -> dict[str, Any]:
        return {"periods": invoices.list_periods(store)}

    @routes.post("/v1/periods/{month}/close", status_code=201)
    def close_period(month: str, body: Closing) -> dict[str, Any]:
        period = invoices.month(month)
        closed = invoices.close(store, period, by="admin", exception=body.exception, now=clock())
        log.info("period_closed", period=closed["period"], root_hash=closed["root_hash"])
        return closed

    @routes.get("/v1/periods/{month}/verification")
    def verify_period(month: str) -> dict[str, Any]:
        return invoices.verify(store, invoices.month(month))

    return routes
