# SPDX-License-Identifier: Apache-2.0
"""
Credits as double entry: grant, consume, expire. Every transaction's entries sum to nothing.

A grant is an account of its own. Money comes from `issued`, goes from the grants to `used` as the ledger
charges, and from a grant that has ended to `expired`. The ledger is what decides how much was used; the
books follow it, and the tenant's prepaid budget follows the books. Raises psycopg errors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import psycopg
from psycopg.rows import tuple_row

#: Entries of one transaction: more grants than this are emptied one transaction after the other.
_GRANTS_PER_TRANSACTION_MAX: Final = 100
#: Nano-units. The counter store computes in doubles, which hold no larger number exactly.
BUDGET_MAX: Final = 9_000_000 * 1_000_000_000
#: Who acts when the books follow the ledger.
_BOOKKEEPER: Final = "metering"

_LOCK: Final = "select pg_advisory_xact_lock(hashtextextended('peaje-credits:' || %s, 0))"
#: What the ledger has charged a tenant for, from the beginning: rows and re-ratings.
_CHARGED: Final = """
select (coalesce((select sum(amount_nano) from usage_hour where tenant_id = %(tenant)s and currency = %(currency)s), 0)
      + coalesce((select sum(amount_nano) from rerating_line where tenant_id = %(tenant)s and currency = %(currency)s), 0))::bigint
"""
#: Of that what the counter store does not know of: it counts what requests cost when they were admitted.
_CORRECTED: Final = """
select coalesce(sum(amount_nano), 0)::bigint from rerating_line where tenant_id = %(tenant)s and currency = %(currency)s
"""
_REMAINING: Final = """
select g.grant_id, a.account_id, g.expires_at, coalesce(sum(e.amount_nano), 0)::bigint
from credit_grant g join credit_account a using (grant_id) left join credit_entry e using (account_id)
where g.tenant_id = %(tenant)s
group by g.grant_id, a.account_id
order by g.expires_at nulls last, g.created_at, g.grant_id
"""
_AT: Final = """
select coalesce(sum(e.amount_nano), 0)::bigint from credit_entry e join credit_account a using (account_id)
where a.tenant_id = %(tenant)s and a.kind = %(kind)s
"""
#: A journal that is behind may have usage from before the end of a grant.
_READ_PAST: Final = "select not exists (select from journal_state where read_until < %s)"
_SET_BUDGET: Final = """
insert into rate_limit (tenant_id, unit, period, amount, currency, updated_at)
values (%(tenant)s, 'money', 'ever', %(amount)s, %(currency)s, %(now)s)
on conflict (tenant_id, project_id, key_id, model, unit, period) do update set
    amount = excluded.amount, currency = excluded.currency, updated_at = excluded.updated_at
where rate_limit.amount <> excluded.amount
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Book:
    """A tenant's credits."""

    tenant_id: str
    currency: str
    baseline_nano: int


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """Where the money of a book is, and what the ledger has charged that the books do not have yet."""

    granted_nano: int
    used_nano: int
    expired_nano: int
    #: What grants still hold.
    balance_nano: int
    #: Charged and not taken from a grant: not booked yet, or more than there was.
    owed_nano: int


def lock(connection: psycopg.Connection[Any], tenant_id: str) -> None:
    """Wait until nobody else keeps this tenant's books, and keep everybody out until the transaction ends."""
    connection.execute(_LOCK, (tenant_id,))


def book_of(connection: psycopg.Connection[Any], tenant_id: str) -> Book | None:
    """The tenant's book; None if it never had a credit."""
    found = _rows(connection, "select tenant_id, currency, baseline_nano from credit_book where tenant_id = %(it)s", {"it": tenant_id})
    return Book(tenant_id=found[0][0], currency=found[0][1], baseline_nano=found[0][2]) if found else None


def open_book(connection: psycopg.Connection[Any], tenant_id: str, currency: str, now: datetime) -> Book:
    """Begin a book; what was charged before is none of its business."""
    baseline = _one(connection, _CHARGED, {"tenant": tenant_id, "currency": currency})
    connection.execute("insert into credit_book values (%s, %s, %s, %s)", (tenant_id, currency, baseline, now))
    connection.execute(
        "insert into credit_account (tenant_id, kind) select %s, unnest(array['issued', 'used', 'expired'])", (tenant_id,)
    )
    return Book(tenant_id=tenant_id, currency=currency, baseline_nano=baseline)


def add_grant(connection: psycopg.Connection[Any], book: Book, grant: Mapping[str, Any]) -> None:
    """Book a grant whose row is *grant*."""
    connection.execute(
        "insert into credit_grant (grant_id, tenant_id, amount_nano, expires_at, reason, reference, created_by, created_at) "
        "values (%(grant_id)s, %(tenant_id)s, %(amount_nano)s, %(expires_at)s, %(reason)s, %(reference)s, %(created_by)s, %(created_at)s)",
        grant,
    )
    connection.execute(
        "insert into credit_account (tenant_id, kind, grant_id) values (%(tenant_id)s, 'grant', %(grant_id)s)", grant
    )
    account = _one(connection, "select account_id from credit_account where grant_id = %(grant_id)s", dict(grant))
    _post(
        connection, book, "grant", [(account, grant["amount_nano"])], against="issued", actor=grant["created_by"],
        reason=grant["reason"], now=grant["created_at"],
    )


def settle(connection: psycopg.Connection[Any], book: Book, now: datetime) -> None:
    """
    Let the books follow the ledger, and the prepaid budget the books.

    What was charged is taken from the grant that ends first; what a re-rating gave back returns to the
    one that ends last. Then grants whose time is over are emptied, once every journal has been read past it.
    The caller holds the lock.
    """
    _consume(connection, book, now)
    for grant_id, _, expires_at, remaining in _remaining(connection, book):
        if remaining > 0 and expires_at is not None and expires_at <= now and _one(connection, _READ_PAST, (expires_at,)):
            expire(connection, book, grant_id, actor=_BOOKKEEPER, reason="its time is over", now=now)
    set_budget(connection, book, now)


def expire(
    connection: psycopg.Connection[Any], book: Book, grant_id: str, *, actor: str, reason: str, now: datetime
) -> None:
    """Empty a grant, whatever remains of it."""
    account, remaining = grants(connection, book)[grant_id]
    if remaining:
        _post(
            connection, book, "expire", [(account, -remaining)], against="expired", actor=actor, reason=f"{grant_id}: {reason}",
            now=now,
        )


def settle_all(connection: psycopg.Connection[Any], now: datetime) -> int:
    """`settle` every tenant's book, each in a transaction of its own; how many there are."""
    rows = _rows(connection, "select tenant_id, currency, baseline_nano from credit_book order by 1", {})
    books = [Book(tenant_id=row[0], currency=row[1], baseline_nano=row[2]) for row in rows]
    for book in books:
        with connection.transaction():
            lock(connection, book.tenant_id)
            settle(connection, book, now)
    return len(books)


def state(connection: psycopg.Connection[Any], book: Book) -> State:
    """What the books say, and what they do not have yet."""
    at = {kind: _one(connection, _AT, {"tenant": book.tenant_id, "kind": kind}) for kind in ("issued", "used", "expired", "grant")}
    return State(
        granted_nano=-at["issued"], used_nano=at["used"], expired_nano=at["expired"], balance_nano=at["grant"],
        owed_nano=_charged(connection, book) - at["used"],
    )


def budget(connection: psycopg.Connection[Any], book: Book) -> int:
    """
    What the prepaid budget has to be: what was granted and has not expired.

    The limiter counts what a tenant has spent from its beginning, so what came before the first credit is
    added, and what was corrected later, which it does not count, is taken off.
    """
    found = state(connection, book)
    corrected: int = _one(connection, _CORRECTED, {"tenant": book.tenant_id, "currency": book.currency})
    return max(0, book.baseline_nano + found.granted_nano - found.expired_nano - corrected)


def set_budget(connection: psycopg.Connection[Any], book: Book, now: datetime) -> None:
    """Let the prepaid budget be what it has to be."""
    amount = min(budget(connection, book), BUDGET_MAX)
    words = {"tenant": book.tenant_id, "currency": book.currency, "amount": amount, "now": now}
    connection.execute(_SET_BUDGET, words)


def grants(connection: psycopg.Connection[Any], book: Book) -> dict[str, tuple[int, int]]:
    """Account and what remains of each grant, in the order in which they are used."""
    return {grant_id: (account, remaining) for grant_id, account, _, remaining in _remaining(connection, book)}


def _consume(connection: psycopg.Connection[Any], book: Book, now: datetime) -> None:
    due = _charged(connection, book) - _one(connection, _AT, {"tenant": book.tenant_id, "kind": "used"})
    if due > 0:
        entries = []
        for _, account, _, remaining in _remaining(connection, book):
            taken = min(due, remaining)
            if taken > 0:
                entries.append((account, -taken))
                due -= taken
        for start in range(0, len(entries), _GRANTS_PER_TRANSACTION_MAX):
            _post(
                connection, book, "consume", entries[start : start + _GRANTS_PER_TRANSACTION_MAX], against="used",
                actor=_BOOKKEEPER, reason="usage", now=now,
            )
    elif due < 0:
        # If that one has ended too, it is emptied again at once.
        last = _remaining(connection, book)[-1:]
        entries = [(account, -due) for _, account, _, _ in last]
        if entries:
            _post(connection, book, "return", entries, against="used", actor=_BOOKKEEPER, reason="re-rated", now=now)


def _charged(connection: psycopg.Connection[Any], book: Book) -> int:
    charged: int = _one(connection, _CHARGED, {"tenant": book.tenant_id, "currency": book.currency})
    return charged - book.baseline_nano


def _remaining(connection: psycopg.Connection[Any], book: Book) -> list[tuple[Any, ...]]:
    return _rows(connection, _REMAINING, {"tenant": book.tenant_id})


def _post(
    connection: psycopg.Connection[Any], book: Book, kind: str, entries: Sequence[tuple[int, int]], *, against: str, actor: str,
    reason: str, now: datetime,
) -> None:
    transaction = _one(
        connection,
        "insert into credit_transaction (tenant_id, kind, at, actor, reason) "
        "values (%(tenant)s, %(kind)s, %(now)s, %(actor)s, %(reason)s) returning transaction_id",
        {"tenant": book.tenant_id, "kind": kind, "now": now, "actor": actor, "reason": reason},
    )
    other = _one(
        connection, "select account_id from credit_account where tenant_id = %(tenant)s and kind = %(kind)s",
        {"tenant": book.tenant_id, "kind": against},
    )
    whole = [*entries, (other, -sum(amount for _, amount in entries))]
    with connection.cursor() as cursor:
        cursor.executemany("insert into credit_entry values (%s, %s, %s)", [(transaction, *entry) for entry in whole])


def _one(connection: psycopg.Connection[Any], query: str, words: Any) -> Any:
    [(value,)] = _rows(connection, query, words)
    return value


def _rows(connection: psycopg.Connection[Any], query: str, words: Any) -> list[tuple[Any, ...]]:
    with connection.cursor(row_factory=tuple_row) as cursor:
        return cursor.execute(query, words).fetchall()
