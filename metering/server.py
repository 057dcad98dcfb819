# SPDX-License-Identifier: Apache-2.0
"""Put metering's ext_proc together: the models document, the servicer, the socket."""

from __future__ import annotations

from chassis import contract
from chassis.models import WatchedCatalogue
from chassis.serving import serve_streams
from chassis.settings import StoreSettings
from chassis.telemetry.log import configure
from chassis.wire import ext_proc_pb2 as wire
from metering.adapters.slices import Slices
from metering.servicer import METHOD, Servicer


def main() -> None:
    """Serve until SIGTERM."""
    configure("metering")
    slices = Slices(f"unix:{contract.SOCKETS[contract.CLUSTER_RATELIMIT]}")
    servicer = Servicer(WatchedCatalogue(StoreSettings().home / contract.MODELS_PATH).current, slices)
    serve_streams(
        contract.SOCKETS[contract.CLUSTER_METERING], METHOD, servicer.process, wire.ProcessingRequest
    )
