# SPDX-License-Identifier: Apache-2.0
"""Routes of what two sources of usage say differently."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from control import reconciliation
from control.api.access import CurrentAct, needs
from control.api.bodies import Body
from control.api.services import Services
from control.core.roles import Permission
from control.reconciliation import State


class Decision(Body):
    """Why an exception is no obstacle any more."""

    note: str


def add(app: FastAPI, services: Services) -> None:
    """Add the routes to *app*."""
    store = services.store

    @app.get("/v1/reconciliation", **needs(Permission.PERIODS_READ))
    def list_exceptions(act: CurrentAct, state: State | None = None) -> dict[str, Any]:
        return reconciliation.exceptions(store, act, state)

    @app.post("/v1/reconciliation/{exception_id}/explain", **needs(Permission.PERIODS_CLOSE))
    def explain_exception(exception_id: int, body: Decision, act: CurrentAct) -> dict[str, Any]:
        return reconciliation.decide(store, act, exception_id, State.EXPLAINED, body.note)

    @app.post("/v1/reconciliation/{exception_id}/sign", **needs(Permission.PERIODS_CLOSE))
    def sign_exception(exception_id: int, body: Decision, act: CurrentAct) -> dict[str, Any]:
        return reconciliation.decide(store, act, exception_id, State.SIGNED, body.note)
