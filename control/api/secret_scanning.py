# SPDX-License-Identifier: Apache-2.0
"""The route that a secret-scanning partner calls; the signature over the body is its credential."""

from __future__ import annotations

from typing import Any

import structlog
from fastapi import FastAPI, Request

from control import secret_scanning
from control.api.access import RawBody, Unauthenticated, act_as, public
from control.api.services import Services

log = structlog.get_logger()

PATH = "/v1/secret-scanning/alerts"
_IDENTIFIER_HEADER = "github-public-key-identifier"
_SIGNATURE_HEADER = "github-public-key-signature"


def add(app: FastAPI, services: Services) -> None:
    """Add the route to *app*."""

    @app.post(PATH, **public())
    def report_secrets(request: Request, body: RawBody) -> dict[str, Any]:
        signed = secret_scanning.is_signed(
            secret_scanning.load_public_keys(services.scanning_keys_path),
            identifier=request.headers.get(_IDENTIFIER_HEADER), signature=request.headers.get(_SIGNATURE_HEADER),
            body=body,
        )
        if not signed:
            raise Unauthenticated("The signature is missing or wrong.")
        texts = secret_scanning.read_tokens(body)
        act = act_as(request, "secret-scanning")
        found = secret_scanning.revoke_found(services.store, act, services.mint, texts)
        log.info("secrets_reported", reported=len(texts), found=found)
        return {"received": len(texts)}
