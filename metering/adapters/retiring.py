# SPDX-License-Identifier: Apache-2.0
"""
Retire a journal whose Envoy is gone for good, so that nothing waits for it any more.

What was last heard of its open exchanges becomes their row, as for any Envoy that died. Months close,
and the second witness is compared, without it; of what the witness saw and the journal would have told,
exceptions remain. A journal that is read again after all is there again, and what it tells is late.
Raises psycopg errors.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, Final

import orjson
import psycopg
from psycopg.rows import tuple_row

from chassis.errors import Conflict, NotFound
from metering.adapters.ledger import add_events
from metering.core.journal import leases_of, lost_event, parse

#: One that was read to its end so lately may only be between two collectors.
ALIVE_WITHIN: Final = timedelta(minutes=5)
#: Open exchanges that are closed at once.
STEP_MAX: Final = 1000

#: What a collector holds for as long as it reads the journal; whoever holds it here keeps collectors away.
_TAKE: Final = "select pg_try_advisory_xact_lock(hashtextextended('peaje-journal:' || %s, 0))"
_READ_UNTIL: Final = "select read_until from journal_state where journal = %s"
_OPEN: Final = "select entry from open_exchange where journal = %s order by started_at, request_id limit %s"
_KEEP: Final = """
insert into retired_journal (journal, retired_at, retired_by, reason, read_until, closed_count, files)
values (%s, %s, %s, %s, %s, %s, %s)
"""


class Files(StrEnum):
    """Why nothing of a journal is left unread."""

    #: Somebody has compared its files with what was read of them.
    READ = "read"
    #: They are gone with their disk.
    GONE = "gone"


@dataclass(frozen=True, slots=True, kw_only=True)
class Retired:
    """A journal that nothing waits for any more."""

    journal: str
    read_until: datetime
    closed_count: int
    files: Files


def retire(connection: psycopg.Connection[Any], journal: str, *, files: Files, reason: str, by: str, now: datetime) -> Retired:
    """Retire *journal* in the caller's transaction; raises `NotFound`, or `Conflict` for one that is alive."""
    with connection.cursor(row_factory=tuple_row) as cursor:
        if cursor.execute(_TAKE, (journal,)).fetchone() != (True,):
            raise Conflict(f"A collector reads the journal {journal!r}.", mend="It holds nothing back: leave it.")
        found = cursor.execute(_READ_UNTIL, (journal,)).fetchone()
        if found is None:
            raise NotFound(f"Nothing waits for a journal {journal!r}.", mend="See `peaje journal list`.")
        if now - found[0] < ALIVE_WITHIN:
            raise Conflict(
                f"The journal {journal!r} was read less than {ALIVE_WITHIN.seconds // 60} minutes ago.",
                mend="Wait: its collector may only be restarting.",
            )
        closed = _close_open(connection, cursor, journal, now)
        cursor.execute("delete from journal_state where journal = %s", (journal,))
        cursor.execute(_KEEP, (journal, now, by, reason, found[0], closed, files.value))
    return Retired(journal=journal, read_until=found[0], closed_count=closed, files=files)


def _close_open(connection: psycopg.Connection[Any], cursor: psycopg.Cursor[Any], journal: str, now: datetime) -> int:
    cursor.execute("create temp table incoming (like usage_event) on commit drop")
    closed = 0
    while rows := cursor.execute(_OPEN, (journal, STEP_MAX)).fetchall():
        entries = [parse(orjson.dumps(entry)) for (entry,) in rows]
        add_events(connection, [lost_event(entry) for entry in entries], now, leases=leases_of(entries))
        cursor.execute("truncate incoming")
        closed += len(rows)
    return closed
