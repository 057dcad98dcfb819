# SPDX-License-Identifier: Apache-2.0
"""
Check, every so often, that the ledger has what the engines counted; each interval is a row.

Runs in a thread of its own with a connection of its own: an engine that does not answer never holds
up the collector. Of all collectors on one Postgres one checks, the others wait for its lock.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import psycopg
import structlog

from chassis.models import ModelCatalogue
from chassis.served import Endpoint, Model
from metering.adapters import metrics
from metering.adapters.engines import fetch
from metering.core.conservation import Counters, Interval, State, Watch, unexplained

log = structlog.get_logger()

#: A pool is quiet when it counted nothing and had nothing under way for this long. Half of it lies
#: before the moment that counts and half after, so that Envoy's clock and the engine's work fall on one side.
QUIET_SECONDS = 2.0

_TAKE_LOCK = "select pg_try_advisory_lock(hashtextextended('peaje-conservation', 0))"
#: Every journal must have been read past the end of the interval, or rows of it are still to come.
_IS_READ = "select coalesce(bool_and(read_until > %s), false) from journal_state"
_KEEP = """
insert into conservation_check (model, started_at, ended_at, state, engine_input_tokens, engine_output_tokens,
                                ledger_input_tokens, ledger_output_tokens, request_count, cut_count)
select %(model)s, %(starts_at)s, %(ends_at)s, %(state)s, %(input)s, %(output)s,
       coalesce(sum(input_tokens), 0), coalesce(sum(output_tokens), 0), count(*),
       count(*) filter (where outcome in ('client_closed', 'lost', 'upstream_error'))
from usage_event
where model = %(model)s and ended_at > %(starts_at)s and ended_at <= %(ends_at)s
  -- Streams are shorter than a day; partitions before that need not be looked at.
  and started_at > %(starts_at)s - interval '1 day' and started_at <= %(ends_at)s
  -- What was posted from outside was no request to these engines.
  and dialect <> 'external'
on conflict do nothing
returning ledger_input_tokens - engine_input_tokens, ledger_output_tokens - engine_output_tokens, cut_count
"""


def comparable(models: Iterable[Model]) -> list[Model]:
    """Those whose engines count for nobody else: two that ask one server for the same model are one to its counters."""
    models = list(models)
    counted = Counter(one for model in models for one in _counters_of(model))
    return [model for model in models if all(counted[one] == 1 for one in _counters_of(model))]


def _counters_of(model: Model) -> list[tuple[Endpoint, str]]:
    return [(endpoint, model.engine_name(pool)) for pool in model.pools for endpoint in pool.endpoints]


@dataclass(slots=True, kw_only=True)
class Conservation:
    """The check of all pools of one installation."""

    url: str
    catalogue: Callable[[], ModelCatalogue]
    clock: Callable[[], datetime]
    every_seconds: float
    stop: threading.Event
    watches: dict[str, Watch] = field(default_factory=dict)
    #: Intervals whose rows may not all be in the ledger yet.
    waiting: list[tuple[str, Interval]] = field(default_factory=list)

    def start(self) -> None:
        """Check until the process is asked to stop."""
        threading.Thread(target=self._run, name="conservation", daemon=True).start()

    def look(self) -> None:
        """Look at each pool that has counters; takes `QUIET_SECONDS`."""
        first = self._counters()
        if self.stop.wait(QUIET_SECONDS):
            return
        at = self.clock() - timedelta(seconds=QUIET_SECONDS / 2)
        second = self._counters()
        # A pool whose counters are not to be had (any more) is not quiet either: what was said of it ends in its time.
        for model in self.watches.keys() | second.keys():
            counters = second.get(model)
            quiet = counters if counters is not None and counters.running == 0 and first.get(model) == counters else None
            self.watches[model], interval = self.watches.get(model, Watch()).next(at, quiet)
            if interval is not None:
                self.waiting.append((model, interval))

    def keep(self, connection: psycopg.Connection[Any]) -> None:
        """Write the intervals whose rows are all in the ledger."""
        still = []
        for model, interval in self.waiting:
            if connection.execute(_IS_READ, (interval.ends_at,)).fetchone() != (True,):
                still.append((model, interval))
                continue
            kept = connection.execute(
                _KEEP,
                {
                    "model": model, "starts_at": interval.starts_at, "ends_at": interval.ends_at,
                    "state": interval.state.value, "input": interval.input_tokens, "output": interval.output_tokens,
                },
            ).fetchone()
            if kept is not None:
                _tell(model, interval.state, *kept)
        self.waiting = still

    def _counters(self) -> dict[str, Counters]:
        found = {model.name: fetch(model) for model in comparable(self.catalogue().models)}
        return {name: counters for name, counters in found.items() if counters is not None}

    def _run(self) -> None:
        while not self.stop.is_set():
            try:
                with psycopg.connect(
                    self.url, autocommit=True, application_name="conservation", connect_timeout=3,
                    options="-c statement_timeout=60000",
                ) as connection:
                    while not self.stop.is_set():
                        if connection.execute(_TAKE_LOCK).fetchone() == (True,):
                            self.look()
                            self.keep(connection)
                        self.stop.wait(self.every_seconds)
            except psycopg.Error as exc:
                log.warning("conservation_unavailable", error=type(exc).__name__)
                self.stop.wait(self.every_seconds)


def _tell(model: str, state: State, input_drift: int, output_drift: int, cut_count: int) -> None:
    """Show what the newest interval says; one that cannot be compared says nothing, and what was known before is over."""
    if state is not State.COMPARED:
        metrics.DRIFT_TOKENS.remove(model, "input")
        metrics.DRIFT_TOKENS.remove(model, "output")
        return
    drifts = unexplained(input_drift, cut_count=cut_count), unexplained(output_drift, cut_count=cut_count)
    metrics.DRIFT_TOKENS.labels(model, "input").set(drifts[0])
    metrics.DRIFT_TOKENS.labels(model, "output").set(drifts[1])
    if drifts != (0, 0):
        log.warning("ledger_drift", model=model, input_tokens=drifts[0], output_tokens=drifts[1])
