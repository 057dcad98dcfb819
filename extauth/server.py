# SPDX-License-Identifier: Apache-2.0
"""Put extauth together: settings, stores, the servicer, the socket."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from chassis import contract
from chassis.clock import utc_now
from chassis.models import WatchedCatalogue
from chassis.secrets import load_peppers
from chassis.serving import door, serve_unary
from chassis.settings import StoreSettings
from chassis.stores.postgres import read_pool
from chassis.telemetry import metrics, traces
from chassis.telemetry.log import configure
from chassis.wire import ext_authz_pb2 as wire
from extauth.adapters.directory import Directory
from extauth.adapters.identities import Identities
from extauth.adapters.key_writes import KeyWrites
from extauth.core.strangers import PER_MINUTE, Strangers
from extauth.servicer import METHOD, Servicer


class ControlSettings(BaseSettings):
    """Where the control API is: the issuer of service accounts' tokens."""

    model_config = SettingsConfigDict(env_prefix="PEAJE_CONTROL_", frozen=True)

    #: On loopback, as `up` starts it.
    port: int = 10001
    #: What its tokens name as their issuer, where that is not this machine's loopback.
    issuer: str = ""
    #: File with the authority of its certificate, where no public one has signed it; believed of the control API's keys alone.
    authority: Path | None = None


class Settings(BaseSettings):
    """extauth's own settings; the stores' are in `StoreSettings`."""

    model_config = SettingsConfigDict(env_prefix="PEAJE_EXTAUTH_", frozen=True)

    #: Unix socket, relative to the state directory; each process has its own.
    socket: str = contract.SOCKETS[contract.CLUSTER_EXTAUTH]
    #: host:port to be asked on by TCP instead, with PEAJE_TLS_DIRECTORY; empty: the socket.
    listen: str = ""
    #: Threads. More than one so that a key found in memory never waits behind one that must be read.
    workers: int = 4
    #: Postgres connections per process; a read takes about a millisecond.
    connections: int = 4
    #: Unknown keys and opaque tokens of one client address that are looked up a minute, as many at once; further ones are
    #: refused unseen, what is remembered never. 0: no bound.
    unknown_per_minute: int = Field(default=PER_MINUTE, ge=0)
    #: Loopback port for Prometheus; 0 shows no metrics.
    metrics_port: int = 0


def main() -> None:
    """Serve until SIGTERM."""
    configure("extauth")
    traces.configure("extauth")
    stores, settings = StoreSettings(), Settings()
    pool = read_pool(stores.require_postgres(), name="extauth", connections=settings.connections)
    # Callers that are remembered pass for a while, all others get 503: extauth/core/cache.py.
    metrics.FAILURE_MODE.labels("postgres", "remembered_only").set_function(lambda: pool.is_away)
    directory = Directory(pool, clock=utc_now)
    directory.watch(stores.require_postgres())
    control, peppers = ControlSettings(), load_peppers(stores.home)
    writes = KeyWrites(stores.require_postgres(), clock=utc_now, newest_pepper=max(peppers))
    identities = Identities(
        directory, peppers=peppers, writes=writes, home=stores.home,
        control_url=control.issuer.rstrip("/") or f"http://127.0.0.1:{control.port}",
        control_authority=control.authority, strangers=Strangers(per_minute=settings.unknown_per_minute),
    )  # fmt: skip
    identities.watch()
    writes.start()
    if settings.metrics_port:
        metrics.serve(settings.metrics_port, host=stores.metrics_host)
    catalogue = WatchedCatalogue(stores.home, process="extauth").watch()
    servicer = Servicer(identities, catalogue=catalogue.current, clock=utc_now)
    serve_unary(
        door(
            settings.socket, listen=settings.listen, tls_directory=stores.tls_directory, drain_seconds=stores.drain_seconds
        ),
        {METHOD: (servicer.check, wire.CheckRequest)},
        workers=settings.workers,
    )
    identities.close()
    writes.stop()
