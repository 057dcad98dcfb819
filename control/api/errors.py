# SPDX-License-Identifier: Apache-2.0
"""Errors of the control API: one shape, one table of statuses, nothing of what was sent."""

from __future__ import annotations

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from chassis.errors import Conflict, Forbidden, Invalid, NotFound, PeajeError, Unavailable
from control.api.access import Unauthenticated
from control.secret_scanning import TooManyTokens

log = structlog.get_logger()

#: The most specific first.
_STATUSES: dict[type[PeajeError], int] = {
    TooManyTokens: 413, Invalid: 400, Forbidden: 403, NotFound: 404, Conflict: 409, Unavailable: 503,
}
_CODES = {
    400: "invalid_request", 401: "invalid_token", 403: "forbidden", 404: "not_found", 405: "invalid_request",
    409: "conflict", 413: "request_too_large", 503: "service_unavailable",
}


def add_errors(app: FastAPI) -> None:
    """Answer every failure of a route in the one shape."""

    @app.exception_handler(PeajeError)
    def peaje_error(request: Request, exc: PeajeError) -> JSONResponse:
        return from_error(request, exc)

    @app.exception_handler(Unauthenticated)
    def unauthenticated(request: Request, exc: Unauthenticated) -> JSONResponse:
        return nobody(request, exc)

    @app.exception_handler(RequestValidationError)
    def validation_error(request: Request, exc: RequestValidationError) -> JSONResponse:
        # Names the field, never what was sent in it.
        first = exc.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path"))
        if first["type"] == "extra_forbidden":
            return error(request, 400, "The body has a field that cannot be set here.")
        return error(request, 400, f"{where or 'body'}: {first['msg']}.")

    @app.exception_handler(HTTPException)
    def http_error(request: Request, exc: HTTPException) -> JSONResponse:
        return error(request, exc.status_code, str(exc.detail))

    @app.exception_handler(Exception)
    def any_error(request: Request, exc: Exception) -> JSONResponse:
        log.error("request_failed", error=type(exc).__name__, request_id=request_id(request))
        return error(request, 500, "Something went wrong here.")


def from_error(request: Request, exc: PeajeError) -> JSONResponse:
    """The answer to a use case's refusal."""
    status = next(number for kind, number in _STATUSES.items() if isinstance(exc, kind))
    return error(request, status, str(exc))


def nobody(request: Request, exc: Unauthenticated) -> JSONResponse:
    """The answer to a caller whom we do not know."""
    response = error(request, 401, str(exc))
    response.headers["www-authenticate"] = 'Bearer realm="peaje-control"'
    return response


def error(request: Request, status: int, message: str) -> JSONResponse:
    """An answer in the one shape."""
    code = _CODES.get(status, "internal_error" if status >= 500 else "invalid_request")
    body = {"error": {"code": code, "message": message, "request_id": request_id(request)}}
    return JSONResponse(body, status_code=status)


def request_id(request: Request) -> str:
    """The id of this request; minted here, never the caller's."""
    return str(getattr(request.state, "request_id", ""))
