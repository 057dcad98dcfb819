# SPDX-License-Identifier: Apache-2.0
"""
The outbox as the delivery process reads it: which webhooks wait, what for, and how far each has come.

Raises psycopg errors, which the process takes as "later".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final

import psycopg

from chassis.sealing import unseal
from metering.core.outgoing import BATCH_MAX, WEBHOOK_TEST, Event, Outgoing, Recipe
from metering.core.retry import Fate

#: An event that every webhook is done with goes after this, one that some webhook never took after the other.
KEPT_DELIVERED: Final = timedelta(days=1)
KEPT_AT_MOST: Final = timedelta(days=14)
#: Rows of the outbox, whatever their age: a webhook of each request that is paused must not fill the disk.
ROWS_MAX: Final = 5_000_000
#: Attempts of a webhook that are kept for people.
ATTEMPTS_KEPT: Final = 200
_TOLD_KEPT: Final = timedelta(days=400)
_HOURS_KEPT: Final = timedelta(days=60)

#: What a webhook can be.
STATES: Final = ("active", "paused", "failed")

Connect = Callable[[], AbstractAsyncContextManager[psycopg.AsyncConnection[Any]]]

_WAITING: Final = """
select webhook_id, tenant_id, url, format, kinds, secret, previous_secret, previous_secret_expires_at, credential,
       position, failing_since, failure_count
from webhook
where state = 'active' and position < %(end)s and (next_attempt_at is null or next_attempt_at <= %(now)s)
"""
_NEXT: Final = f"""
select position, event_id, kind, tenant_id, at, data from outbox
where position > %(position)s and position <= %(end)s
  and (webhook_id = %(webhook)s or (webhook_id is null and kind = any(%(kinds)s) and (%(tenant)s::text is null or tenant_id = %(tenant)s)))
order by position
limit {BATCH_MAX}
"""
_SUCCEEDED: Final = """
update webhook set position = greatest(position, %(position)s), failing_since = null, failure_count = 0,
                   next_attempt_at = null, last_success_at = %(now)s
where webhook_id = %(webhook)s
"""
_PASSED: Final = """
update webhook set position = greatest(position, %(position)s), missed_count = missed_count + %(missed)s
where webhook_id = %(webhook)s
"""
_FAILED: Final = """
update webhook set failing_since = %(since)s, failure_count = %(count)s, next_attempt_at = %(next)s,
                   state = case when state = 'active' and %(next)s::timestamptz is null then 'failed' else state end
where webhook_id = %(webhook)s
"""
_ATTEMPTED: Final = """
insert into webhook_attempt (webhook_id, attempted_at, event_id, kind, event_count, outcome, status, duration_ms)
select %(webhook)s, %(now)s, %(event_id)s, %(kind)s, %(event_count)s, %(outcome)s, %(status)s, %(duration_ms)s
-- The webhook may have been removed meanwhile.
where exists (select from webhook where webhook_id = %(webhook)s)
"""

#: Up to where the outbox may go: what all are done with and is a day old, what is two weeks old, what is too much.
_TRIM_TO: Final = """
select greatest(
    (select max(position) from outbox
     where recorded_at < %(delivered)s and position <= coalesce((select min(position) from webhook), 9223372036854775807)),
    (select max(position) from outbox where recorded_at < %(at_most)s),
    (select max(position) - %(rows)s from outbox),
    0)
"""
_COUNT_MISSED: Final = """
with behind as (
    select webhook_id, (
        select count(*) from outbox o
        where o.position > w.position and o.position <= %(to)s
          and (o.webhook_id = w.webhook_id or (o.webhook_id is null and o.kind = any(w.kinds)
                                               and (w.tenant_id is null or o.tenant_id = w.tenant_id)))) as missed
    from webhook w where w.position < %(to)s for update
), moved as (
    update webhook w set position = %(to)s, missed_count = missed_count + missed from behind b where b.webhook_id = w.webhook_id
)
select webhook_id from behind where missed > 0
"""
_STATES: Final = "select state, count(*), sum(missed_count)::bigint from webhook group by 1"
#: By the clock that wrote them down, which is Postgres' own.
_OLDEST: Final = """
select extract(epoch from now() - min(o.recorded_at))
from webhook w cross join lateral (
    select recorded_at from outbox o
    where o.position > w.position
      and (o.webhook_id = w.webhook_id or (o.webhook_id is null and o.kind = any(w.kinds)
                                           and (w.tenant_id is null or o.tenant_id = w.tenant_id)))
    order by o.position limit 1
) o
where w.state = 'active'
"""
_TRIM_ATTEMPTS: Final = f"""
delete from webhook_attempt a using (
    select webhook_id, attempt_id, row_number() over (partition by webhook_id order by attempt_id desc) as age
    from webhook_attempt
) ranked
where ranked.attempt_id = a.attempt_id and ranked.age > {ATTEMPTS_KEPT}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Webhook:
    """A webhook that has something to send and is due."""

    webhook_id: str
    tenant_id: str | None
    url: str
    format: str
    kinds: list[str]
    position: int
    failing_since: datetime | None
    failure_count: int
    #: Sealed; the newest first.
    sealed_secrets: tuple[bytes, ...] = field(repr=False)
    sealed_credential: bytes | None = field(repr=False)

    def recipe(self, peppers: Mapping[int, bytes], source: str, customers: dict[str, str]) -> Recipe:
        """What its requests are made with; raises `Unavailable` if a secret does not open."""
        credential = self.sealed_credential
        return Recipe(
            format=self.format, source=source, customers=customers,
            secrets=tuple(unseal(peppers, it, owner=self.webhook_id) for it in self.sealed_secrets),
            credential=None if credential is None else unseal(peppers, credential, owner=self.webhook_id),
        )


class Outbox:
    """Reads and moves places; each call is a transaction of its own."""

    def __init__(self, connect: Connect) -> None:
        self._connect = connect

    async def waiting(self, now: datetime) -> tuple[int, list[Webhook]]:
        """The end of the outbox, and the active webhooks before it whose time has come."""
        async with self._connect() as connection:
            [(end,)] = await _rows(connection, "select coalesce(max(position), 0) from outbox")
            rows = await _rows(connection, _WAITING, {"end": end, "now": now})
        return end, [_webhook(row, now) for row in rows]

    async def customers(self, webhook_id: str) -> dict[str, str]:
        """What its receiver calls each tenant."""
        async with self._connect() as connection:
            query = "select tenant_id, customer from webhook_customer where webhook_id = %(it)s"
            return dict(await _rows(connection, query, {"it": webhook_id}))

    async def next_events(self, webhook: Webhook, *, after: int, end: int) -> list[Event]:
        """Up to `BATCH_MAX` events for *webhook*, in order; none if the rest up to *end* is for others."""
        words = {
            "position": after, "end": end, "webhook": webhook.webhook_id, "kinds": webhook.kinds, "tenant": webhook.tenant_id,
        }
        async with self._connect() as connection:
            rows = await _rows(connection, _NEXT, words)
        return [
            Event(position=row[0], event_id=str(row[1]), kind=row[2], tenant_id=row[3], at=row[4], data=row[5]) for row in rows
        ]

    async def is_active(self, webhook_id: str) -> bool:
        """Whether it is still to be sent to."""
        async with self._connect() as connection:
            query = "select from webhook where webhook_id = %(it)s and state = 'active'"
            return bool(await _rows(connection, query, {"it": webhook_id}))

    async def passed(self, webhook_id: str, position: int, *, missed: int = 0) -> None:
        """Move on over events that are not for it, or that it cannot be told (*missed* of them)."""
        async with self._connect() as connection:
            await connection.execute(_PASSED, {"webhook": webhook_id, "position": position, "missed": missed})

    async def succeeded(self, webhook_id: str, request: Outgoing, *, outcome: str, status: int | None, duration_ms: int, now: datetime) -> None:
        """Move on behind *request*, and write the attempt down."""
        async with self._connect() as connection:
            await connection.execute(_SUCCEEDED, {"webhook": webhook_id, "position": request.position, "now": now})
            await connection.execute(_ATTEMPTED, _attempt(webhook_id, request, outcome=outcome, status=status, duration_ms=duration_ms, now=now))

    async def failed(
        self, webhook_id: str, request: Outgoing | None, fate: Fate, *, outcome: str, status: int | None, duration_ms: int, now: datetime
    ) -> None:
        """Stay where it is until *fate*'s next attempt, or for good."""
        words = {
            "webhook": webhook_id, "since": fate.failing_since, "count": fate.failure_count, "next": fate.next_attempt_at,
        }
        async with self._connect() as connection:
            await connection.execute(_FAILED, words)
            if request is not None:
                await connection.execute(_ATTEMPTED, _attempt(webhook_id, request, outcome=outcome, status=status, duration_ms=duration_ms, now=now))


@dataclass(frozen=True, slots=True, kw_only=True)
class Backlog:
    """How webhooks stand."""

    #: Webhooks of each of `STATES`.
    counts: Mapping[str, int]
    #: Events that they have never been sent and never will be.
    missed: int
    #: Age of the oldest event that an active one has not taken; 0 if there is none.
    oldest_seconds: float


def backlog(connection: psycopg.Connection[Any]) -> Backlog:
    """Look at what waits."""
    with connection.transaction():
        rows = connection.execute(_STATES).fetchall()
        [(oldest,)] = connection.execute(_OLDEST).fetchall()
    found = {row[0]: row[1] for row in rows}
    return Backlog(
        counts={state: found.get(state, 0) for state in STATES}, missed=sum(row[2] for row in rows), oldest_seconds=float(oldest or 0)
    )


def trim(connection: psycopg.Connection[Any], now: datetime, *, rows_max: int = ROWS_MAX) -> tuple[int, list[str]]:
    """
    Remove what is done with or too old; how many events, and the webhooks that never had some of them.

    Those are told by `missed_count`. Nobody waits for this: rows are only removed that no one may read any more.
    """
    with connection.transaction():
        [(to,)] = connection.execute(
            _TRIM_TO, {"delivered": now - KEPT_DELIVERED, "at_most": now - KEPT_AT_MOST, "rows": rows_max}
        ).fetchall()
        missing = connection.execute(_COUNT_MISSED, {"to": to}).fetchall()
        removed = connection.execute("delete from outbox where position <= %s", (to,)).rowcount
        connection.execute(_TRIM_ATTEMPTS)
        connection.execute("delete from event_told where told_at < %s", (now - _TOLD_KEPT,))
        connection.execute("delete from usage_hour_told where hour < %s", (now - _HOURS_KEPT,))
    return removed, [row[0] for row in missing]


def _webhook(row: tuple[Any, ...], now: datetime) -> Webhook:
    (webhook_id, tenant_id, url, format_, kinds, secret, previous, previous_ends, credential, position, since, count) = row
    secrets = [secret] if secret is not None else []
    if previous is not None and previous_ends > now:
        secrets.append(previous)
    return Webhook(
        webhook_id=webhook_id, tenant_id=tenant_id, url=url, format=format_, kinds=[*kinds, WEBHOOK_TEST], position=position,
        failing_since=since, failure_count=count, sealed_secrets=tuple(map(bytes, secrets)),
        sealed_credential=None if credential is None else bytes(credential),
    )


def _attempt(
    webhook_id: str, request: Outgoing, *, outcome: str, status: int | None, duration_ms: int, now: datetime
) -> dict[str, Any]:
    return {
        "webhook": webhook_id, "now": now, "event_id": request.event_id, "kind": request.kind,
        "event_count": request.event_count, "outcome": outcome, "status": status, "duration_ms": duration_ms,
    }


async def _rows(
    connection: psycopg.AsyncConnection[Any], query: str, words: dict[str, Any] | None = None
) -> list[tuple[Any, ...]]:
    cursor = await connection.execute(query, words)
    return list(await cursor.fetchall())
