# SPDX-License-Identifier: Apache-2.0
"""The API's routes about limits."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Annotated, Any

import structlog
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, create_model

from chassis.models import ModelCatalogue
from control import limits
from control.store import Store

log = structlog.get_logger()

_NUMBER = Annotated[int | None, Field(description="null removes it; left out, it stays")]
_BUDGET = Annotated[str | None, Field(description="an amount of money such as 100.00; null removes it; left out, it stays")]


class _LimitScope(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    project_id: str | None = None
    key_id: str | None = None
    model: str | None = None
    burst: int | None = None
    effect: limits.Effect | None = None
    on_store_error: limits.OnStoreError | None = None
    currency: str | None = None


#: Numbers to set; null removes one, a missing one stays.
LimitChange = create_model(
    "LimitChange",
    __base__=_LimitScope,
    **{name: (_NUMBER, None) for name in limits.NUMBERS},
    **{name: (_BUDGET, None) for name in limits.BUDGETS},
)


def add_limits(
    app: FastAPI, store: Store, catalogue: Callable[[], ModelCatalogue], clock: Callable[[], datetime]
) -> None:
    """Add them to *app*."""

    @app.put("/v1/tenants/{tenant}/limits")
    def put_limit(tenant: str, body: LimitChange) -> dict[str, Any]:  # type: ignore[valid-type]
        given: Any = body
        names = (name for name in (*limits.NUMBERS, *limits.BUDGETS) if name in given.model_fields_set)
        made = limits.put(
            store,
            limits.Scope(tenant=tenant, project_id=given.project_id, key_id=given.key_id, model=given.model),
            {name: getattr(given, name) for name in names},
            manner=limits.Manner(
                burst=given.burst, effect=given.effect, on_store_error=given.on_store_error, currency=given.currency
            ),
            catalogue=catalogue(),
            now=clock(),
        )
        log.info("limit_set", tenant=made["tenant_id"], limits=sorted(made["limits"]))
        return made

    @app.get("/v1/tenants/{tenant}/limits")
    def list_tenant_limits(tenant: str) -> dict[str, Any]:
        return {"limits": limits.list_all(store, tenant)}

    @app.get("/v1/tenants/{tenant}/limits/explain")
    def explain_limits(tenant: str, key_id: str | None = None, model: str | None = None) -> dict[str, Any]:
        return {"limits": limits.explain(store, tenant=tenant, key_id=key_id, model=model)}

    @app.delete("/v1/tenants/{tenant}/limits")
    def delete_limit(
        tenant: str, project_id: str | None = None, key_id: str | None = None, model: str | None = None
    ) -> dict[str, Any]:
        scope = limits.Scope(tenant=tenant, project_id=project_id, key_id=key_id, model=model)
        gone = limits.delete(store, scope)
        log.info("limit_deleted", tenant=gone["tenant_id"], limits=sorted(gone["limits"]))
        return gone

    @app.get("/v1/limits")
    def list_limits() -> dict[str, Any]:
        return {"limits": limits.list_all(store, None)}

    @app.get("/v1/limits/findings")
    def limit_findings() -> dict[str, Any]:
        return {"findings": limits.findings(store, catalogue())}
