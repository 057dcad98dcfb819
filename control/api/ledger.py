# SPDX-License-Identifier: Apache-2.0
"""Routes of the ledger's invariants."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from control import ledger
from control.api.access import CurrentAct, needs
from control.api.services import Services
from control.core.roles import Permission


def add(app: FastAPI, services: Services) -> None:
    """Add the routes to *app*."""

    @app.get("/v1/ledger/verification", **needs(Permission.LEDGER_VERIFY))
    def verify_ledger(act: CurrentAct) -> dict[str, Any]:
        with services.store.snapshot(act.scope) as connection:
            return ledger.verification(connection)
