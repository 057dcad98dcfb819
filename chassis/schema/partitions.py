# SPDX-License-Identifier: Apache-2.0
"""
Keep a daily partition ready for every usage row that may come, and a default one for the rest.

Those that are older than anybody wants to keep are dropped.

A usage row is a bill: it must never be refused because nobody made its partition. So there is a
default partition, and a day that first fell into it gets its own partition later, rows and all.
"""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from typing import Any, Final, LiteralString

from psycopg import Connection, sql

#: Days. Longer than any holiday during which nobody restarts anything.
DAYS_AHEAD: Final = 14
#: Journals are read late after an outage: yesterday's rows still come today.
_DAYS_BEHIND: Final = 1
#: Any constant of our own; the migration holds another one (see migrate.py).
_LOCK: Final = 0x7065616A_65000002

_TAKE_LOCK: Final[LiteralString] = "select pg_advisory_xact_lock(%s)"
#: In the schema that unqualified names are made in, so that search_path decides once.
_EXISTING: Final[LiteralString] = """
select child.relname
from pg_inherits join pg_class as child on child.oid = inhrelid
where inhparent = 'usage_event'::regclass
"""
_CREATE_DEFAULT: Final[LiteralString] = "create table usage_event_default partition of usage_event default"
# Attaching a table that is already filled takes a weaker lock on usage_event than creating a
# partition in place, and is the only way when the default partition holds rows of that day.
_CREATE: Final[LiteralString] = "create table {name} (like usage_event including all)"
_MOVE: Final[LiteralString] = """
with moved as (
    delete from usage_event_default where started_at >= {start} and started_at < {end} returning *
)
insert into {name} select * from moved
"""
_ATTACH: Final[LiteralString] = "alter table usage_event attach partition {name} for values from ({start}) to ({end})"

#: Days of closed months only: an open month is still made of its rows.
_CLOSED_UNTIL: Final[LiteralString] = "select (max(period) + interval '1 month')::date from billing_period"
_RETIRE: Final[LiteralString] = """
insert into usage_retired (day, row_count, retired_at) select {day}, count(*), {now} from {name}
"""
_DETACH: Final[LiteralString] = "alter table usage_event detach partition {name}"
_DROP: Final[LiteralString] = "drop table {name}"


def ensure_partitions(connection: Connection[Any], today: date, days_ahead: int = DAYS_AHEAD) -> list[str]:
    """
    Make the partitions of yesterday to *today* + *days_ahead* (UTC days) and return those that were missing.

    Safe to call from several processes at once, and inside a transaction of the caller's.
    """
    wanted = {
        f"usage_event_{day:%Y%m%d}": day
        for day in (today + timedelta(days=offset) for offset in range(-_DAYS_BEHIND, days_ahead + 1))
    }
    with connection.transaction():
        # Without the lock two processes may both see a day missing and one of them fails.
        connection.execute(_TAKE_LOCK, (_LOCK,))
        existing = {str(row[0]) for row in connection.execute(_EXISTING).fetchall()}
        made = []
        if "usage_event_default" not in existing:
            connection.execute(_CREATE_DEFAULT)
            made.append("usage_event_default")
        for name, day in wanted.items():
            if name not in existing:
                _make(connection, name=name, day=day)
                made.append(name)
        return made


def retire_partitions(connection: Connection[Any], *, before: date, now: datetime) -> list[str]:
    """
    Drop the partitions of closed months' days before *before*, and return their names.

    Sums, invoice lines and hashes stay. The days are written down, so that a record of such a day that
    is read again is not taken for a new one.
    """
    with connection.transaction():
        connection.execute(_TAKE_LOCK, (_LOCK,))
        closed_until = connection.execute(_CLOSED_UNTIL).fetchall()[0][0]
        if closed_until is None:
            return []
        retired = []
        for name in sorted(str(row[0]) for row in connection.execute(_EXISTING).fetchall()):
            day = _day(name)
            if day is not None and day < min(before, closed_until):
                words = {"name": sql.Identifier(name), "day": sql.Literal(day), "now": sql.Literal(now)}
                for statement in (_RETIRE, _DETACH, _DROP):
                    connection.execute(sql.SQL(statement).format(**words))
                retired.append(name)
        return retired


def _day(name: str) -> date | None:
    """The day of a daily partition, None for any other table."""
    digits = name.removeprefix("usage_event_")
    return datetime.strptime(digits, "%Y%m%d").replace(tzinfo=UTC).date() if digits.isdigit() else None


def _make(connection: Connection[Any], *, name: str, day: date) -> None:
    start = datetime(day.year, day.month, day.day, tzinfo=UTC)
    end = start + timedelta(days=1)
    # Statements that define tables take no parameters; the driver quotes these.
    words = {"name": sql.Identifier(name), "start": sql.Literal(start), "end": sql.Literal(end)}
    for statement in (_CREATE, _MOVE, _ATTACH):
        connection.execute(sql.SQL(statement).format(**words))
