# SPDX-License-Identifier: Apache-2.0
"""The route that makes the first operator, for whoever can read the one-time token."""

from __future__ import annotations

from typing import Any

import structlog
from fastapi import FastAPI, Request
from pydantic import Field

from control import bootstrap
from control.api.access import Unauthenticated, act_as, public
from control.api.bodies import Body
from control.api.services import Services

log = structlog.get_logger()


class Exchange(Body):
    """The one-time token, and what to call the first operator."""

    token: str = Field(max_length=256)
    name: str = bootstrap.FIRST_NAME


def add(app: FastAPI, services: Services) -> None:
    """Add the route to *app*."""

    @app.post("/v1/bootstrap", status_code=201, **public())
    def exchange_bootstrap_token(request: Request, body: Exchange) -> dict[str, Any]:
        act = act_as(request, "bootstrap")
        made = bootstrap.exchange(services.store, act, services.mint, body.token, name=body.name)
        if made is None:
            raise Unauthenticated("The bootstrap token is wrong, used or too old.")
        services.bootstrap_token_path.unlink(missing_ok=True)
        log.info("bootstrapped", operator=made["operator_id"])
        return made
