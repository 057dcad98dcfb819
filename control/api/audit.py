# SPDX-License-Identifier: Apache-2.0
"""Routes of the audit log."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import FastAPI, Query

from control import audit
from control.api.access import CurrentAct, needs
from control.api.bodies import Limit
from control.api.services import Services
from control.core.roles import Permission

_SEQUENCE_MAX = 2**63 - 1
_ENTRIES_DEFAULT = 100


def add(app: FastAPI, services: Services) -> None:
    """Add the routes to *app*."""
    store = services.store

    @app.get("/v1/audit", **needs(Permission.AUDIT_READ))
    def list_audit(
        act: CurrentAct, after: Annotated[int, Query(ge=0, le=_SEQUENCE_MAX)] = 0, limit: Limit = _ENTRIES_DEFAULT
    ) -> dict[str, Any]:
        return audit.list_entries(store, act, after=after, limit=limit)

    @app.get("/v1/audit/verify", **needs(Permission.AUDIT_VERIFY))
    def verify_audit(act: CurrentAct, anchor: Annotated[str | None, Query(max_length=100)] = None) -> dict[str, Any]:
        return audit.verify(store, act, anchor=anchor)
