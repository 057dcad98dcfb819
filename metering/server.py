# SPDX-License-Identifier: Apache-2.0
"""Put metering's ext_proc together: the models document, the servicer, the socket."""

from __future__ import annotations

from pydantic_settings import BaseSettings, SettingsConfigDict

from chassis import contract
from chassis.models import WatchedCatalogue
from chassis.serving import serve_streams
from chassis.settings import StoreSettings
from chassis.telemetry.log import configure
from chassis.wire import ext_proc_pb2 as wire
from metering.servicer import METHOD, Servicer


class Settings(BaseSettings):
    """metering's own settings; the stores' are in `StoreSettings`."""

    model_config = SettingsConfigDict(env_prefix="PEAJE_METERING_", frozen=True)

    #: Unix socket, relative to the state directory; each process has its own.
    socket: str = contract.SOCKETS[contract.CLUSTER_METERING]


def main() -> None:
    """Serve until SIGTERM."""
    configure("metering")
    servicer = Servicer(WatchedCatalogue(StoreSettings().home / contract.MODELS_PATH).current)
    serve_streams(Settings().socket, METHOD, servicer.process, wire.ProcessingRequest)
