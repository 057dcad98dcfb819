# SPDX-License-Identifier: Apache-2.0
"""
Close a month for good, and find out whether a closed one is still what it was.

A closed month is its rows (hashed by the hour), its invoice lines, and the adjustments charged in
it; the root hash covers all three. Rows that come later are adjustments of the first open month and
no part of it. Months close in order, under the lock that every charging transaction shares.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any, Final

import psycopg
from psycopg.rows import tuple_row

from metering.adapters.ledger import CHARGING_LOCK

#: Rows of an hour in their one order, with everything a bill rests on. Text, so that another program can
#: hash the same: JSON arrays, times in UTC with microseconds.
_HOURS: Final = """
with row_hash as (
    select date_trunc('hour', started_at, 'UTC') as hour, started_at, request_id,
           sha256(convert_to((jsonb_build_array(
               request_id, tenant_id, project_id, key_id, model, dialect,
               to_char(started_at at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US'),
               to_char(ended_at at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US'),
               status, outcome, input_tokens, output_tokens, cached_tokens, reasoning_tokens, basis,
               currency, amount_nano, rate_card_id)
               -- Only where there is one: rows of months that were closed before there was any hash as they did.
               || case when meter is null then '[]'::jsonb else jsonb_build_array(meter, quantity) end)::text, 'UTF8')) as hash
    from usage_event u
    where started_at >= %(start)s and started_at < %(end)s
      and not exists (select from adjustment a where a.request_id = u.request_id)
)
select hour, count(*), sha256(string_agg(hash, ''::bytea order by started_at, request_id collate "C"))
from row_hash
group by 1
order by 1
"""

_STORED_HOURS: Final = "select hour, row_count, hash from billing_period_hour where period = %(period)s order by hour"

_KEEP_LINES: Final = """
insert into invoice_line (period, tenant_id, project_id, model, currency, request_count, input_tokens, output_tokens,
                          cached_tokens, reasoning_tokens, meter, quantity, amount_nano)
select %(period)s, tenant_id, project_id, model, currency, sum(request_count), sum(input_tokens), sum(output_tokens),
       sum(cached_tokens), sum(reasoning_tokens), meter, sum(quantity), sum(amount_nano)
from usage_hour
where hour >= %(start)s and hour < %(end)s
group by 2, 3, 4, 5, meter
"""

#: What the invoice says: its own usage, then what is charged in it for earlier months.
_CHARGES: Final = """
with charge as (
    select 'usage' as kind, tenant_id, project_id, model, currency, request_count, input_tokens, output_tokens,
           cached_tokens, reasoning_tokens, amount_nano, meter, quantity
    from invoice_line where period = %(period)s
    union all
    select 'adjustment', tenant_id, project_id, model, currency, count(*), sum(input_tokens), sum(output_tokens),
           sum(cached_tokens), sum(reasoning_tokens), sum(amount_nano), meter, sum(quantity)
    from adjustment where period = %(period)s
    group by 2, 3, 4, 5, meter
    union all
    select 'rerating ' || rerating_id, tenant_id, project_id, model, currency, request_count, 0, 0, 0, 0, amount_nano, '', 0
    from rerating_line where period = %(period)s
)
select * from charge
order by kind collate "C", tenant_id collate "C", project_id collate "C", model collate "C", currency collate "C",
         meter collate "C"
"""

#: What must be explained before a month closes, each with how to say it.
_OBSTACLES: Final = (
    (
        "select journal || ' was last read to its end at ' || to_char(read_until at time zone 'UTC', 'YYYY-MM-DD HH24:MI:SS')"
        " from journal_state where read_until < %(end)s order by 1"
    ),
    (
        "select count(*) || ' exchanges that began before its end are still open' from open_exchange"
        " where started_at < %(end)s having count(*) > 0"
    ),
    (
        "select count(*) || ' of its exchanges are told differently by two sources (see peaje reconcile list)'"
        " from reconciliation_exception where state = 'open' and started_at >= %(start)s and started_at < %(end)s"
        " having count(*) > 0"
    ),
    (
        "select count(*) || ' of its exchanges used something and have no price' from usage_event u"
        " where started_at >= %(start)s and started_at < %(end)s and amount_nano is null"
        " and input_tokens + output_tokens + quantity > 0"
        " and not exists (select from rerated_row r where r.request_id = u.request_id) having count(*) > 0"
    ),
    # Charged for an earlier month, and as free by mistake as one of its own.
    (
        "select count(*) || ' exchanges charged in it used something and have no price' from adjustment a"
        " where period = %(period)s and currency = '' and input_tokens + output_tokens + quantity > 0"
        " and not exists (select from rerated_row r where r.request_id = a.request_id) having count(*) > 0"
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Closed:
    """A closed month."""

    period: date
    closed_at: datetime
    closed_by: str
    exception: str | None
    row_count: int
    root_hash: str


def month_bounds(period: date) -> tuple[datetime, datetime]:
    """
    First moment of a month and of the next one, in UTC.

    >>> month_bounds(date(2026, 12, 1))[1].isoformat()
    '2027-01-01T00:00:00+00:00'
    """
    following = date(period.year + period.month // 12, period.month % 12 + 1, 1)
    return datetime(period.year, period.month, 1, tzinfo=UTC), datetime(following.year, following.month, 1, tzinfo=UTC)


def lock_charging(connection: psycopg.Connection[Any]) -> None:
    """Wait until no collector is charging, and keep all of them waiting until this transaction ends."""
    connection.execute("select pg_advisory_xact_lock(%s)", (CHARGING_LOCK,))


def closed_periods(connection: psycopg.Connection[Any]) -> list[Closed]:
    """Closed months, in order."""
    found = _rows(
        connection,
        "select period, closed_at, closed_by, exception, row_count, encode(root_hash, 'hex') from billing_period order by 1",
    )
    names = ("period", "closed_at", "closed_by", "exception", "row_count", "root_hash")
    return [Closed(**dict(zip(names, row, strict=True))) for row in found]


def earlier_open(connection: psycopg.Connection[Any], period: date) -> date | None:
    """The first month before *period* that has usage and is not closed."""
    [(earliest,)] = _rows(
        connection,
        "select min(date_trunc('month', hour at time zone 'UTC')::date) from usage_hour where hour >= "
        "coalesce((select max(period) + interval '1 month' from billing_period) at time zone 'UTC', '-infinity')",
    )
    return earliest if earliest is not None and earliest < period else None


def obstacles(connection: psycopg.Connection[Any], period: date) -> list[str]:
    """What is unexplained about a month, each as a clause for a person."""
    words = _words(period)
    return [str(row[0]) for query in _OBSTACLES for row in _rows(connection, query, words)]


def close(connection: psycopg.Connection[Any], period: date, *, by: str, exception: str | None, now: datetime) -> Closed:
    """Freeze a month whose earlier ones are closed; the caller holds the lock and has looked for obstacles."""
    words = _words(period)
    hours = _rows(connection, _HOURS, words)
    with connection.cursor() as cursor:
        cursor.executemany(
            "insert into billing_period_hour (period, hour, row_count, hash) values (%s, %s, %s, %s)",
            [(period, *hour) for hour in hours],
        )
    connection.execute(_KEEP_LINES, words)
    root, count = _root(hours, _rows(connection, _CHARGES, words))
    connection.execute(
        "insert into billing_period values (%s, %s, %s, %s, %s, %s)", (period, now, by, exception, count, root)
    )
    return Closed(period=period, closed_at=now, closed_by=by, exception=exception, row_count=count, root_hash=root.hex())


def changes(connection: psycopg.Connection[Any], closed: Closed) -> list[str]:
    """In what a closed month is not what it was; empty if it is. Days retired since are known by their hashes only."""
    words = _words(closed.period)
    stored = _rows(connection, _STORED_HOURS, words)
    found = []
    root, _ = _root(stored, _rows(connection, _CHARGES, words))
    if root.hex() != closed.root_hash:
        found.append(f"{closed.period:%Y-%m}: its lines or hashes are not those of its root hash")
    retired = {row[0] for row in _rows(connection, "select day from usage_retired")}
    now = {row[0]: row for row in _rows(connection, _HOURS, words)}
    then = {row[0]: row for row in stored}
    found += [
        f"{hour.astimezone(UTC):%Y-%m-%d %H}:00 UTC: its rows have changed"
        for hour in sorted(now.keys() | then.keys())
        if now.get(hour) != then.get(hour) and hour.astimezone(UTC).date() not in retired
    ]
    return found


def _root(hours: Iterable[Sequence[Any]], charges: Iterable[Sequence[Any]]) -> tuple[bytes, int]:
    root, total = hashlib.sha256(), 0
    for hour, count, digest in hours:
        root.update(f"{hour.astimezone(UTC):%Y-%m-%dT%H} {count} {bytes(digest).hex()}\n".encode())
        total += count
    for *charge, meter, quantity in charges:
        # As with the rows: a line without a meter is hashed as it was before there was any.
        words = [*charge, meter, quantity] if meter else charge
        root.update(("\t".join(map(str, words)) + "\n").encode())
    return root.digest(), total


def _words(period: date) -> dict[str, Any]:
    start, end = month_bounds(period)
    return {"period": period, "start": start, "end": end}


def _rows(connection: psycopg.Connection[Any], query: str, words: dict[str, Any] | None = None) -> list[tuple[Any, ...]]:
    with connection.cursor(row_factory=tuple_row) as cursor:
        return cursor.execute(query, words).fetchall()
