# SPDX-License-Identifier: Apache-2.0
"""
Routes of the control API.

Unknown fields are refused, errors have one shape, nothing but /health is open. A use case decides;
a route only translates.
"""

from __future__ import annotations

import hmac
import uuid
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from typing import Annotated, Any, Literal

import structlog
from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from chassis.errors import Conflict, Invalid, NotFound, PeajeError, Unavailable
from chassis.models import ModelCatalogue
from control import explain, keys, tenants, usage
from control.api.limits import add_limits
from control.durations import duration
from control.store import Store

log = structlog.get_logger()

#: No request of this API is larger.
BODY_BYTES_MAX = 64 * 1024

_STATUSES: dict[type[PeajeError], int] = {Invalid: 400, NotFound: 404, Conflict: 409, Unavailable: 503}
_CODES = {
    400: "invalid_request", 401: "invalid_token", 404: "not_found", 405: "invalid_request", 409: "conflict",
    413: "request_too_large", 503: "service_unavailable",
}


class Body(BaseModel):
    """A request body: a field nobody knows is a mistake, not a wish."""

    model_config = ConfigDict(extra="forbid", strict=True)


class NewTenant(Body):
    """A tenant to make."""

    name: str = Field(max_length=tenants.NAME_LENGTH_MAX)


class TenantChange(Body):
    """What may change about a tenant."""

    state: Literal["active", "suspended"]


class NewKey(Body):
    """A key to make."""

    name: str = "key"
    models: list[str] | None = None
    expires: str | None = Field(default=None, description="A duration such as 30d, or an ISO date; default 365d.")
    environment: Literal["live", "test"] = "live"


class Rotation(Body):
    """How to rotate a key."""

    overlap: str = "24h"


def build(
    store: Store,
    maker: keys.KeyMaker,
    *,
    admin_token: str,
    catalogue: Callable[[], ModelCatalogue],
    clock: Callable[[], datetime],
) -> FastAPI:
    """Put the application together."""
    app = FastAPI(title="Peaje control", version="1", openapi_url="/v1/openapi.json", docs_url="/docs", redoc_url=None)
    _add_errors(app)
    _add_guard(app, admin_token)

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    _add_tenants(app, store, clock)
    _add_keys(app, store, maker, clock)
    add_limits(app, store, catalogue, clock)
    _add_reports(app, store, clock)
    return app


def _add_tenants(app: FastAPI, store: Store, clock: Callable[[], datetime]) -> None:
    @app.post("/v1/tenants", status_code=201)
    def create_tenant(body: NewTenant) -> dict[str, Any]:
        made = tenants.create(store, body.name, now=clock())
        log.info("tenant_created", tenant=made["tenant_id"])
        return made

    @app.get("/v1/tenants")
    def list_tenants() -> dict[str, Any]:
        return {"tenants": tenants.list_all(store)}

    @app.get("/v1/tenants/{tenant}")
    def get_tenant(tenant: str) -> dict[str, Any]:
        return tenants.find(store, tenant)

    @app.patch("/v1/tenants/{tenant}")
    def change_tenant(tenant: str, body: TenantChange) -> dict[str, Any]:
        changed = tenants.set_state(store, tenant, body.state)
        log.info("tenant_changed", tenant=changed["tenant_id"], state=body.state)
        return changed


def _add_keys(app: FastAPI, store: Store, maker: keys.KeyMaker, clock: Callable[[], datetime]) -> None:
    @app.post("/v1/tenants/{tenant}/keys", status_code=201)
    def create_key(tenant: str, body: NewKey) -> dict[str, Any]:
        made = keys.create(
            store, maker, tenant, name=body.name, models=body.models, expires=body.expires,
            environment=body.environment, now=clock(),
        )
        log.info("key_created", tenant=made["tenant_id"], key_id=made["key_id"])
        return made

    @app.get("/v1/tenants/{tenant}/keys")
    def list_tenant_keys(tenant: str) -> dict[str, Any]:
        return {"keys": keys.list_all(store, tenant)}

    @app.get("/v1/keys")
    def list_keys() -> dict[str, Any]:
        return {"keys": keys.list_all(store, None)}

    @app.get("/v1/keys/{key_id}")
    def get_key(key_id: str) -> dict[str, Any]:
        return keys.find(store, key_id)

    @app.post("/v1/keys/{key_id}/rotate", status_code=201)
    def rotate_key(key_id: str, body: Rotation) -> dict[str, Any]:
        overlap = duration(body.overlap, what="overlap")
        made = keys.rotate(store, maker, key_id, overlap=overlap, now=clock())
        log.info("key_rotated", key_id=key_id, new_key_id=made["key_id"])
        return made

    @app.post("/v1/keys/{key_id}/revoke")
    def revoke_key(key_id: str) -> dict[str, Any]:
        revoked = keys.revoke(store, key_id, now=clock())
        log.info("key_revoked", key_id=key_id)
        return revoked


def _add_reports(app: FastAPI, store: Store, clock: Callable[[], datetime]) -> None:
    @app.get("/v1/usage")
    def get_usage(
        tenant: str | None = None,
        since: Annotated[str, Query(description="A duration such as 1h.")] = "24h",
        by: usage.By = "model",
    ) -> dict[str, Any]:
        start = clock() - max(duration(since, what="since"), timedelta(0))
        return {"since": start, "by": by, "usage": usage.report(store, tenant=tenant, since=start, by=by)}

    @app.get("/v1/requests/{request_id}")
    def explain_request(request_id: str) -> dict[str, Any]:
        return explain.explain(store, request_id)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(PeajeError)
    def peaje_error(request: Request, exc: PeajeError) -> JSONResponse:
        status = next(number for kind, number in _STATUSES.items() if isinstance(exc, kind))
        return _error(request, status, str(exc))

    @app.exception_handler(RequestValidationError)
    def validation_error(request: Request, exc: RequestValidationError) -> JSONResponse:
        # Names the field, never what was sent in it.
        first = exc.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path"))
        return _error(request, 400, f"{where or 'body'}: {first['msg']}.")

    @app.exception_handler(HTTPException)
    def http_error(request: Request, exc: HTTPException) -> JSONResponse:
        return _error(request, exc.status_code, str(exc.detail))

    @app.exception_handler(Exception)
    def any_error(request: Request, exc: Exception) -> JSONResponse:
        log.error("request_failed", error=type(exc).__name__, request_id=_request_id(request))
        return _error(request, 500, "Something went wrong here.")


def _add_guard(app: FastAPI, admin_token: str) -> None:
    expected = f"Bearer {admin_token}".encode()

    @app.middleware("http")
    async def guard(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        request.state.request_id = str(uuid.uuid4())
        if request.url.path != "/health":
            given = request.headers.get("authorization", "").encode("utf-8", "replace")
            if not hmac.compare_digest(given, expected):
                response: Response = _error(request, 401, "The admin token is missing or wrong.")
                response.headers["www-authenticate"] = 'Bearer realm="peaje-control"'
                return response
        if int(request.headers.get("content-length") or 0) > BODY_BYTES_MAX or "transfer-encoding" in request.headers:
            return _error(request, 413, f"A body has at most {BODY_BYTES_MAX} bytes and says its length.")
        response = await call_next(request)
        response.headers["x-request-id"] = _request_id(request)
        return response


def _request_id(request: Request) -> str:
    return str(getattr(request.state, "request_id", ""))


def _error(request: Request, status: int, message: str) -> JSONResponse:
    code = _CODES.get(status, "internal_error" if status >= 500 else "invalid_request")
    body = {"error": {"code": code, "message": message, "request_id": _request_id(request)}}
    return JSONResponse(body, status_code=status)
