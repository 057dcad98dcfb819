# SPDX-License-Identifier: Apache-2.0
"""`python -m control.api`: serve the control API on loopback."""

from __future__ import annotations

import os
import secrets

import uvicorn

from chassis import contract
from chassis.clock import utc_now
from chassis.models import WatchedCatalogue
from chassis.secrets import load_peppers, read_secret
from chassis.serving import run
from chassis.settings import StoreSettings
from chassis.telemetry.log import configure
from control.api.app import build
from control.keys import KeyMaker
from control.store import Store


def main() -> None:
    """Serve until SIGTERM."""
    configure("control")
    stores = StoreSettings()
    catalogue = WatchedCatalogue(stores.home / contract.MODELS_PATH)
    maker = KeyMaker(
        peppers=load_peppers(stores.home), random_bytes=secrets.token_bytes, catalogue=catalogue.current
    )
    app = build(
        Store(stores.require_postgres()), maker, admin_token=read_secret(stores.home / "secrets/admin-token"),
        catalogue=catalogue.current, clock=utc_now,
    )
    port = int(os.environ.get("PEAJE_CONTROL_PORT", "10001"))
    uvicorn.run(app, host="127.0.0.1", port=port, access_log=False, log_config=None, server_header=False)


if __name__ == "__main__":
    run(main)
