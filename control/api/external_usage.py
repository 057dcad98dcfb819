# SPDX-License-Identifier: Apache-2.0
"""The route of usage from outside the road."""

from __future__ import annotations

from typing import Any, Final

import structlog
from fastapi import FastAPI
from pydantic import AwareDatetime, Field

from control import external_usage
from control.api.access import CurrentAct, needs
from control.api.bodies import Body
from control.api.services import Services
from control.core.roles import Permission
from control.tenants import DEFAULT_PROJECT

log = structlog.get_logger()

PATH: Final = "/v1/usage"
#: A thousand items with long names.
BODY_BYTES_MAX: Final = 1024 * 1024


class Item(Body):
    """What was used."""

    id: str = Field(description="The poster's own; posted again it changes nothing.")
    tenant: str
    project: str = DEFAULT_PROJECT
    key_id: str | None = None
    model: str
    input_tokens: int
    output_tokens: int
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    meter: str | None = Field(default=None, description="What else than tokens was used: images, characters or searches.")
    quantity: int = 0
    started_at: AwareDatetime = Field(strict=False, description="With its zone; the price of this moment counts.")
    ended_at: AwareDatetime | None = Field(default=None, strict=False)


class Usage(Body):
    """Items, all or none."""

    items: list[Item] = Field(max_length=external_usage.ITEMS_MAX)


def add(app: FastAPI, services: Services) -> None:
    """Add the route to *app*."""

    @app.post(PATH, status_code=201, **needs(Permission.USAGE_WRITE))
    def post_usage(body: Usage, act: CurrentAct) -> dict[str, Any]:
        items = [external_usage.Item(**item.model_dump()) for item in body.items]
        done = external_usage.post(services.store, act, items)
        log.info("usage_posted", **done)
        return done
