# SPDX-License-Identifier: Apache-2.0
"""
Write a batch to Postgres: rows, hourly sums, open exchanges and the journal's place, at once.

A crash at any moment repeats the batch, and the repeat changes nothing: rows conflict on
(started_at, request_id), sums grow only by rows that were new.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, fields
from datetime import datetime
from typing import Any, Final

import orjson
import psycopg
from psycopg.types.json import Jsonb

from metering.adapters.tail import Place
from metering.core.fold import Batch
from metering.core.journal import Entry, UsageEvent, lost_event, parse

_EVENT_COLUMNS: Final = tuple(field.name for field in fields(UsageEvent))
#: Refusals kept per batch: a flood of 429s must not become a flood of writes.
REFUSALS_PER_BATCH_MAX: Final = 200

_PREPARE: Final = """
create temp table incoming (like usage_event) on commit delete rows;
create temp table incoming_open (like open_exchange) on commit delete rows;
"""

_COPY_EVENTS: Final = (
    "copy incoming (request_id, tenant_id, project_id, key_id, model, dialect, started_at, ended_at, status, "
    "outcome, input_tokens, output_tokens, cached_tokens, reasoning_tokens, basis, anomaly, streamed, upstream, "
    "recorded_at) from stdin"
)

#: New rows go in, known ones are absorbed; the hour's sums follow exactly the rows that were new.
_ADD_EVENTS: Final = """
with fresh as (
    insert into usage_event select * from incoming on conflict do nothing returning *
), summed as (
    insert into usage_hour
    select date_trunc('hour', started_at at time zone 'UTC') at time zone 'UTC',
           tenant_id, project_id, key_id, model, count(*),
           sum(input_tokens), sum(output_tokens), sum(cached_tokens), sum(reasoning_tokens)
    from fresh
    group by 1, 2, 3, 4, 5
    on conflict (hour, tenant_id, project_id, key_id, model) do update set
        request_count    = usage_hour.request_count + excluded.request_count,
        input_tokens     = usage_hour.input_tokens + excluded.input_tokens,
        output_tokens    = usage_hour.output_tokens + excluded.output_tokens,
        cached_tokens    = usage_hour.cached_tokens + excluded.cached_tokens,
        reasoning_tokens = usage_hour.reasoning_tokens + excluded.reasoning_tokens
)
select request_id from fresh
"""

#: Absorbed rows whose numbers differ from what stands: kept for a person, never applied.
_CONFLICTS: Final = """
select i.request_id from incoming i join usage_event u using (started_at, request_id)
where i.request_id = any(%s)
  and (i.tenant_id, i.input_tokens, i.output_tokens, i.status, i.outcome)
      is distinct from (u.tenant_id, u.input_tokens, u.output_tokens, u.status, u.outcome)
"""

_KEEP_OPEN: Final = """
insert into open_exchange
select i.* from incoming_open i
where not exists (
    select from usage_event u where u.started_at = i.started_at and u.request_id = i.request_id
)
on conflict (request_id) do update set seen_at = excluded.seen_at, entry = excluded.entry
where excluded.seen_at >= open_exchange.seen_at
"""

_ORPHANS: Final = """
select entry from open_exchange
where journal = %(journal)s and ((%(epoch)s <> '' and epoch <> %(epoch)s) or seen_at < %(silent_before)s)
order by started_at
limit 1000
for update skip locked
"""


class Ledger:
    """One connection, one journal; raises psycopg errors, which the collector takes as "later"."""

    def __init__(self, url: str, journal: str) -> None:
        self._journal = journal
        self._connection = psycopg.connect(
            url, application_name="collector", connect_timeout=3, options="-c statement_timeout=60000",
            keepalives_idle=5, keepalives_interval=2, keepalives_count=3,
        )
        self._connection.execute("set synchronous_commit = on")
        # Two collectors on one journal would fight over its place.
        locked = self._connection.execute(
            "select pg_try_advisory_lock(hashtextextended('peaje-journal:' || %s, 0))", (journal,)
        ).fetchone()
        if not locked or not locked[0]:
            self._connection.close()
            raise psycopg.OperationalError("another collector reads this journal")
        self._connection.execute(_PREPARE)
        self._connection.commit()

    @property
    def connection(self) -> psycopg.Connection[Any]:
        """The connection, for upkeep between batches."""
        return self._connection

    def place(self) -> Place | None:
        """How far the journal has been read, None if never."""
        with self._connection.transaction():
            row = self._connection.execute(
                "select file_id, byte_offset from journal_position where journal = %s", (self._journal,)
            ).fetchone()
        return Place(*row) if row else None

    def write(self, batch: Batch, place: Place, now: datetime) -> int:
        """Commit *batch* and *place* together; returns how many rows were new."""
        with self._connection.transaction():
            added = self._add(batch.events.values(), now)
            absorbed = [request_id for request_id in batch.events if request_id not in added]
            if absorbed:
                self._keep_conflicts(absorbed, batch.ended, now)
            self._keep_open(batch.open.values())
            if batch.events:
                self._connection.execute(
                    "delete from open_exchange where request_id = any(%s)", (list(batch.events),)
                )
            self._keep_refusals(batch)
            self._connection.execute(
                """
                insert into journal_position values (%s, %s, %s, %s)
                on conflict (journal) do update
                set file_id = excluded.file_id, byte_offset = excluded.byte_offset, updated_at = excluded.updated_at
                """,
                (self._journal, place.file_id, place.offset, now),
            )
        return len(added)

    def close_orphans(self, *, epoch: str, silent_before: datetime, now: datetime) -> int:
        """
        Give a row to each open exchange whose Envoy is gone: of another life than *epoch* (if
        that is known), or not heard of since *silent_before* although every live stream reports each second.
        """
        with self._connection.transaction():
            rows = self._connection.execute(
                _ORPHANS, {"journal": self._journal, "epoch": epoch, "silent_before": silent_before}
            ).fetchall()
            entries = [parse(orjson.dumps(row[0])) for row in rows]
            if entries:
                self._add([lost_event(entry) for entry in entries], now)
                self._connection.execute(
                    "delete from open_exchange where request_id = any(%s)",
                    ([entry.request_id for entry in entries],),
                )
        return len(rows)

    def forget_refusals(self, before: datetime) -> None:
        """Drop refusals older than *before*."""
        with self._connection.transaction():
            self._connection.execute("delete from refusal where started_at < %s", (before,))

    def close(self) -> None:
        """Close the connection; the lock goes with it."""
        self._connection.close()

    def _add(self, events: Iterable[UsageEvent], now: datetime) -> set[str]:
        rows = [(*astuple(event), now) for event in events]
        if not rows:
            return set()
        with self._connection.cursor() as cursor:
            with cursor.copy(_COPY_EVENTS) as copy:
                for row in rows:
                    copy.write_row(row)
            added = {row[0] for row in cursor.execute(_ADD_EVENTS).fetchall()}
        return added

    def _keep_conflicts(self, absorbed: Sequence[str], ended: dict[str, Entry], now: datetime) -> None:
        rows = self._connection.execute(_CONFLICTS, (list(absorbed),)).fetchall()
        for (request_id,) in rows:
            entry = ended[request_id]
            self._connection.execute(
                "insert into usage_conflict values (%s, %s, %s, %s)",
                (request_id, entry.started_at, now, Jsonb(entry.fields)),
            )

    def _keep_open(self, entries: Iterable[Entry]) -> None:
        rows = [
            (e.request_id, e.started_at, e.seen_at, self._journal, e.epoch, Jsonb(e.fields)) for e in entries
        ]
        if not rows:
            return
        with self._connection.cursor() as cursor:
            with cursor.copy("copy incoming_open from stdin") as copy:
                for row in rows:
                    copy.write_row(row)
            cursor.execute(_KEEP_OPEN)

    def _keep_refusals(self, batch: Batch) -> None:
        if not batch.refusals:
            return
        with self._connection.cursor() as cursor:
            cursor.executemany(
                "insert into refusal values (%s, %s, %s, %s, %s, %s, %s) on conflict do nothing",
                [astuple(refusal) for refusal in batch.refusals[:REFUSALS_PER_BATCH_MAX]],
            )
