# SPDX-License-Identifier: Apache-2.0
"""
The control API put together: a router per noun, a guard before them all.

Unknown fields are refused, errors have one shape, every route says who may call it. A use case
decides; a route only translates.
"""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable

from fastapi import FastAPI, Request, Response

from chassis.errors import PeajeError
from control.api import (
    audit,
    bootstrap,
    credits,  # noqa: A004 - the noun; nobody uses the interpreter's own
    explain_decision,
    external_usage,
    invoices,
    journals,
    keys,
    ledger,
    limits,
    oauth,
    operators,
    prices,
    projects,
    reconciliation,
    reports,
    reratings,
    secret_scanning,
    service_accounts,
    shares,
    signing_keys,
    tenants,
    webhooks,
)
from control.api.access import Unauthenticated, authenticate, check_declared, public, public_paths
from control.api.errors import add_errors, error, from_error, nobody, request_id
from control.api.services import Services
from control.secret_scanning import BODY_BYTES_MAX as ALERTS_BYTES_MAX

#: No request of this API is larger, but a batch of alerts.
BODY_BYTES_MAX = 64 * 1024
_BODY_BYTES_MAX_BY_PATH = {secret_scanning.PATH: ALERTS_BYTES_MAX, external_usage.PATH: external_usage.BODY_BYTES_MAX}

_NOUNS = (
    tenants, projects, keys, service_accounts, operators, limits, shares, reports, audit, signing_keys, oauth,
    secret_scanning, bootstrap, explain_decision, prices, invoices, ledger, webhooks, credits, reratings, reconciliation, journals,
    external_usage,
)


def build(services: Services) -> FastAPI:
    """Put the application together; raises `RuntimeError` for a route that is open by mistake."""
    app = FastAPI(title="Peaje control", version="1", openapi_url="/v1/openapi.json", docs_url="/docs", redoc_url=None)
    app.state.services = services
    add_errors(app)

    @app.get("/health", **public())
    def health() -> dict[str, str]:
        return {"status": "ok"}

    for noun in _NOUNS:
        noun.add(app, services)
    check_declared(app)
    _add_guard(app, public_paths(app), services)
    return app


def _add_guard(app: FastAPI, open_paths: frozenset[str], services: Services) -> None:
    @app.middleware("http")
    async def guard(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        request.state.request_id = str(uuid.uuid4())
        request.state.now = services.clock()
        response = await _refusal(request, open_paths) or await call_next(request)
        response.headers["x-request-id"] = request_id(request)
        return response


async def _refusal(request: Request, open_paths: frozenset[str]) -> Response | None:
    """Why the request goes no further, decided before its body is read."""
    try:
        if request.url.path not in open_paths:
            await authenticate(request)
    except Unauthenticated as exc:
        return nobody(request, exc)
    except PeajeError as exc:
        return from_error(request, exc)
    most = _BODY_BYTES_MAX_BY_PATH.get(request.url.path, BODY_BYTES_MAX)
    if int(request.headers.get("content-length") or 0) > most or "transfer-encoding" in request.headers:
        return error(request, 413, f"A body has at most {most} bytes and says its length.")
    return None
