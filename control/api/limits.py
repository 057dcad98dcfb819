# SPDX-License-Identifier: Apache-2.0
"""Routes of limits."""

from typing import Annotated, Any

import structlog
from fastapi import FastAPI
from pydantic import Field, create_model

from control import limits
from control.api.access import CurrentAct, needs
from control.api.bodies import Body
from control.api.services import Services
from control.core.roles import Permission

log = structlog.get_logger()

_NUMBER = Annotated[int | None, Field(description="null removes it; left out, it stays")]
_BUDGET = Annotated[str | None, Field(description="an amount of money such as 100.00; null removes it; left out, it stays")]


class _LimitScope(Body):
    """What a change of limits says besides the numbers."""

    project_id: str | None = None
    key_id: str | None = None
    model: str | None = None
    burst: int | None = None
    effect: limits.Effect | None = None
    on_store_error: limits.OnStoreError | None = None
    currency: str | None = None


#: Numbers to set by name; null removes one, a missing one stays.
_FIELDS: dict[str, Any] = dict.fromkeys(limits.NUMBERS, (_NUMBER, None)) | dict.fromkeys(limits.BUDGETS, (_BUDGET, None))
LimitChange = create_model("LimitChange", __base__=_LimitScope, **_FIELDS)


def add(app: FastAPI, services: Services) -> None:
    """Add the routes to *app*."""
    store = services.store

    @app.put("/v1/tenants/{tenant}/limits", **needs(Permission.LIMITS_WRITE))
    def put_limit(tenant: str, body: LimitChange, act: CurrentAct) -> dict[str, Any]:
        given: Any = body
        names = (name for name in (*limits.NUMBERS, *limits.BUDGETS) if name in given.model_fields_set)
        made = limits.put(
            store,
            act,
            limits.Scope(tenant=tenant, project_id=given.project_id, key_id=given.key_id, model=given.model),
            {name: getattr(given, name) for name in names},
            manner=limits.Manner(
                burst=given.burst, effect=given.effect, on_store_error=given.on_store_error, currency=given.currency
            ),
            catalogue=services.catalogue(),
        )
        log.info("limit_set", tenant=made["tenant_id"], limits=sorted(made["limits"]))
        return made

    @app.get("/v1/tenants/{tenant}/limits", **needs(Permission.LIMITS_READ))
    def list_tenant_limits(tenant: str, act: CurrentAct) -> dict[str, Any]:
        return {"limits": limits.list_all(store, act, tenant)}

    @app.get("/v1/tenants/{tenant}/limits/explain", **needs(Permission.LIMITS_READ))
    def explain_limits(
        tenant: str, act: CurrentAct, key_id: str | None = None, model: str | None = None
    ) -> dict[str, Any]:
        return {"limits": limits.explain(store, act, tenant=tenant, key_id=key_id, model=model)}

    @app.delete("/v1/tenants/{tenant}/limits", **needs(Permission.LIMITS_WRITE))
    def delete_limit(
        tenant: str, act: CurrentAct, project_id: str | None = None, key_id: str | None = None, model: str | None = None
    ) -> dict[str, Any]:
        scope = limits.Scope(tenant=tenant, project_id=project_id, key_id=key_id, model=model)
        gone = limits.delete(store, act, scope)
        log.info("limit_deleted", tenant=gone["tenant_id"], limits=sorted(gone["limits"]))
        return gone

    @app.get("/v1/limits", **needs(Permission.LIMITS_READ))
    def list_limits(act: CurrentAct) -> dict[str, Any]:
        return {"limits": limits.list_all(store, act, None)}

    @app.get("/v1/limits/findings", **needs(Permission.LIMITS_CHECK))
    def limit_findings(act: CurrentAct) -> dict[str, Any]:
        return {"findings": limits.findings(store, act, services.catalogue())}
