# SPDX-License-Identifier: Apache-2.0
"""The ledger's invariants over HTTP."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from control import ledger
from control.store import Store


def router(store: Store) -> APIRouter:
    """Routes of the ledger."""
    routes = APIRouter()

    @routes.get("/v1/ledger/verification")
    def verify_ledger() -> dict[str, Any]:
        with store.transaction() as connection:
            return ledger.verification(connection)

    return routes
