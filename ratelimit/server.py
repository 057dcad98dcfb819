# SPDX-License-Identifier: Apache-2.0
"""Put ratelimit together: settings, stores, the servicer, the socket."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from chassis import contract
from chassis.clock import utc_now
from chassis.models import WatchedCatalogue
from chassis.serving import door, serve_unary
from chassis.settings import StoreSettings
from chassis.stores.postgres import read_pool
from chassis.telemetry import traces
from chassis.telemetry.log import configure
from chassis.telemetry.metrics import FAILURE_MODE, serve
from chassis.wire import ratelimit_pb2 as wire
from ratelimit.adapters import metrics, tokenizers
from ratelimit.adapters.counters import STORE_TIMEOUT_SECONDS, ClusterCounters, StoredCounters, connect
from ratelimit.adapters.doubts import Doubts
from ratelimit.adapters.limits_source import LimitsSource
from ratelimit.adapters.loans import Loans, repay_for_ever
from ratelimit.adapters.local import Breaker, LocalCounters, probe_until_back
from ratelimit.adapters.outside import Outside, look_for_ever
from ratelimit.adapters.rule_counters import RuleCounters
from ratelimit.adapters.rule_files import DIRECTORY, RuleFiles
from ratelimit.adapters.sweep import Sweep, sweep_for_ever
from ratelimit.core.demand import pool_place
from ratelimit.core.estimate import Estimates
from ratelimit.core.limits import OnStoreError
from ratelimit.generic import GenericServicer, Options, WhenUnavailable, by_domain
from ratelimit.servicer import METHOD, Servicer


class Settings(BaseSettings):
    """ratelimit's own settings; the stores' are in `StoreSettings`."""

    model_config = SettingsConfigDict(env_prefix="PEAJE_RATELIMIT_", frozen=True)

    #: Unix socket, relative to the state directory; each process has its own.
    socket: str = contract.SOCKETS[contract.CLUSTER_RATELIMIT]
    #: host:port to be asked on by TCP instead, with PEAJE_TLS_DIRECTORY; empty: the socket.
    listen: str = ""
    #: Threads: each waits for one round trip to the store.
    workers: int = 4
    #: Postgres connections per process: limits are read whole by one thread, seeds by the others.
    connections: int = 2
    #: How many ratelimit processes share a limit while each counts alone.
    processes: int = Field(default=1, ge=1)
    #: How long an answer of the store is waited for; Envoy waits 0.5 s for the whole decision.
    store_timeout_seconds: float = Field(default=STORE_TIMEOUT_SECONDS, gt=0)
    #: Whether PEAJE_REDIS_URL names a node of a Redis Cluster.
    cluster: bool = False
    #: Output tokens that one choice may have under a hard quota or budget, if the caller names no fewer.
    output_tokens_cap: int = Field(default=16_384, ge=1)
    #: Output tokens that a stream under a hard quota or budget is given at a time where not all of its answer
    #: fits any more; 0: never, its answer is capped to what is left. Fewer cost more calls, more strand less.
    slice_tokens: int = Field(default=256, ge=0)
    #: Also answer with RateLimit and RateLimit-Policy (draft 10, not a standard yet).
    draft_headers: bool = False
    #: Loopback port for Prometheus; 0 shows no metrics.
    metrics_port: int = 0
    #: Directory of the operators' own rules (docs/ratelimit-rls.md), looked for in PEAJE_HOME.
    config: Path = Path(DIRECTORY)
    #: What their requests are told while the counter store is away; "error" leaves it to the asking Envoy.
    rls_when_unavailable: WhenUnavailable = WhenUnavailable.ERROR
    #: Refuse nobody by these rules, only measure.
    rls_shadow_mode: bool = False
    #: Tell their callers ratelimit-limit, -remaining and -reset.
    rls_headers: bool = False
    #: Tell the asking Envoy what was asked and which rules' metadata passed.
    rls_dynamic_metadata: bool = False

    @property
    def generic(self) -> Options:
        """What holds for all rules that operators bring."""
        return Options(
            when_unavailable=self.rls_when_unavailable, shadow_mode=self.rls_shadow_mode, headers=self.rls_headers,
            dynamic_metadata=self.rls_dynamic_metadata,
        )  # fmt: skip


def main() -> None:
    """Serve until SIGTERM."""
    configure("ratelimit")
    traces.configure("ratelimit")
    stores, settings = StoreSettings(), Settings()
    pool = read_pool(stores.require_postgres(), name="ratelimit", connections=settings.connections)
    limits = LimitsSource(pool)
    limits.watch(stores.require_postgres())
    kind = ClusterCounters if settings.cluster else StoredCounters
    store = connect(
        stores.require_redis(), cluster=settings.cluster, timeout_seconds=settings.store_timeout_seconds
    )
    stored = kind(store)
    rules = RuleFiles(stores.home / settings.config)
    rules.watch()

    def probe() -> None:
        threading.Thread(target=probe_until_back, args=(breaker, stored.probe), name="probe", daemon=True).start()

    breaker = Breaker(clock=time.monotonic, opened=probe)
    metrics.STORE_AWAY.set_function(lambda: breaker.is_open)
    def acts(mode: OnStoreError) -> Callable[[], bool]:
        return lambda: breaker.is_open and mode in limits.modes

    for mode in OnStoreError:
        FAILURE_MODE.labels("store", mode.value).set_function(acts(mode))
    # The limits and prices that were read last stay in force.
    FAILURE_MODE.labels("postgres", "as_last_read").set_function(lambda: pool.is_away)
    if settings.metrics_port:
        serve(settings.metrics_port, host=stores.metrics_host)

    def swept() -> list[str]:
        if settings.cluster:
            return [*limits.current.tenants, *map(pool_place, limits.shared_models)]
        sharing = (tenant for model in limits.shared_models for tenant in stored.under_way(model))
        return sorted({*limits.current.tenants, *sharing})

    sweep = Sweep(stored, pool, swept)
    threading.Thread(target=sweep_for_ever, args=(sweep, utc_now), name="sweep", daemon=True).start()
    estimates = Estimates()
    tokenizers.start(WatchedCatalogue(stores.home, process="ratelimit").watch().current, estimates)
    outside = Outside(stored, pool, limits.current.of, limits.spent)
    threading.Thread(target=look_for_ever, args=(outside, utc_now), name="outside", daemon=True).start()
    doubts = Doubts(stored, pool)
    threading.Thread(target=doubts.watch_for_ever, args=(utc_now,), name="doubts", daemon=True).start()
    loans = Loans(stored, pool)
    threading.Thread(target=repay_for_ever, args=(loans, utc_now, limits.current.with_quotas), name="loans", daemon=True).start()
    servicer = Servicer(
        limits,
        stored,
        LocalCounters(share=1 / settings.processes),
        breaker,
        estimates,
        clock=utc_now,
        output_cap=settings.output_tokens_cap,
        slice_tokens=settings.slice_tokens,
        draft_headers=settings.draft_headers,
        doubts=doubts,
        loans=loans,
    )
    generic = GenericServicer(lambda: rules.current, RuleCounters(store), breaker, settings.generic)
    serve_unary(
        door(
            settings.socket, listen=settings.listen, tls_directory=stores.tls_directory, drain_seconds=stores.drain_seconds
        ),
        {METHOD: (by_domain(servicer.should_rate_limit, generic.should_rate_limit), wire.RateLimitRequest)},
        workers=settings.workers,
    )
