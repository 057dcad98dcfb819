# SPDX-License-Identifier: Apache-2.0
"""
Credits: what a tenant has paid in advance. Grant, show, expire.

With its first credit a tenant's prepaid budget is its credits: what is not covered is refused.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Final

from chassis import keys as formats
from chassis.errors import Conflict, Invalid, NotFound
from control import audit, tenants
from control.act import Act
from control.durations import moment_ahead
from control.limits import CURRENCY_DEFAULT, MONEY_MAX
from control.minting import Mint
from control.money import decimal_text, nano
from control.store import Connection, Store
from metering.adapters import credits as books

REASON_LENGTH_MAX: Final = 500
REFERENCE_LENGTH_MAX: Final = 200
#: Transactions that are shown; all of them are in billing_credit_entries_v1.
_SHOWN_MAX: Final = 20
_ID_PREFIX: Final = "cg_"
_GRANTS: Final = """
select grant_id, amount_nano, expires_at, reason, reference, created_by, created_at from credit_grant
where tenant_id = %s order by created_at, grant_id
"""


def grant(
    store: Store, act: Act, mint: Mint, tenant: str, *, amount: str, currency: str, expires: str | None, reason: str, reference: str | None
) -> dict[str, Any]:
    """
    Add credits; the prepaid budget grows at once. A second grant with the same *reference* is the first one.

    Raises `Conflict` for another currency than the tenant's, a reference that was another amount's, or a
    prepaid budget that somebody has set by hand.
    """
    amount_nano = nano(amount, what="amount")
    if not 0 < amount_nano <= MONEY_MAX * 10**9:
        raise Invalid(f"amount is {amount}; it must be more than 0 and at most {MONEY_MAX}.")
    _refuse_text(reason, what="A reason", length_max=REASON_LENGTH_MAX)
    if reference is not None:
        _refuse_text(reference, what="A reference", length_max=REFERENCE_LENGTH_MAX)
    expires_at = None if expires is None else moment_ahead(expires, what="expires", now=act.now)
    with store.transaction(act.scope) as connection:
        tenant_id = tenants.resolve(connection, tenant)["tenant_id"]
        books.lock(connection, tenant_id)
        book = books.book_of(connection, tenant_id)
        if book is None:
            _refuse_other_budget(connection, tenant_id)
            book = books.open_book(connection, tenant_id, _currency(currency), act.now)
        elif book.currency != currency:
            raise Conflict(f"The credits of {tenant_id!r} are in {book.currency}.")
        known = _known(connection, tenant_id, reference)
        if known is not None:
            if known["amount_nano"] != amount_nano:
                raise Conflict(f"Reference {reference!r} was granted {decimal_text(known['amount_nano'])}.")
            return _document(connection, book) | {"grant_id": known["grant_id"]}
        row = {
            "grant_id": _ID_PREFIX + formats.mint_token("credit", mint.random_bytes).token_id, "tenant_id": tenant_id,
            "amount_nano": amount_nano, "expires_at": expires_at, "reason": reason, "reference": reference,
            "created_by": act.actor, "created_at": act.now,
        }
        books.add_grant(connection, book, row)
        if books.budget(connection, book) > books.BUDGET_MAX:
            raise Invalid(f"The prepaid budget would be more than {MONEY_MAX}, which the limiter does not count exactly.")
        books.settle(connection, book, act.now)
        audit.append(connection, act, "credits.granted", row["grant_id"], tenant_id=tenant_id, after=row | {"currency": book.currency})
        return _document(connection, book) | {"grant_id": row["grant_id"]}


def show(store: Store, act: Act, tenant: str) -> dict[str, Any]:
    """Balance, grants with what remains of each, and the latest transactions; raises `NotFound` if there never was a credit."""
    with store.snapshot(act.scope) as connection:
        tenant_id = tenants.resolve(connection, tenant)["tenant_id"]
        book = books.book_of(connection, tenant_id)
        if book is None:
            raise NotFound(f"Tenant {tenant_id!r} has no credits.", mend="See `peaje credits grant`.")
        return _document(connection, book)


def expire(store: Store, act: Act, tenant: str, grant_id: str, *, reason: str) -> dict[str, Any]:
    """End a grant now; what was used of it stays used. Ending it again changes nothing."""
    _refuse_text(reason, what="A reason", length_max=REASON_LENGTH_MAX)
    with store.transaction(act.scope) as connection:
        tenant_id = tenants.resolve(connection, tenant)["tenant_id"]
        books.lock(connection, tenant_id)
        book = books.book_of(connection, tenant_id)
        if book is None or grant_id not in books.grants(connection, book):
            raise NotFound(f"There is no grant {grant_id!r}.", mend="See `peaje credits show`.")
        books.settle(connection, book, act.now)
        _, remaining = books.grants(connection, book)[grant_id]
        if remaining:
            books.expire(connection, book, grant_id, actor=act.actor, reason=reason, now=act.now)
            books.set_budget(connection, book, act.now)
            audit.append(
                connection, act, "credits.expired", grant_id, tenant_id=tenant_id, after={"amount_nano": remaining, "reason": reason}
            )
        return _document(connection, book)


def _document(connection: Connection, book: books.Book) -> dict[str, Any]:
    found = asdict(books.state(connection, book))
    remaining = books.grants(connection, book)
    # What the ledger has charged and the books do not have yet is taken off already.
    available = max(0, found["balance_nano"] - max(0, found["owed_nano"]))
    return {
        "tenant_id": book.tenant_id, "currency": book.currency, "available": decimal_text(available), "available_nano": available,
        **found,
        "grants": [
            row | {"remaining_nano": remaining[row["grant_id"]][1]}
            for row in connection.execute(_GRANTS, (book.tenant_id,)).fetchall()
        ],
        "transactions": connection.execute(
            "select transaction_id, t.kind, at, actor, reason, sum(abs(amount_nano))::bigint / 2 as amount_nano "
            "from credit_transaction t join credit_entry using (transaction_id) where tenant_id = %s "
            "group by transaction_id order by transaction_id desc limit %s",
            (book.tenant_id, _SHOWN_MAX),
        ).fetchall(),
    }


def _known(connection: Connection, tenant_id: str, reference: str | None) -> dict[str, Any] | None:
    if reference is None:
        return None
    return connection.execute(
        "select grant_id, amount_nano from credit_grant where tenant_id = %s and reference = %s", (tenant_id, reference)
    ).fetchone()


def _refuse_other_budget(connection: Connection, tenant_id: str) -> None:
    found = connection.execute(
        "select from rate_limit where tenant_id = %s and num_nonnulls(project_id, key_id, model) = 0 and unit = 'money' "
        "and period = 'ever'",
        (tenant_id,),
    ).fetchone()
    if found is not None:
        raise Conflict(f"Tenant {tenant_id!r} has a prepaid budget that was set by hand.", mend="Remove it: `peaje limits`.")


def _refuse_text(text: str, *, what: str, length_max: int) -> None:
    if not 1 <= len(text.strip()) <= length_max or not text.isprintable() or len(text) > length_max:
        raise Invalid(f"{what} has 1 to {length_max} printable characters.")


def _currency(text: str) -> str:
    if not (len(text) == len(CURRENCY_DEFAULT) and text.isascii() and text.isalpha() and text.isupper()):
        raise Invalid("A currency has three capital letters, such as USD.")
    return text
