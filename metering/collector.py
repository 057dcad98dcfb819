# SPDX-License-Identifier: Apache-2.0
"""
`python -m metering.collector`: turn the journal into exactly one row per admitted request.

The journal is the buffer. While Postgres is away nothing is lost: the place does not move, and
reading goes on from there. Killed at any moment, it repeats its last batch, and the repeat
changes nothing. One batch is in memory at a time; whatever is not read yet waits on disk.
"""

from __future__ import annotations

import contextlib
import gc
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

import httpx
import psycopg
import structlog
from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from chassis import contract
from chassis.clock import utc_now
from chassis.models import WatchedCatalogue
from chassis.schema.partitions import ensure_partitions, retire_partitions
from chassis.serving import run
from chassis.settings import StoreSettings
from chassis.telemetry import traces
from chassis.telemetry.log import configure
from chassis.telemetry.metrics import FAILURE_MODE, serve
from metering.adapters import metrics, told
from metering.adapters.conservation import Conservation
from metering.adapters.disk import Disk
from metering.adapters.ledger import Ledger
from metering.adapters.reading import Reader, Reading
from metering.adapters.rotation import Rotation
from metering.adapters.sources import JOURNALS_MAX, Source, find_sources, read_sources
from metering.adapters.tail import Alarm, JournalFile, Piece, Place, look, torn_tail, vanished
from metering.core import lines
from metering.core.fold import Batch
from metering.core.lives import Lives
from metering.core.watermark import Level, WhenFull

log = structlog.get_logger()

READY_MARK = Path("run/collector.ready")
#: Days that a refusal can be explained.
_REFUSALS_KEPT = timedelta(days=7)
#: Ratelimit has asked what a lease was spent on long before.
_LEASES_KEPT = timedelta(hours=48)
_REOPEN_TIMEOUT_SECONDS = 2.0
#: What one record can be to blame for. Any other refusal (a right, a missing table) concerns all of
#: them and is waited out.
_POISON = (psycopg.DataError, psycopg.errors.CheckViolation, psycopg.errors.NotNullViolation)
GARBAGE_THRESHOLD = 100_000
#: Seconds between looks, by a steady clock.
_UPKEEP_EVERY = 3600.0
#: Leases end by the second, each with a sum, and one pass drops only so many.
_LEASES_EVERY = 60.0
_FILES_EVERY = 5.0
_ORPHANS_EVERY = 1.0
_GARBAGE_EVERY = 10.0
#: Between looks for journals that are new, and for a reader that ended too early.
_DIRECTORY_EVERY = 2.0


class Settings(BaseSettings):
    """The collector's own settings; the stores' are in `StoreSettings`."""

    model_config = SettingsConfigDict(env_prefix="PEAJE_COLLECTOR_", frozen=True, populate_by_name=True)

    #: The journal's name in the ledger, unique among all Envoys that share a Postgres.
    journal: str = "local"
    #: Instead of this installation's own: NAME=PATH[@ADMIN_PORT] of each, separated by commas, or a
    #: directory that has one per journal, which is looked at every few seconds.
    journals: str = ""
    #: Between looks at a journal that was read to its end; half of it is the usual delay of a row. A batch costs
    #: Postgres about the same for one row as for a hundred, so looking more often costs more than it shows.
    idle_seconds: float = 1.0
    #: Between attempts while Postgres is away.
    retry_seconds: float = 1.0
    #: An open exchange that was silent this long has lost its Envoy: a live one reports each second.
    silent_seconds: float = 30.0
    #: Size at which the live journal is renamed: about 400,000 records.
    rotate_bytes: int = Field(default=256 << 20, gt=0)
    #: Old files that stay after they were read, for `peaje journal replay`.
    kept_files: int = Field(default=8, ge=0)
    #: Between looks at the engines' own counters; 0: none.
    conservation_seconds: float = Field(default=20.0, ge=0)
    #: Rows of closed months older than this are dropped; their sums and hashes stay. 0: none ever.
    retention_days: int = Field(default=0, ge=0)
    #: What happens to new requests when the journal's disk is 95 % full.
    when_full: WhenFull = WhenFull.REFUSE
    #: Envoy's admin interface, on loopback: it is asked to reopen a renamed journal.
    admin_port: int = Field(default=9901, validation_alias="PEAJE_ADMIN_PORT")
    #: Loopback port for Prometheus; 0 shows no metrics.
    metrics_port: int = Field(default=0, ge=0, le=65535)
    #: Tenants that have series of their own there, eleven each; all others share one label.
    metrics_tenants: int = Field(default=100, ge=0, le=10_000)


@dataclass(slots=True)
class Due:
    """
    Something to do every so often, by a steady clock in seconds; the first time at once.

    >>> due = Due(every=10.0)
    >>> [due.now(at) for at in (3.0, 12.9, 13.0, 22.9)]
    [True, False, True, False]
    """

    every: float
    at: float = 0.0

    def now(self, monotonic: float) -> bool:
        """Whether it is time; if so, the next time is set."""
        if monotonic < self.at:
            return False
        self.at = monotonic + self.every
        return True


@dataclass(slots=True)
class Collector:
    """Reads one journal into one ledger."""

    name: str
    live: Path
    ledger: Ledger
    settings: Settings
    rotation: Rotation
    disk: Disk
    places: dict[str, Place]
    lives: Lives
    exchanges: metrics.Exchanges
    reader: Reader = field(default_factory=Reader)
    #: When open exchanges were last marked: silence counts from there. None: not in this life.
    marked: float | None = None
    missing: frozenset[str] = frozenset()
    _upkeep_due: Due = field(default_factory=lambda: Due(_UPKEEP_EVERY))
    _leases_due: Due = field(default_factory=lambda: Due(_LEASES_EVERY))
    _files_due: Due = field(default_factory=lambda: Due(_FILES_EVERY))
    _orphans_due: Due = field(default_factory=lambda: Due(_ORPHANS_EVERY))

    def step(self, now: datetime, monotonic: float) -> bool:
        """
        Commit one batch if there is one; whether there is more to be read at once.

        *now* dates what is written; what must wait is measured by *monotonic*, in seconds, so that
        a jump of the clock closes nothing too early and nothing too late.
        """
        if self._upkeep_due.now(monotonic):
            self._upkeep(now)
        if self._leases_due.now(monotonic):
            self.ledger.forget_leases(now - _LEASES_KEPT)
        if self._files_due.now(monotonic):
            try:
                self._look_after_files(now, monotonic)
            except OSError as exc:
                # A disk that takes no change may still be read, and what is on it is owed.
                log.error("journal_files_unavailable", journal=self.name, error=type(exc).__name__, reason=exc.strerror)
        # A life that is found to be over only now may have written its last records after we had looked there.
        ended = self.lives.ended
        reading = self.reader.next(self.live, self.places)
        if reading.pieces:
            self._collect(reading, now)
        if not reading.is_last:
            return True
        # Only at the end of the journal: before that, silence may just be unread records.
        if self._orphans_due.now(monotonic):
            self._close_orphans(ended, now, monotonic)
            self.ledger.keep_read_until(now)
        metrics.LAG_SECONDS.labels(self.name).set_function(_seconds_since(monotonic))
        return False

    def _collect(self, reading: Reading, now: datetime) -> None:
        try:
            self._write(reading.batch, reading.pieces, now)
        except _POISON as exc:
            # Well-formed for us and refused by Postgres: one record must not hold up the rest.
            for piece in reading.pieces:
                log.error("batch_refused", error=type(exc).__name__, file=piece.place.name, offset=piece.start)
                self._collect_singly(piece, now)

    def _collect_singly(self, piece: Piece, now: datetime) -> None:
        offset = piece.start
        for line in piece.data.split(b"\n"):
            behind = offset + len(line) + 1
            single = Piece(start=offset, data=line, place=Place(piece.place.file_id, piece.place.name, behind))
            try:
                self._write(self.reader.read(single), [single], now)
            except _POISON as exc:
                reason = f"{type(exc).__name__} from Postgres"
                found = lines.defect(line, offset=offset, reason=reason)
                self._write(Batch(defects={piece.place.file_id: [found]}), [single], now)
            offset = behind

    def _write(self, batch: Batch, pieces: Sequence[Piece], now: datetime) -> None:
        lives, began = self.lives, time.monotonic()
        for stream, epochs in batch.lives.items():
            lives = lives.after(stream, epochs)
        added = self.ledger.write(batch, pieces, now, lives=None if lives is self.lives else lives)
        self.lives = lives
        for piece in pieces:
            self.places[piece.place.file_id] = piece.place
            if piece.alarm is not None:
                log.error("journal_changed", reason=piece.alarm.reason, file=piece.place.name, offset=piece.alarm.place.offset)
            for found in batch.defects.get(piece.place.file_id, ()):
                log.error("journal_defect", reason=found.reason, file=piece.place.name, offset=found.offset)
                metrics.DEFECTS.labels(self.name).inc()
        rows = [(batch.events[request_id], batch.ended[request_id]) for request_id in added]
        self.exchanges.recorded(rows, now)
        told.recorded(rows, journal=self.name, began=now, ended=now + timedelta(seconds=time.monotonic() - began))
        for refusal in batch.refusals:
            self.exchanges.refused(refusal)
        absorbed = len(batch.events) - len(added)
        metrics.DUPLICATES_ABSORBED.inc(absorbed)
        size = sum(len(piece.data) for piece in pieces)
        log.debug("batch", bytes=size, added=len(added), absorbed=absorbed, open=len(batch.open))

    def _close_orphans(self, ended: Sequence[str], now: datetime, monotonic: float) -> None:
        silent = self.marked is not None and monotonic - self.marked >= self.settings.silent_seconds
        closed = self.ledger.close_orphans(ended=ended, silent=silent, now=now)
        if closed:
            metrics.ORPHANS_CLOSED.labels(self.name).inc(closed)
            log.warning("orphans_closed", count=closed, silent=silent)
        elif silent or self.marked is None:
            self.ledger.mark_open(now)
            self.marked = monotonic

    def _look_after_files(self, now: datetime, monotonic: float) -> None:
        kept = 0 if self.disk.look() is Level.ACT else self.settings.kept_files
        self._measure()
        self.rotation.rotate()
        done = self.rotation.done(monotonic)
        for file in done:
            place = self.places.get(file.file_id)
            torn = place and torn_tail(file, place)
            if torn:
                found = lines.defect(torn.data, offset=torn.start, reason="no line end when its writer left")
                self._write(Batch(defects={file.file_id: [found]}), [torn], now)
        for file in self.rotation.superfluous(done, self.places, kept_files=kept):
            file.path.unlink(missing_ok=True)
            self.ledger.forget_file(self.places.pop(file.file_id), now)
            log.info("journal_file_removed", file=file.path.name)
        self._tell_of_missing(now)

    def _measure(self) -> None:
        metrics.DISK_USED_PERCENT.labels(self.name).set(self.disk.used_percent)
        metrics.ROAD_CLOSED.labels(self.name).set(self.disk.closed_mark.exists())
        FAILURE_MODE.labels("disk", self.settings.when_full.value).set(self.disk.level is Level.ACT)
        unread = sum(file.size - min(file.size, _offset_of(self.places, file)) for file in look(self.live))
        metrics.LAG_BYTES.labels(self.name).set(unread)
        metrics.EXCEPTIONS_OPEN.set(self.ledger.exceptions_open())

    def _tell_of_missing(self, now: datetime) -> None:
        # Twice in a row: somebody else's rename may hide a file from one look.
        gone = {place.file_id: place for place in vanished(self.live, self.places)}
        for file_id in self.missing & gone.keys():
            place = self.places.pop(file_id)
            self.ledger.forget_file(place, now, Alarm(reason="the file is gone", place=place))
            log.error("journal_changed", reason="the file is gone", file=place.name, offset=place.offset)
        self.missing = frozenset(gone) - self.missing

    def _upkeep(self, now: datetime) -> None:
        with self.ledger.connection.transaction():
            ensure_partitions(self.ledger.connection, now.date())
            if self.settings.retention_days:
                before = now.date() - timedelta(days=self.settings.retention_days)
                for name in retire_partitions(self.ledger.connection, before=before, now=now):
                    log.info("day_retired", table=name)
        self.ledger.forget_refusals(now - _REFUSALS_KEPT)


def _seconds_since(monotonic: float) -> Callable[[], float]:
    return lambda: time.monotonic() - monotonic


def _offset_of(places: Mapping[str, Place], file: JournalFile) -> int:
    """How far *file* has been read."""
    place = places.get(file.file_id)
    return place.offset if place else 0


def reopen_journal(admin_port: int) -> bool:
    """Ask Envoy to write to the file that now has the journal's name; whether it said yes."""
    try:
        return httpx.post(f"http://127.0.0.1:{admin_port}/reopen_logs", timeout=_REOPEN_TIMEOUT_SECONDS).is_success
    except httpx.HTTPError:
        return False


def main() -> None:
    """Collect until SIGTERM; on the way out, read what is left."""
    configure("collector")
    traces.configure("collector")
    # A batch is tens of thousands of small dicts without a cycle; looking for one costs a seventh of the work.
    gc.set_threshold(GARBAGE_THRESHOLD)
    gc.freeze()
    stores, settings = StoreSettings(), Settings()
    own = Source(name=settings.journal, live=stores.home / contract.JOURNAL_PATH, admin_port=settings.admin_port)
    directory = Path(settings.journals).absolute() if settings.journals and Path(settings.journals).is_dir() else None
    sources = [own] if not settings.journals else [] if directory else read_sources(settings.journals)
    url, stop = stores.require_postgres(), threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    if settings.metrics_port:
        serve(settings.metrics_port, host=stores.metrics_host)
    if settings.conservation_seconds:
        Conservation(
            url=url, catalogue=WatchedCatalogue(stores.home, process="collector").watch().current,
            clock=utc_now, every_seconds=settings.conservation_seconds, stop=stop,
        ).start()
    exchanges = metrics.Exchanges(tenants_max=settings.metrics_tenants)
    try:
        collect_all(sources, directory, lambda source: collect(source, url, settings, stop, exchanges), stop)
    finally:
        traces.stop()


def collect_all(
    sources: Sequence[Source], directory: Path | None, collect_one: Callable[[Source], None], stop: threading.Event
) -> None:
    """A thread per journal, so that a slow or broken one holds up no other; new ones of *directory* as they come."""
    running: dict[str, Future[None]] = {}
    garbage_due = Due(_GARBAGE_EVERY)
    with ThreadPoolExecutor(JOURNALS_MAX, thread_name_prefix="journal") as pool:
        while True:
            for source in sources if directory is None else find_sources(directory):
                if source.name not in running and len(running) < JOURNALS_MAX:
                    running[source.name] = pool.submit(collect_one, source)
            if garbage_due.now(time.monotonic()):
                # What a batch does leaves cycles behind, 5 MiB a minute at rest as well.
                gc.collect()
            over = stop.wait(_DIRECTORY_EVERY)
            for future in running.values():
                # What ends before it was asked to is a defect of ours: the process dies of it and is started again.
                if future.done() and future.exception() is not None:
                    stop.set()
                    over = True
            if over:
                break
    for future in running.values():
        future.result()


def collect(
    source: Source, url: str, settings: Settings, stop: threading.Event, exchanges: metrics.Exchanges
) -> None:
    """Read one journal until *stop*, and then what is left of it; what is away is waited for."""
    disk = Disk(
        directory=source.live.parent, closed_mark=source.live.with_name(Path(contract.JOURNAL_CLOSED_PATH).name),
        when_full=settings.when_full,
    )
    metrics.LAG_SECONDS.labels(source.name).set_function(_seconds_since(time.monotonic()))
    # A counter that appears with its first count has never grown, as Prometheus sees it.
    metrics.DEFECTS.labels(source.name)
    metrics.ORPHANS_CLOSED.labels(source.name)
    port = source.admin_port
    rotation = Rotation(
        live=source.live, bytes_max=settings.rotate_bytes, reopen=None if port is None else lambda: reopen_journal(port)
    )
    while True:
        try:
            source.live.parent.mkdir(mode=0o700, exist_ok=True)
            ledger = Ledger(url, source.name)
            try:
                _run(
                    Collector(
                        source.name, source.live, ledger, settings, rotation, disk, ledger.places(), ledger.lives(),
                        exchanges,
                    ),
                    stop,
                )
            finally:
                ledger.close()
            return  # noqa: TRY300 - an `else` would be read as that of the loop
        except psycopg.Error as exc:
            log.error("ledger_unavailable", journal=source.name, error=type(exc).__name__, reason=str(exc).splitlines()[0])
        except OSError as exc:
            log.error("journal_unavailable", journal=source.name, error=type(exc).__name__, reason=exc.strerror)
        with contextlib.suppress(OSError):
            # The journal grows meanwhile; it must not fill the disk unwatched.
            disk.look()
        if stop.wait(settings.retry_seconds):
            return


def _run(collector: Collector, stop: threading.Event) -> None:
    log.info("collecting", journal=collector.name)
    while True:
        # Asked before the look: what was written before the signal is read after it.
        is_last = stop.is_set()
        more = collector.step(utc_now(), time.monotonic())
        if not READY_MARK.exists():
            READY_MARK.parent.mkdir(exist_ok=True)
            READY_MARK.touch(mode=0o600)
        if more:
            continue
        if is_last:
            return
        stop.wait(collector.settings.idle_seconds)


if __name__ == "__main__":
    run(main)
