# SPDX-License-Identifier: Apache-2.0
"""Routes of journals."""

from __future__ import annotations

from typing import Any

import structlog
from fastapi import FastAPI
from pydantic import Field

from control import journals
from control.api.access import CurrentAct, needs
from control.api.bodies import Body
from control.api.services import Services
from control.core.roles import Permission
from metering.adapters.retiring import Files

log = structlog.get_logger()


class Retirement(Body):
    """Why a journal will never be read again, and that nothing in it is lost by that."""

    reason: str
    files: Files = Field(strict=False, description="`read`: its files were compared with what was read; `gone`: there are none any more.")


def add(app: FastAPI, services: Services) -> None:
    """Add the routes to *app*."""
    store = services.store

    @app.get("/v1/journals", **needs(Permission.PERIODS_READ))
    def list_journals(act: CurrentAct) -> dict[str, Any]:
        return journals.journals(store, act)

    @app.post("/v1/journals/{journal}/retire", **needs(Permission.PERIODS_CLOSE))
    def retire_journal(journal: str, body: Retirement, act: CurrentAct) -> dict[str, Any]:
        done = journals.retire_journal(store, act, journal, files=body.files, reason=body.reason)
        log.info("journal_retired", journal=journal, closed=done["closed_count"])
        return done
