# SPDX-License-Identifier: Apache-2.0
"""
Write a batch to Postgres: rows, amounts, hourly sums, open exchanges and the journal's place, at once.

A crash at any moment repeats the batch, and the repeat changes nothing: rows conflict on
(started_at, request_id), sums grow only by rows that were new.

What each lease of quotas was spent on is such a sum too: ratelimit settles by it what it has lent.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import astuple, fields
from datetime import datetime
from typing import Any, Final, get_type_hints

import orjson
import psycopg
from psycopg.rows import tuple_row
from psycopg.types.json import Jsonb, set_json_dumps

from metering.adapters.tail import Alarm, Piece, Place
from metering.core.fold import Batch
from metering.core.journal import Entry, UsageEvent, leases_of, lost_event, parse
from metering.core.lines import Defect
from metering.core.lives import ENDED_LIVES_MAX, Lives
from metering.core.rating import RateCard, RateCards, Tier, amount_nano

#: Refusals kept per batch: a flood of 429s must not become a flood of writes.
REFUSALS_PER_BATCH_MAX: Final = 200
#: Open exchanges that are closed in one transaction.
_ORPHANS_PER_STEP_MAX: Final = 1000
#: Sums of leases that are dropped in one transaction: about what a thousand busy workers leave behind in a minute.
LEASES_PER_PASS_MAX: Final = 20_000
_TAKEOVER_TIMEOUT: Final = "2s"
#: Shared by every transaction that charges; whoever changes prices or closes a period takes it alone,
#: so that a change is in no transaction's past and future at once.
CHARGING_LOCK: Final = 0x7065616A_65000003
#: Held by every transaction that writes to the outbox, from before its first row until its commit.
OUTBOX_LOCK: Final = 0x7065616A_65000004

_TIER_FIELDS: Final = tuple(field.name for field in fields(Tier))
_TYPES: Final[Mapping[Any, str]] = {str: "text", str | None: "text", datetime: "timestamptz", int: "int8", bool: "bool"}
#: In binary, as a row costs a quarter of what its text costs; so each value's type has to be said.
_COPIED: Final[Mapping[str, str]] = {
    **{name: _TYPES[kind] for name, kind in get_type_hints(UsageEvent).items()},
    "status": "int4", "currency": "text", "amount_nano": "int8", "rate_card_id": "int8", "tier_above_tokens": "int8",
    "recorded_at": "timestamptz",
}
_COPY_EVENTS: Final = f"copy incoming ({', '.join(_COPIED)}) from stdin (format binary)"

#: Each commit empties it, which is one file less where no value can be put aside into a second one.
_PREPARE: Final = f"""
create temp table incoming (like usage_event) on commit delete rows;
alter table incoming {", ".join(f"alter {name} set storage plain" for name, kind in _COPIED.items() if kind == "text")};
"""

_TAKE_CHARGING_LOCK: Final = "select pg_advisory_xact_lock_shared(%s)"

_RATE_CARDS: Final = """
select rate_card_id, tenant_id, model, currency, input_nano, output_nano, cached_nano, reasoning_nano, minimum_nano,
       meter, each_nano, lower(effective), upper(effective), tiers
from rate_card
where model = any(%s) and (tenant_id is null or tenant_id = any(%s)) and effective && tstzrange(%s, %s, '[]')
"""

#: New rows go in, known ones are absorbed, and neither is open any more; the hour's sums, and the adjustments of
#: months that are closed, follow exactly the rows that were new. Then their ids, and a null if somebody wants to be
#: told of rows: asked once a batch, for a row of the outbox is only written then.
_ADD_EVENTS: Final = """
with fresh as (
    insert into usage_event select * from incoming i
    -- Rows of a retired day are gone: nobody can say whether this one was among them.
    where not exists (select from usage_retired r where r.day = (i.started_at at time zone 'UTC')::date)
    on conflict do nothing returning *
), summed as (
    insert into usage_hour (hour, tenant_id, project_id, key_id, model, currency, meter, request_count,
                            input_tokens, output_tokens, cached_tokens, reasoning_tokens, quantity, amount_nano)
    select date_trunc('hour', started_at, 'UTC'), tenant_id, project_id, key_id, model, coalesce(currency, ''),
           coalesce(meter, ''), count(*), sum(input_tokens), sum(output_tokens), sum(cached_tokens), sum(reasoning_tokens),
           sum(quantity), coalesce(sum(amount_nano), 0)
    from fresh
    group by 1, 2, 3, 4, 5, 6, 7
    -- Two collectors that meet in an hour lock its rows in the same order.
    order by 1, 2, 3, 4, 5, 6, 7
    on conflict (hour, tenant_id, project_id, key_id, model, currency, meter) do update set
        request_count    = usage_hour.request_count + excluded.request_count,
        input_tokens     = usage_hour.input_tokens + excluded.input_tokens,
        output_tokens    = usage_hour.output_tokens + excluded.output_tokens,
        cached_tokens    = usage_hour.cached_tokens + excluded.cached_tokens,
        reasoning_tokens = usage_hour.reasoning_tokens + excluded.reasoning_tokens,
        quantity         = usage_hour.quantity + excluded.quantity,
        amount_nano      = usage_hour.amount_nano + excluded.amount_nano
), first_open as (
    select (max(period) + interval '1 month')::date as period from billing_period
), late as (
    insert into adjustment (request_id, period, of_period, started_at, tenant_id, project_id, model, currency,
                            input_tokens, output_tokens, cached_tokens, reasoning_tokens, meter, quantity, amount_nano, reason,
                            created_at)
    select request_id, first_open.period, date_trunc('month', started_at at time zone 'UTC')::date, started_at,
           tenant_id, project_id, model, coalesce(currency, ''), input_tokens, output_tokens, cached_tokens,
           reasoning_tokens, coalesce(meter, ''), quantity, coalesce(amount_nano, 0), 'late_usage', recorded_at
    from fresh, first_open
    where started_at < first_open.period::timestamp at time zone 'UTC'
), closed as (
    -- An array, so that a few ids are looked up by them whatever the planner thinks of a table without statistics.
    delete from open_exchange where request_id = any(array(select request_id from incoming))
)
select request_id from fresh
union all
select null where exists (select from webhook where 'usage.recorded' = any(kinds))
"""

_TELL_ROWS: Final = """
insert into outbox (event_id, kind, tenant_id, at, data)
select request_id::uuid, 'usage.recorded', tenant_id, started_at, jsonb_build_object(
    'request_id', request_id, 'tenant', tenant_id, 'project', project_id, 'key_id', key_id, 'model', model,
    'dialect', dialect, 'started_at', to_char(started_at at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'),
    'ended_at', to_char(ended_at at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'), 'status', status, 'outcome', outcome,
    'input_tokens', input_tokens, 'output_tokens', output_tokens, 'cached_tokens', cached_tokens,
    'reasoning_tokens', reasoning_tokens, 'meter', meter, 'quantity', quantity, 'basis', basis, 'currency', currency, 'amount_nano', amount_nano)
from incoming where request_id = any(%s) order by started_at, request_id
"""

#: New rows, by the leases that their requests passed on. A lease is of one tenant.
_SUM_LEASES: Final = """
insert into lease_use (lease_id, currency, tenant_id, request_count, input_tokens, output_tokens, cached_tokens, amount_nano,
                       recorded_at)
select lease_id, coalesce(currency, ''), min(tenant_id), count(*), sum(input_tokens), sum(output_tokens), sum(cached_tokens),
       coalesce(sum(amount_nano), 0), max(recorded_at)
from unnest(%s::text[], %s::text[]) as passed (request_id, lease_id) join incoming using (request_id)
group by 1, 2
-- As with the hours: two collectors lock in the same order.
order by 1, 2
on conflict (lease_id, currency) do update set
    request_count = lease_use.request_count + excluded.request_count,
    input_tokens  = lease_use.input_tokens + excluded.input_tokens,
    output_tokens = lease_use.output_tokens + excluded.output_tokens,
    cached_tokens = lease_use.cached_tokens + excluded.cached_tokens,
    amount_nano   = lease_use.amount_nano + excluded.amount_nano,
    recorded_at   = excluded.recorded_at
"""

#: Not those whose exchanges are still open: what follows of them would be summed up anew, without what was dropped.
_FORGET_LEASES: Final = """
with old as (
    select lease_id, currency from lease_use l
    where recorded_at < %s and not exists (select from open_exchange o where o.lease_id = l.lease_id)
    order by recorded_at limit %s
    for update skip locked
)
delete from lease_use l using old where (l.lease_id, l.currency) = (old.lease_id, old.currency)
"""

#: Absorbed rows whose numbers differ from what stands, or that can no longer be compared: kept for a
#: person, never applied.
_CONFLICTS: Final = """
select i.request_id from incoming i left join usage_event u using (started_at, request_id)
where i.request_id = any(%s)
  and (i.tenant_id, i.input_tokens, i.output_tokens, i.cached_tokens, i.reasoning_tokens, i.quantity, i.status, i.outcome)
      is distinct from (u.tenant_id, u.input_tokens, u.output_tokens, u.cached_tokens, u.reasoning_tokens, u.quantity, u.status, u.outcome)
"""

_KEEP_OPEN: Final = """
insert into open_exchange (request_id, started_at, seen_at, journal, epoch, entry)
select i.* from json_to_recordset(%s::json)
    as i (request_id text, started_at timestamptz, seen_at timestamptz, journal text, epoch text, entry jsonb)
where not exists (
    select from usage_event u where u.started_at = i.started_at and u.request_id = i.request_id
) and not exists (select from usage_retired r where r.day = (i.started_at at time zone 'UTC')::date)
on conflict (request_id) do update set seen_at = excluded.seen_at, entry = excluded.entry, marked_at = null
where excluded.seen_at >= open_exchange.seen_at
"""

_ORPHANS: Final = """
select entry from open_exchange
where journal = %(journal)s and (epoch = any(%(ended)s) or (%(silent)s and marked_at is not null))
order by started_at
limit %(limit)s
for update skip locked
"""

#: A contradiction is something to be explained, like what the second witness says.
_KEEP_EXCEPTION: Final = """
insert into reconciliation_exception (kind, request_id, started_at, tenant_id, found_at)
values ('conflict', %s, %s, %s, %s) on conflict do nothing
"""

_KEEP_PLACES: Final = """
insert into journal_position (journal, file_id, file_name, byte_offset, updated_at)
select %s, file_id, file_name, byte_offset, %s from unnest(%s::text[], %s::text[], %s::bigint[]) as p (file_id, file_name, byte_offset)
on conflict (journal, file_id) do update
set file_name = excluded.file_name, byte_offset = excluded.byte_offset, updated_at = excluded.updated_at
"""


class Ledger:
    """One connection, one journal; raises psycopg errors, which the collector takes as "later"."""

    def __init__(self, url: str, journal: str) -> None:
        self._journal = journal
        self._connection = psycopg.connect(
            url, application_name="collector", connect_timeout=3, options="-c statement_timeout=60000 -c timezone=UTC",
            keepalives_idle=5, keepalives_interval=2, keepalives_count=3,
        )
        try:
            set_json_dumps(orjson.dumps, self._connection)
            self._connection.execute("set synchronous_commit = on")
            self._take_journal()
            self._connection.execute(_PREPARE)
            self._connection.commit()
        except BaseException:
            # Not left to the garbage collector: the journal's lock hangs on the connection.
            self._connection.close()
            raise

    def _take_journal(self) -> None:
        # Two collectors on one journal would fight over its place. One that has just died may hold it a moment longer.
        try:
            self._connection.execute("select set_config('lock_timeout', %s, true)", (_TAKEOVER_TIMEOUT,))
            self._connection.execute("select pg_advisory_lock(hashtextextended('peaje-journal:' || %s, 0))", (self._journal,))
        except psycopg.errors.LockNotAvailable as exc:
            raise psycopg.OperationalError("another collector reads this journal") from exc

    @property
    def connection(self) -> psycopg.Connection[Any]:
        """The connection, for upkeep between batches."""
        return self._connection

    def places(self) -> dict[str, Place]:
        """How far each file of the journal has been read."""
        with self._connection.transaction():
            rows = self._connection.execute(
                "select file_id, file_name, byte_offset from journal_position where journal = %s", (self._journal,)
            ).fetchall()
        return {row[0]: Place(*row) for row in rows}

    def lives(self) -> Lives:
        """What is known of the lives of Envoy that write the journal."""
        with self._connection.transaction():
            last = self._connection.execute("select stream, epoch from journal_stream where journal = %s", (self._journal,)).fetchall()
            ended = self._connection.execute(
                "select epoch from ended_life where journal = %s order by ended_at desc limit %s", (self._journal, ENDED_LIVES_MAX)
            ).fetchall()
        return Lives(last=dict(last), ended=tuple(epoch for (epoch,) in reversed(ended)))

    def write(self, batch: Batch, pieces: Sequence[Piece], now: datetime, *, lives: Lives | None = None) -> set[str]:
        """
        Commit *batch*, the places behind *pieces* and what is new of *lives* together.

        Returns the ids of rows that were new.
        """
        with self._connection.transaction():
            added = self._add(batch.events.values(), batch.ended.values(), now)
            absorbed = [request_id for request_id in batch.events if request_id not in added]
            conflicts = list(batch.contradicting)
            if absorbed:
                rows = self._connection.execute(_CONFLICTS, (absorbed,)).fetchall()
                conflicts += [batch.ended[request_id] for (request_id,) in rows]
            self._keep_conflicts(conflicts, now)
            self._keep_open(batch.open.values())
            self._keep_refusals(batch)
            for piece in pieces:
                self._keep_defects(batch.defects.get(piece.place.file_id, ()), piece.place, now)
                if piece.alarm is not None:
                    self._keep_alarm(piece.alarm, now)
            self._keep_places([piece.place for piece in pieces], now)
            if lives is not None:
                self._keep_streams(lives, now)
        return added

    def close_orphans(self, *, ended: Collection[str], silent: bool, now: datetime) -> int:
        """
        Give a row to each open exchange whose Envoy is gone.

        That is one of the *ended* lives or, if *silent*, not heard of since `mark_open` although a live
        stream reports each second.
        """
        with self._connection.transaction():
            rows = self._connection.execute(
                _ORPHANS,
                {"journal": self._journal, "ended": list(ended), "silent": silent, "limit": _ORPHANS_PER_STEP_MAX},
            ).fetchall()
            entries = [parse(orjson.dumps(row[0])) for row in rows]
            if entries:
                self._add([lost_event(entry) for entry in entries], entries, now)
        return len(rows)

    def mark_open(self, now: datetime) -> None:
        """Mark all open exchanges; whatever is heard of one takes its mark away."""
        with self._connection.transaction():
            self._connection.execute("update open_exchange set marked_at = %s where journal = %s", (now, self._journal))

    def keep_read_until(self, now: datetime) -> None:
        """Say that at *now* there was nothing unread in the journal."""
        with self._connection.transaction():
            self._connection.execute(
                "insert into journal_state (journal, read_until) values (%s, %s) "
                "on conflict (journal) do update set read_until = excluded.read_until",
                (self._journal, now),
            )

    def forget_file(self, place: Place, now: datetime, alarm: Alarm | None = None) -> None:
        """Drop the place of a file that is no longer there; with an alarm if nobody said why."""
        with self._connection.transaction():
            if alarm is not None:
                self._keep_alarm(alarm, now)
            self._connection.execute(
                "delete from journal_position where journal = %s and file_id = %s", (self._journal, place.file_id)
            )

    def forget_refusals(self, before: datetime) -> None:
        """Drop refusals older than *before*."""
        with self._connection.transaction():
            self._connection.execute("delete from refusal where started_at < %s", (before,))

    def forget_leases(self, before: datetime) -> int:
        """Drop sums of leases to which nothing was added since *before*, oldest first and not all at once; how many."""
        with self._connection.transaction():
            return self._connection.execute(_FORGET_LEASES, (before, LEASES_PER_PASS_MAX)).rowcount

    def exceptions_open(self) -> int:
        """How many disagreements nobody has explained or signed for."""
        with self._connection.transaction():
            [(count,)] = self._connection.execute(
                "select count(*) from reconciliation_exception where state = 'open'"
            ).fetchall()
        return int(count)

    def close(self) -> None:
        """Close the connection; the lock goes with it."""
        self._connection.close()

    def _add(self, events: Iterable[UsageEvent], entries: Iterable[Entry], now: datetime) -> set[str]:
        """Add *events*, made of *entries*."""
        events = list(events)
        return add_events(self._connection, events, now, leases=leases_of(entries)) if events else set()

    def _keep_conflicts(self, entries: Sequence[Entry], now: datetime) -> None:
        if entries:
            with self._connection.cursor() as cursor:
                cursor.executemany(_KEEP_EXCEPTION, [(e.request_id, e.started_at, e.tenant_id, now) for e in entries])
                cursor.executemany(
                    "insert into usage_conflict (request_id, started_at, recorded_at, entry) values (%s, %s, %s, %s) "
                    "on conflict do nothing",
                    [(entry.request_id, entry.started_at, now, Jsonb(entry.fields)) for entry in entries],
                )

    def _keep_open(self, entries: Iterable[Entry]) -> None:
        rows = [
            {"request_id": e.request_id, "started_at": e.started_at, "seen_at": e.seen_at, "journal": self._journal, "epoch": e.epoch,
             "entry": e.fields}
            for e in entries
        ]  # fmt: skip
        if rows:
            self._connection.execute(_KEEP_OPEN, (orjson.dumps(rows).decode(),))

    def _keep_refusals(self, batch: Batch) -> None:
        if batch.refusals:
            with self._connection.cursor() as cursor:
                cursor.executemany(
                    "insert into refusal values (%s, %s, %s, %s, %s, %s, %s) on conflict do nothing",
                    [astuple(refusal) for refusal in batch.refusals[:REFUSALS_PER_BATCH_MAX]],
                )

    def _keep_alarm(self, alarm: Alarm, now: datetime) -> None:
        found = Defect(offset=alarm.place.offset, byte_count=0, digest="", reason=alarm.reason)
        self._keep_defects([found], alarm.place, now)

    def _keep_defects(self, defects: Sequence[Defect], place: Place, now: datetime) -> None:
        if defects:
            with self._connection.cursor() as cursor:
                cursor.executemany(
                    "insert into journal_defect values (%s, %s, %s, %s, %s, %s, %s, %s) on conflict do nothing",
                    [
                        (self._journal, place.file_id, place.name, d.offset, d.byte_count, d.digest, d.reason, now)
                        for d in defects
                    ],
                )

    def _keep_streams(self, lives: Lives, now: datetime) -> None:
        with self._connection.cursor() as cursor:
            cursor.executemany(
                "insert into journal_stream (journal, stream, epoch) values (%s, %s, %s) "
                "on conflict (journal, stream) do update set epoch = excluded.epoch",
                [(self._journal, stream, epoch) for stream, epoch in lives.last.items()],
            )
            cursor.executemany(
                "insert into ended_life (journal, epoch, ended_at) values (%s, %s, %s) on conflict do nothing",
                [(self._journal, epoch, now) for epoch in lives.ended],
            )

    def _keep_places(self, places: Sequence[Place], now: datetime) -> None:
        # The last one of a file, of which a batch may have several pieces: one statement may not write a row twice.
        last = {place.file_id: place for place in places}.values()
        self._connection.execute(
            _KEEP_PLACES,
            (self._journal, now, [it.file_id for it in last], [it.name for it in last], [it.offset for it in last]),
        )


def add_events(
    connection: psycopg.Connection[Any], events: Sequence[UsageEvent], now: datetime, *, leases: Mapping[str, str]
) -> set[str]:
    """
    Charge *events* and add them with their sums, adjustments and outbox rows; the ids of those that were new.

    *leases*: of the requests that passed on one, by request id. In the caller's transaction, whose connection has the temporary table `incoming`, like `usage_event` and empty.
    """
    # Before the cards are read: they cannot change until this is committed.
    connection.execute(_TAKE_CHARGING_LOCK, (CHARGING_LOCK,))
    with connection.cursor(row_factory=tuple_row) as cursor:
        cards = _rate_cards(cursor, events)
        try:
            with cursor.copy(_COPY_EVENTS) as copy:
                copy.set_types(list(_COPIED.values()))
                for event in events:
                    copy.write_row((*event, *_charge(event, cards), now))
        except OverflowError as exc:
            # As Postgres would say of the same number in text.
            raise psycopg.DataError("an amount that no column holds") from exc
        added = {row[0] for row in cursor.execute(_ADD_EVENTS).fetchall()}
        is_wanted = None in added
        added.discard(None)
        passed = [(request_id, leases[request_id]) for request_id in added & leases.keys()]
        if passed:
            cursor.execute(_SUM_LEASES, tuple(map(list, zip(*passed, strict=True))))
        if added and is_wanted:
            cursor.execute("select pg_advisory_xact_lock(%s)", (OUTBOX_LOCK,))
            cursor.execute(_TELL_ROWS, (list(added),))
    return added


def _rate_cards(cursor: psycopg.Cursor[Any], events: Sequence[UsageEvent]) -> RateCards:
    moments = [event.started_at for event in events]
    rows = cursor.execute(
        _RATE_CARDS,
        (
            list({event.model for event in events}), list({event.tenant_id for event in events}),
            min(moments), max(moments),
        ),
    ).fetchall()
    names = [field.name for field in fields(RateCard)]
    return RateCards(
        RateCard(**dict(zip(names, (*row, tuple(map(_tier, tiers))), strict=True))) for *row, tiers in rows
    )


def _tier(stored: Mapping[str, int]) -> Tier:
    # The schema has looked at these; whatever else a document may hold is no price.
    return Tier(**{name: stored[name] for name in _TIER_FIELDS})


def _charge(event: UsageEvent, cards: RateCards) -> tuple[str | None, int | None, int | None, int | None]:
    """Currency, amount and rate card of a row, all three or none; and which of the card's tiers it is charged by."""
    card = cards.find(tenant_id=event.tenant_id, model=event.model, admitted_at=event.started_at)
    if card is None:
        return None, None, None, None
    amount = amount_nano(
        card, input_tokens=event.input_tokens, output_tokens=event.output_tokens,
        cached_tokens=event.cached_tokens, reasoning_tokens=event.reasoning_tokens, meter=event.meter, quantity=event.quantity,
    )
    if amount is None:
        return None, None, None, None
    tier = card.tier(event.input_tokens)
    return card.currency, amount, card.rate_card_id, None if tier is None else tier.above_tokens
