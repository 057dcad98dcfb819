# SPDX-License-Identifier: Apache-2.0
"""Routes that look back: usage, and what became of a request."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Any

from fastapi import FastAPI, Query

from control import explain, usage
from control.api.access import CurrentAct, needs
from control.api.services import Services
from control.core.roles import Permission
from control.durations import duration


def add(app: FastAPI, services: Services) -> None:
    """Add the routes to *app*."""
    store = services.store

    @app.get("/v1/usage", **needs(Permission.USAGE_READ))
    def get_usage(
        act: CurrentAct,
        tenant: str | None = None,
        since: Annotated[str, Query(description="A duration such as 1h.")] = "24h",
        by: usage.By = "model",
    ) -> dict[str, Any]:
        start = act.now - max(duration(since, what="since"), timedelta(0))
        return {"since": start, "by": by, "usage": usage.report(store, act, tenant=tenant, since=start, by=by)}

    @app.get("/v1/requests/{request_id}", **needs(Permission.REQUESTS_READ))
    def explain_request(request_id: str, act: CurrentAct) -> dict[str, Any]:
        return explain.explain(store, act, request_id)
