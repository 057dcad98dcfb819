# SPDX-License-Identifier: Apache-2.0
"""
`python -m metering.collector`: turn the journal into exactly one row per admitted request.

The journal is the buffer. While Postgres is away nothing is lost: the place does not move, and
reading goes on from there. Killed at any moment, it repeats its last batch, and the repeat
changes nothing.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

import psycopg
import structlog
from pydantic_settings import BaseSettings, SettingsConfigDict

from chassis import contract
from chassis.clock import utc_now
from chassis.schema.partitions import ensure_partitions
from chassis.serving import run
from chassis.settings import StoreSettings
from chassis.telemetry.log import configure
from metering.adapters.ledger import Ledger
from metering.adapters.tail import Place, read_batch
from metering.core.fold import fold
from metering.core.journal import Entry, Malformed, parse

log = structlog.get_logger()

READY_MARK = Path("run/collector.ready")
#: Days that a refusal can be explained.
_REFUSALS_KEPT = timedelta(days=7)
_UPKEEP_EVERY = timedelta(hours=1)
_ORPHANS_EVERY = timedelta(seconds=1)


class Settings(BaseSettings):
    """The collector's own settings; the stores' are in `StoreSettings`."""

    model_config = SettingsConfigDict(env_prefix="PEAJE_COLLECTOR_", frozen=True)

    #: The journal's name in the ledger, unique among all Envoys that share a Postgres.
    journal: str = "local"
    #: Between looks at an idle journal; half of it is the usual delay of a row.
    idle_seconds: float = 0.1
    #: Between attempts while Postgres is away.
    retry_seconds: float = 1.0
    #: An open exchange that was silent this long has lost its Envoy: a live one reports each second.
    silent_seconds: float = 30.0


@dataclass(slots=True)
class Collector:
    """Reads one journal into one ledger."""

    path: Path
    ledger: Ledger
    settings: Settings
    place: Place | None = None
    epoch: str = ""
    upkeep_due: datetime | None = None
    orphans_due: datetime | None = None
    stop: threading.Event = field(default_factory=threading.Event)

    def step(self, now: datetime) -> bool:
        """Commit one batch if there is one; whether there may be more at once."""
        self._upkeep(now)
        lines, place = read_batch(self.path, self.place)
        if not lines:
            self.place = place
            self._close_orphans(now)
            return False
        batch = fold(_entries(lines))
        assert place is not None
        added = self.ledger.write(batch, place, now)
        self.place = place
        self.epoch = batch.epoch or self.epoch
        absorbed = len(batch.events) - added
        log.debug("batch", lines=len(lines), added=added, absorbed=absorbed, open=len(batch.open))
        return True

    def _close_orphans(self, now: datetime) -> None:
        # Only at the end of the journal: before that, silence may just be unread records.
        if self.orphans_due and now < self.orphans_due:
            return
        self.orphans_due = now + _ORPHANS_EVERY
        silent_before = now - timedelta(seconds=self.settings.silent_seconds)
        closed = self.ledger.close_orphans(epoch=self.epoch, silent_before=silent_before, now=now)
        if closed:
            log.warning("orphans_closed", count=closed)

    def _upkeep(self, now: datetime) -> None:
        if self.upkeep_due and now < self.upkeep_due:
            return
        self.upkeep_due = now + _UPKEEP_EVERY
        with self.ledger.connection.transaction():
            ensure_partitions(self.ledger.connection, now.date())
        self.ledger.forget_refusals(now - _REFUSALS_KEPT)


def _entries(lines: Iterable[bytes]) -> Iterable[Entry]:
    for line in lines:
        if not line:
            continue
        try:
            yield parse(line)
        except Malformed as exc:
            log.error("journal_line_malformed", reason=str(exc))


def main() -> None:
    """Collect until SIGTERM; on the way out, read what is left."""
    configure("collector")
    stores, settings = StoreSettings(), Settings()
    path = stores.home / contract.JOURNAL_PATH
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    while True:
        try:
            ledger = Ledger(stores.require_postgres(), settings.journal)
            collector = Collector(path=path, ledger=ledger, settings=settings, place=ledger.place(), stop=stop)
            _run(collector)
            ledger.close()
            return
        except psycopg.Error as exc:
            log.error("ledger_unavailable", error=type(exc).__name__, reason=str(exc).splitlines()[0])
            if stop.wait(settings.retry_seconds):
                return


def _run(collector: Collector) -> None:
    log.info("collecting", journal=collector.settings.journal)
    while True:
        more = collector.step(utc_now())
        if not READY_MARK.exists():
            READY_MARK.parent.mkdir(exist_ok=True)
            READY_MARK.touch(mode=0o600)
        if more:
            continue
        if collector.stop.is_set():
            return
        collector.stop.wait(collector.settings.idle_seconds)


if __name__ == "__main__":
    run(main)
