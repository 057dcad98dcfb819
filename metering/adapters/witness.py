# SPDX-License-Identifier: Apache-2.0
"""
Hear the second witness, and compare what it said with the ledger on a timer.

What is heard waits in memory, up to a bound; beyond it, it is dropped and counted. A thread of its own
with a connection of its own compares: Postgres that is away holds up no stream of Envoy's.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final

import psycopg
import structlog

from metering.adapters import witness_metrics as metrics
from metering.core.witness import Kind, Row, Sighting, compare

log = structlog.get_logger()

#: About 50 MB, and a minute and a half at 1,000 requests a second.
HEARD_MAX: Final = 100_000
#: Compared at once.
BATCH_MAX: Final = 1000
#: The collector is usually faster than this; what is not there yet after it is asked for again.
AGE_MIN: Final = timedelta(seconds=5)
#: Clocks of the collector's machine and of this one differ by less.
_CLOCKS_DIFFER_MAX: Final = timedelta(seconds=2)
#: Exceptions that are looked at again at once: has the row come after all?
_LATE_MAX: Final = 1000
#: Who explains what explains itself.
ACTOR: Final = "reconciliation"

#: A journal that has not been read past an exchange's end may still hold it.
_READ_UNTIL: Final = "select min(read_until) from journal_state"
_ROWS: Final = """
select request_id, tenant_id, input_tokens, output_tokens, quantity, outcome from usage_event
where started_at between %(first)s and %(last)s and request_id = any(%(ids)s)
"""
_OPEN: Final = "select request_id from open_exchange where request_id = any(%(ids)s)"
#: Of a day whose rows were retired nothing can be said.
_RETIRED: Final = "select day from usage_retired where day between (%(first)s at time zone 'UTC')::date and (%(last)s at time zone 'UTC')::date"
_KEEP_EXCEPTION: Final = """
insert into reconciliation_exception (kind, request_id, started_at, tenant_id, input_tokens, output_tokens, quantity,
                                      ledger_tenant_id, ledger_input_tokens, ledger_output_tokens, ledger_quantity, found_at)
values (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)
on conflict do nothing returning exception_id
"""
_KEEP_HOURS: Final = """
insert into witness_hour (hour, agreed_count, disagreed_count) values (date_trunc('hour', %s, 'UTC'), %s, %s)
on conflict (hour) do update set agreed_count = witness_hour.agreed_count + excluded.agreed_count,
    disagreed_count = witness_hour.disagreed_count + excluded.disagreed_count
"""
_EXPLAIN_LATE: Final = """
with late as (
    select exception_id from reconciliation_exception e
    where e.state = 'open' and e.kind = 'row_missing'
      and exists (select from usage_event u where u.started_at = e.started_at and u.request_id = e.request_id
                  and u.tenant_id = e.tenant_id and u.input_tokens = coalesce(e.input_tokens, u.input_tokens)
                  and u.output_tokens = coalesce(e.output_tokens, u.output_tokens)
                  -- As `metering.core.witness.compare` has it.
                  and (u.quantity = coalesce(e.quantity, u.quantity)
                       or u.quantity = 0 and u.outcome in ('upstream_error', 'gateway_error', 'refused_by_engine')))
    order by exception_id limit %(limit)s
)
update reconciliation_exception e
set state = 'explained', note = 'The row came later, and agrees.', actor = %(actor)s, decided_at = %(now)s
from late where e.exception_id = late.exception_id
"""


class Heard:
    """What the witness said and was not compared yet; one thread adds, one takes."""

    def __init__(self) -> None:
        self._waiting: deque[Sighting] = deque()

    def add(self, said: Sequence[Sighting]) -> None:
        """Keep those that there is room for."""
        kept = said[: max(0, HEARD_MAX - len(self._waiting))]
        metrics.SIGHTINGS_DROPPED.inc(len(said) - len(kept))
        metrics.SIGHTINGS.inc(len(kept))
        self._waiting.extend(kept)

    def before(self, moment: datetime) -> list[Sighting]:
        """The oldest that were heard before *moment*; they stay until they are `done` with."""
        found: list[Sighting] = []
        for said in self._waiting:
            if said.heard_at >= moment or len(found) == BATCH_MAX:
                break
            found.append(said)
        return found

    def done(self, count: int, again: Iterable[Sighting]) -> None:
        """Forget the oldest *count*; those of them that are to be asked for *again* go to the end."""
        for _ in range(count):
            self._waiting.popleft()
        self._waiting.extend(again)


@dataclass(slots=True, kw_only=True)
class Reconciliation:
    """Compares what was heard with the ledger at *url*."""

    url: str
    heard: Heard
    clock: Callable[[], datetime]
    every_seconds: float
    stop: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        """Compare until the process ends."""
        threading.Thread(target=self._run, name="reconciliation", daemon=True).start()

    def step(self, connection: psycopg.Connection[Any], now: datetime) -> bool:
        """Compare a batch; whether there may be more at once."""
        [(read_until,)] = connection.execute(_READ_UNTIL).fetchall()
        if read_until is None:
            return False
        metrics.JOURNALS_BEHIND_SECONDS.set((now - read_until).total_seconds())
        said = self.heard.before(min(now - AGE_MIN, read_until - _CLOCKS_DIFFER_MAX))
        with connection.transaction():
            connection.execute(_EXPLAIN_LATE, {"limit": _LATE_MAX, "actor": ACTOR, "now": now})
            again = _compare(connection, said, now) if said else []
        # Not before the commit: killed here, they are compared twice and kept once.
        self.heard.done(len(said), again)
        return len(said) == BATCH_MAX

    def _run(self) -> None:
        while not self.stop.is_set():
            try:
                with psycopg.connect(
                    self.url, autocommit=True, application_name="reconciliation", connect_timeout=3,
                    options="-c statement_timeout=60000 -c timezone=UTC",
                ) as connection:
                    while not self.stop.is_set():
                        while self.step(connection, self.clock()):
                            pass
                        self.stop.wait(self.every_seconds)
            except psycopg.Error as exc:
                log.warning("reconciliation_unavailable", error=type(exc).__name__)
                self.stop.wait(self.every_seconds)


def _compare(connection: psycopg.Connection[Any], said: Sequence[Sighting], now: datetime) -> list[Sighting]:
    """Keep how *said* and the ledger compare; returns those whose exchange is not closed yet."""
    moments = [one.started_at for one in said]
    words = {"ids": [one.request_id for one in said], "first": min(moments), "last": max(moments)}
    # Before the rows: an exchange that is closed in between is then found as a row.
    under_way = {request_id for (request_id,) in connection.execute(_OPEN, words).fetchall()}
    rows = {
        row[0]: Row(tenant_id=row[1], input_tokens=row[2], output_tokens=row[3], quantity=row[4], outcome=row[5])
        for row in connection.execute(_ROWS, words).fetchall()
    }
    retired = {day for (day,) in connection.execute(_RETIRED, words).fetchall()}
    again: list[Sighting] = []
    hours: dict[datetime, list[int]] = {}
    for one in said:
        row = rows.get(one.request_id)
        if row is None and one.request_id in under_way:
            again.append(one)
            continue
        if row is None and one.started_at.date() in retired:
            continue
        kind = compare(one, row)
        is_new = kind is None or _keep(connection, kind, one, row, now)
        if is_new:
            hour = one.started_at.replace(minute=0, second=0, microsecond=0)
            hours.setdefault(hour, [0, 0])[kind is not None] += 1
    with connection.cursor() as cursor:
        # Two processes that meet in an hour lock its rows in the same order.
        cursor.executemany(_KEEP_HOURS, [(hour, *counts) for hour, counts in sorted(hours.items())])
    return again


def _keep(connection: psycopg.Connection[Any], kind: Kind, seen: Sighting, row: Row | None, now: datetime) -> bool:
    """Keep a disagreement; False if it is known already."""
    booked = (None,) * 4 if row is None else (row.tenant_id, row.input_tokens, row.output_tokens, row.quantity)
    kept = connection.execute(
        _KEEP_EXCEPTION,
        (
            kind.value, seen.request_id, seen.started_at, seen.tenant_id, seen.input_tokens, seen.output_tokens, seen.quantity,
            *booked, now,
        ),
    ).fetchone()
    if kept is not None:
        log.error("witness_disagrees", kind=kind.value, request_id=seen.request_id, tenant=seen.tenant_id)
    return kept is not None
