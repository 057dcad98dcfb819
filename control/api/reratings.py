# SPDX-License-Identifier: Apache-2.0
"""The route of re-ratings."""

from __future__ import annotations

from typing import Any

import structlog
from fastapi import FastAPI
from pydantic import Field

from control import prices, reratings
from control.api.access import CurrentAct, needs
from control.api.bodies import Body
from control.api.prices import NewTier, as_tiers
from control.api.services import Services
from control.core.roles import Permission
from control.invoices import month

log = structlog.get_logger()


class NewRerating(Body):
    """The right price and what it is for; nothing is charged unless `apply` is true."""

    model: str
    month: str
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
    starts: str | None = Field(default=None, alias="from")
    ends: str | None = Field(default=None, alias="until")
    reason: str
    apply: bool = False


def add(app: FastAPI, services: Services) -> None:
    """Add the route to *app*."""

    @app.post("/v1/reratings", **needs(Permission.RERATE))
    def rerate(body: NewRerating, act: CurrentAct) -> dict[str, Any]:
        price = prices.Price(
            model=body.model, input=body.input, output=body.output, cached=body.cached, reasoning=body.reasoning,
            minimum=body.minimum, meter=body.meter, each=body.each, currency=body.currency, tenant=body.tenant,
            tiers=as_tiers(body.tiers),
        )
        asked = reratings.Asked(price=price, month=month(body.month), starts=body.starts, ends=body.ends, reason=body.reason)
        done = reratings.rerate(services.store, act, asked, is_applied=body.apply)
        if done["rerating_id"] is not None:
            log.info("usage_rerated", rerating_id=done["rerating_id"], model=done["model"])
        return done
