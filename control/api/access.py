# SPDX-License-Identifier: Apache-2.0
"""
Who may call a route. Every route says it: `**needs(Permission.X)`, or `**public()` for the few without an operator.

`check_declared` refuses to start with a route that says neither. The order of refusals is: 401 for
nobody, 404 for another's object, 403 for what the role may not; so none tells what exists.
"""

from __future__ import annotations

from typing import Annotated, Any, Final

from fastapi import Depends, FastAPI, Request
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool

from chassis.errors import Forbidden
from control import operators, sign_ins, tenants
from control.act import ALL_TENANTS, Act
from control.api.services import Services
from control.core.roles import Permission, may
from control.operators import Operator

#: In the OpenAPI document, so that it says who may call what.
DECLARATION: Final = "x-peaje-permission"
PUBLIC: Final = "public"


class Unauthenticated(Exception):
    """Nobody we know; the same sentence whatever was wrong."""

    def __init__(self, message: str = "The operator's token is missing, wrong or over.") -> None:
        super().__init__(message)


def needs(permission: Permission) -> dict[str, Any]:
    """Let in operators who have *permission*."""

    def check(request: Request) -> None:
        operator = _operator(request)
        services: Services = request.app.state.services
        tenant = request.path_params.get("tenant")
        if operator.tenant_id is not None and tenant is not None:
            tenants.find(services.store, act_of(request), tenant)
        if not may(operator.role, permission, tenant_id=operator.tenant_id):
            raise Forbidden(f"This needs {permission}, which a {operator.role} does not have here.")

    return {"dependencies": [Depends(check)], "openapi_extra": {DECLARATION: permission.value}}


def public() -> dict[str, Any]:
    """Let everybody in: the route proves its caller in a way of its own, or tells no secret."""
    return {"openapi_extra": {DECLARATION: PUBLIC}}


def act_of(request: Request) -> Act:
    """On whose behalf this request acts: its operator's, within its operator's tenant."""
    operator = _operator(request)
    return Act(
        actor=operator.operator_id, scope=operator.scope, request_id=request.state.request_id,
        now=request.state.now,
    )


def act_as(request: Request, actor: str) -> Act:
    """For a public route: on behalf of *actor*, over all tenants."""
    return Act(actor=actor, scope=ALL_TENANTS, request_id=request.state.request_id, now=request.state.now)


def address_of(request: Request) -> str:
    """The peer of the connection; a header that names another one proves nothing."""
    return request.client.host if request.client is not None else ""


CurrentAct = Annotated[Act, Depends(act_of)]


def operator_of(request: Request) -> Operator:
    """Who is calling."""
    return _operator(request)


CurrentOperator = Annotated[Operator, Depends(operator_of)]


async def raw_body(request: Request) -> bytes:
    """The body as it came; its size was checked before."""
    return await request.body()


RawBody = Annotated[bytes, Depends(raw_body)]


async def authenticate(request: Request) -> None:
    """Set the request's operator from its bearer token, or raise `Unauthenticated`."""
    services: Services = request.app.state.services
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    operator = None
    if scheme.lower() == "bearer":
        token = token.strip()
        operator = await run_in_threadpool(operators.authenticate, services.store, services.mint, token, now=request.state.now)
        if operator is None:
            await run_in_threadpool(
                services.sign_ins.refused, services.store, act_as(request, sign_ins.NOBODY), road="operator",
                who=sign_ins.operator_of(token), address=address_of(request),
            )  # fmt: skip
    if operator is None:
        raise Unauthenticated
    request.state.operator = operator


def public_paths(app: FastAPI) -> frozenset[str]:
    """Paths of the routes that are public."""
    return frozenset(route.path for route in routes(app) if _declared(route) == PUBLIC)


def check_declared(app: FastAPI) -> None:
    """Refuse an application with a route that does not say who may call it."""
    known = {PUBLIC, *(permission.value for permission in Permission)}
    for route in routes(app):
        if _declared(route) not in known:
            raise RuntimeError(f"{route.path} does not declare who may call it")


def routes(app: FastAPI) -> list[APIRoute]:
    """The application's own routes."""
    return [route for route in app.routes if isinstance(route, APIRoute)]


def _declared(route: APIRoute) -> str | None:
    return (route.openapi_extra or {}).get(DECLARATION)


def _operator(request: Request) -> Operator:
    operator = getattr(request.state, "operator", None)
    if not isinstance(operator, Operator):
        raise Unauthenticated
    return operator
