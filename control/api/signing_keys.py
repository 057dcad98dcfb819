# SPDX-License-Identifier: Apache-2.0
"""Routes of the keys that sign tokens."""

from __future__ import annotations

from typing import Any

import structlog
from fastapi import FastAPI

from control import signing_keys
from control.api.access import CurrentAct, needs
from control.api.bodies import Body
from control.api.services import Services
from control.core.roles import Permission

log = structlog.get_logger()


class KeyRotation(Body):
    """How to rotate; `at_once` is for a key that was stolen and ends every token."""

    at_once: bool = False


def add(app: FastAPI, services: Services) -> None:
    """Add the routes to *app*."""
    keys = services.issuer.keys

    @app.get("/v1/signing-keys", **needs(Permission.SIGNING_KEYS_READ))
    def list_signing_keys(act: CurrentAct) -> dict[str, Any]:
        return {"keys": signing_keys.describe(keys, now=act.now)}

    @app.post("/v1/signing-keys/rotate", status_code=201, **needs(Permission.SIGNING_KEYS_WRITE))
    def rotate_signing_keys(body: KeyRotation, act: CurrentAct) -> dict[str, Any]:
        rotated = signing_keys.rotate(services.store, act, keys, at_once=body.at_once)
        log.info("signing_keys_rotated", kid=rotated["kid"], at_once=body.at_once)
        return rotated
