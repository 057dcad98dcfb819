# SPDX-License-Identifier: Apache-2.0
"""Put extauth together: settings, stores, the servicer, the socket."""

from __future__ import annotations

from pydantic_settings import BaseSettings, SettingsConfigDict

from chassis import contract
from chassis.clock import utc_now
from chassis.models import WatchedCatalogue
from chassis.secrets import load_peppers
from chassis.serving import serve_unary
from chassis.settings import StoreSettings
from chassis.stores.postgres import read_pool
from chassis.telemetry.log import configure
from chassis.wire import ext_authz_pb2 as wire
from extauth.adapters.accounts import Accounts
from extauth.adapters.directory import Directory
from extauth.adapters.tokens import Tokens, watch
from extauth.servicer import METHOD, Servicer


class Settings(BaseSettings):
    """extauth's own settings; the stores' are in `StoreSettings`."""

    model_config = SettingsConfigDict(env_prefix="PEAJE_EXTAUTH_", frozen=True)

    #: Threads. More than one so that a key found in memory never waits behind one that must be read.
    workers: int = 4
    #: Postgres connections per process; a read takes about a millisecond.
    connections: int = 4


def main() -> None:
    """Serve until SIGTERM."""
    configure("extauth")
    stores, settings = StoreSettings(), Settings()
    pool = read_pool(stores.require_postgres(), name="extauth", connections=settings.connections)
    directory = Directory(pool, clock=utc_now)
    directory.watch(stores.require_postgres())
    accounts = Accounts(pool, clock=utc_now)
    accounts.watch(stores.require_postgres())
    verifiers = watch(stores.home / contract.IDENTITY_PATH, home=stores.home, clock=utc_now)
    catalogue = WatchedCatalogue(stores.home / contract.MODELS_PATH)
    servicer = Servicer(
        directory, peppers=load_peppers(stores.home), catalogue=catalogue.current, clock=utc_now,
        tokens=Tokens(verifiers.current, accounts),
    )
    serve_unary(
        contract.SOCKETS[contract.CLUSTER_EXTAUTH],
        {METHOD: (servicer.check, wire.CheckRequest)},
        workers=settings.workers,
    )
