# SPDX-License-Identifier: Apache-2.0
"""Put ratelimit together: settings, stores, the servicer, the socket."""

from __future__ import annotations

from pydantic_settings import BaseSettings, SettingsConfigDict

from chassis import contract
from chassis.serving import serve_unary
from chassis.settings import StoreSettings
from chassis.stores.postgres import read_pool
from chassis.telemetry.log import configure
from chassis.wire import ratelimit_pb2 as wire
from ratelimit.adapters.counters import LocalCounters, StoredCounters
from ratelimit.adapters.limits_source import LimitsSource
from ratelimit.servicer import METHOD, Servicer, WhenUnavailable


class Settings(BaseSettings):
    """ratelimit's own settings; the stores' are in `StoreSettings`."""

    model_config = SettingsConfigDict(env_prefix="PEAJE_RATELIMIT_", frozen=True)

    #: Threads: each waits for one round trip to the store.
    workers: int = 4
    #: Postgres connections per process; limits are read whole, by one thread.
    connections: int = 1
    #: While the counter store is away: "local" (this process's share), "allow" or "deny" (503).
    when_unavailable: WhenUnavailable = WhenUnavailable.LOCAL
    #: How many ratelimit processes share a limit while each counts alone.
    processes: int = 1


def main() -> None:
    """Serve until SIGTERM."""
    configure("ratelimit")
    stores, settings = StoreSettings(), Settings()
    limits = LimitsSource(
        read_pool(stores.require_postgres(), name="ratelimit", connections=settings.connections)
    )
    limits.watch(stores.require_postgres())
    servicer = Servicer(
        limits,
        StoredCounters(stores.require_redis()),
        LocalCounters(share=1 / settings.processes),
        when_unavailable=settings.when_unavailable,
    )
    serve_unary(
        contract.SOCKETS[contract.CLUSTER_RATELIMIT],
        {METHOD: (servicer.should_rate_limit, wire.RateLimitRequest)},
        workers=settings.workers,
    )
