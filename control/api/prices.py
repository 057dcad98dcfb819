# SPDX-License-Identifier: Apache-2.0
"""Routes of prices."""

from __future__ import annotations

from typing import Any

import structlog
from fastapi import FastAPI
from pydantic import Field

from control import prices
from control.api.access import CurrentAct, needs
from control.api.bodies import Body
from control.api.services import Services
from control.core.roles import Permission

log = structlog.get_logger()


class NewTier(Body):
    """Prices of requests with more input tokens, in place of the others for all of their tokens."""

    above_tokens: int = Field(description="Input tokens, cached ones included; a request with exactly so many is not in the tier.")
    input: str
    output: str
    cached: str | None = None
    reasoning: str | None = None


class NewPrice(Body):
    """A price to set; numbers are decimal texts, so that none of them was ever a float."""

    model: str
    input: str = Field(description="Per million tokens, such as 0.15.")
    output: str
    cached: str | None = None
    reasoning: str | None = None
    minimum: str = "0"
    meter: str | None = Field(default=None, description="What else is charged: images, characters or searches.")
    each: str | None = Field(default=None, description="What one of it costs, such as 0.04.")
    tiers: list[NewTier] = Field(default=[], max_length=prices.TIERS_MAX)
    currency: str = prices.CURRENCY_DEFAULT
    tenant: str | None = None
    starts: str | None = Field(default=None, alias="from", description="A date, a time or a duration; default now.")


def as_tiers(tiers: list[NewTier]) -> tuple[prices.PriceTier, ...]:
    """The tiers of a body, as the use cases take them."""
    return tuple(prices.PriceTier(**tier.model_dump()) for tier in tiers)


def add(app: FastAPI, services: Services) -> None:
    """Add the routes to *app*."""
    store = services.store

    @app.post("/v1/prices", status_code=201, **needs(Permission.PRICES_WRITE))
    def set_price(body: NewPrice, act: CurrentAct) -> dict[str, Any]:
        price = prices.Price(**body.model_dump(exclude={"tiers"}), tiers=as_tiers(body.tiers))
        made = prices.put(store, act, price, catalogue=services.catalogue(), clock=services.clock)
        log.info("price_set", model=made["model"], tenant=made["tenant"], rate_card_id=made["rate_card_id"])
        return made

    @app.get("/v1/prices", **needs(Permission.PRICES_READ))
    def list_prices(act: CurrentAct, tenant: str | None = None, in_force: bool = False) -> dict[str, Any]:
        return {"prices": prices.list_all(store, act, tenant=tenant, at=act.now if in_force else None)}
