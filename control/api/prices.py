# SPDX-License-Identifier: Apache-2.0
"""Prices over HTTP."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

import structlog
from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from chassis.models import ModelCatalogue
from control import prices
from control.store import Store

log = structlog.get_logger()


class NewPrice(BaseModel):
    """A price to set; numbers are decimal texts, so that none of them was ever a float."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    input: str = Field(description="Per million tokens, such as 0.15.")
    output: str
    cached: str | None = None
    reasoning: str | None = None
    minimum: str = "0"
    currency: str = prices.CURRENCY_DEFAULT
    tenant: str | None = None
    starts: str | None = Field(default=None, alias="from", description="A date, a time or a duration; default now.")


def router(store: Store, *, catalogue: Callable[[], ModelCatalogue], clock: Callable[[], datetime]) -> APIRouter:
    """Routes of prices."""
    routes = APIRouter()

    @routes.post("/v1/prices", status_code=201)
    def set_price(body: NewPrice) -> dict[str, Any]:
        made = prices.put(store, prices.Price(**body.model_dump()), catalogue=catalogue(), clock=clock)
        log.info("price_set", model=made["model"], tenant=made["tenant"], rate_card_id=made["rate_card_id"])
        return made

    @routes.get("/v1/prices")
    def list_prices(tenant: str | None = None, in_force: bool = False) -> dict[str, Any]:
        return {"prices": prices.list_all(store, tenant=tenant, at=clock() if in_force else None)}

    return routes
