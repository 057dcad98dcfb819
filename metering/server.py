# SPDX-License-Identifier: Apache-2.0
"""Put metering's service together: the models document, the second witness, the servicers, the socket."""

from __future__ import annotations

from opentelemetry.proto.collector.logs.v1 import logs_service_pb2 as log_wire
from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from chassis import contract
from chassis.certificates import WatchedCertificates
from chassis.clock import utc_now
from chassis.errors import Invalid
from chassis.models import WatchedCatalogue
from chassis.serving import GRACE_SECONDS, door, serve_streams
from chassis.settings import StoreSettings
from chassis.telemetry import metrics, traces
from chassis.telemetry.log import configure
from chassis.wire import ext_proc_pb2 as wire
from metering.adapters.slices import Slices
from metering.adapters.witness import Heard, Reconciliation
from metering.servicer import ACCESS_LOG_METHOD, METHOD, Servicer, Witness


class Settings(BaseSettings):
    """The service's own settings; the stores' are in `StoreSettings`."""

    model_config = SettingsConfigDict(env_prefix="PEAJE_METERING_", frozen=True)

    #: Unix socket, relative to the state directory; each process has its own.
    socket: str = contract.SOCKETS[contract.CLUSTER_METERING]
    #: host:port to be asked on by TCP instead, with PEAJE_TLS_DIRECTORY; empty: the socket.
    listen: str = ""
    #: host:port of ratelimit, where it is asked by TCP, with PEAJE_TLS_DIRECTORY; empty: its socket.
    ratelimit: str = ""
    #: Between two comparisons of what the second witness said with the ledger.
    reconcile_seconds: float = Field(default=5.0, gt=0)
    #: How long streams that pass through here may take to end once the process is to go; then they are reset. In a cluster
    #: as long as a gateway's (gateway.drainSeconds).
    stream_seconds: float = Field(default=GRACE_SECONDS, ge=0, le=86400)
    #: Loopback port for Prometheus; 0 shows no metrics.
    metrics_port: int = Field(default=0, ge=0, le=65535)


def main() -> None:
    """Serve until SIGTERM."""
    configure("metering")
    traces.configure("metering")
    settings, stores = Settings(), StoreSettings()
    if settings.metrics_port:
        metrics.serve(settings.metrics_port, host=stores.metrics_host)
    slices = Slices(
        settings.ratelimit or f"unix:{contract.SOCKETS[contract.CLUSTER_RATELIMIT]}",
        certificates=_certificates(settings, stores),
    )
    servicer = Servicer(WatchedCatalogue(stores.home, process="metering").watch().current, slices)
    heard = Heard()
    Reconciliation(
        url=stores.require_postgres(), heard=heard, clock=utc_now, every_seconds=settings.reconcile_seconds
    ).start()
    serve_streams(
        door(
            settings.socket, listen=settings.listen, tls_directory=stores.tls_directory, drain_seconds=stores.drain_seconds
        ),
        {METHOD: (servicer.process, wire.ProcessingRequest)},
        beside={ACCESS_LOG_METHOD: (Witness(heard, utc_now).hear, log_wire.ExportLogsServiceRequest)},
        grace_seconds=settings.stream_seconds,
    )


def _certificates(settings: Settings, stores: StoreSettings) -> WatchedCertificates | None:
    if not settings.ratelimit:
        return None
    if stores.tls_directory is None:
        raise Invalid("ratelimit is asked over TCP with certificates only.", mend="Name their directory in PEAJE_TLS_DIRECTORY.")
    return WatchedCertificates(stores.tls_directory)
