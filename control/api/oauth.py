# SPDX-License-Identifier: Apache-2.0
"""The token endpoint and what verifiers look up; in OAuth's own words, not the API's."""

from __future__ import annotations

import math
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from chassis.errors import PeajeError
from control import oauth, sign_ins
from control.api.access import RawBody, act_as, address_of, public
from control.api.services import Services
from control.core import tokens
from control.core.tokens import Refused

#: No cache on the way may keep a token (RFC 6749 5.1).
_NEVER_STORED = {"cache-control": "no-store", "pragma": "no-cache"}
_TOO_OFTEN = Refused(error="temporarily_unavailable", description="Too many requests. Try again later.", status=429)
#: Verifiers fetch every five minutes; less than half the time that a key is published before it signs.
_STORED = {"cache-control": "public, max-age=240"}


def add(app: FastAPI, services: Services) -> None:
    """Add the routes to *app*."""
    issuer = services.issuer

    @app.post("/oauth2/token", **public())
    def create_token(request: Request, body: RawBody) -> JSONResponse:
        asked = tokens.read_request(
            authorization=request.headers.get("authorization"),
            content_type=request.headers.get("content-type"), body=body,
        )
        if isinstance(asked, Refused):
            return _refuse(asked)
        address = address_of(request)
        wait = services.sign_ins.wait(asked.client_id, address, request.state.now)
        if wait:
            return _refuse(_TOO_OFTEN, retry_after=math.ceil(wait.total_seconds()))
        try:
            answer = oauth.issue(services.store, issuer, asked, now=request.state.now)
        except PeajeError:
            # RFC 6749 has no word for it; this is the one that clients retry on.
            return _refuse(Refused(error="temporarily_unavailable", description="Try again.", status=503))
        if answer is tokens.INVALID_CLIENT:
            services.sign_ins.refused(
                services.store, act_as(request, sign_ins.NOBODY), road="token", who=sign_ins.client_of(asked.client_id), address=address,
            )  # fmt: skip
        return _refuse(answer) if isinstance(answer, Refused) else JSONResponse(answer, headers=_NEVER_STORED)

    @app.get("/.well-known/jwks.json", **public())
    def get_jwks(request: Request) -> JSONResponse:
        return JSONResponse(issuer.keys.document(now=request.state.now), headers=_STORED)

    @app.get("/.well-known/oauth-authorization-server", **public())
    def get_metadata() -> JSONResponse:
        return JSONResponse(issuer.metadata(), headers=_STORED)


def _refuse(refused: Refused, *, retry_after: int | None = None) -> JSONResponse:
    headers: dict[str, Any] = dict(_NEVER_STORED)
    if retry_after is not None:
        headers["retry-after"] = str(retry_after)
    if refused.status == 401:
        headers["www-authenticate"] = 'Basic realm="peaje"'
    body = {"error": refused.error, "error_description": refused.description}
    return JSONResponse(body, status_code=refused.status, headers=headers)
