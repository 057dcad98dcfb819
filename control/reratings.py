# SPDX-License-Identifier: Apache-2.0
"""
Re-rating: a month, or a part of it, by a corrected price. A dry run shows what it would change.

Rows never change. The differences are lines of kind `rerating` on the month's invoice, or, if it is
closed, on the first open one's; the credits of whoever has some follow.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime
from typing import Any, Final

from chassis.errors import Conflict, Invalid
from control import audit, tenants
from control.act import Act
from control.money import decimal_text
from control.prices import Price, columns, tiers
from control.store import Store
from metering.adapters import credits as books
from metering.adapters import rerating
from metering.adapters.periods import lock_charging, month_bounds

REASON_LENGTH_MAX: Final = 500
#: A month of a large installation is read whole.
_TIMEOUT: Final = "30min"


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A corrected price and what it is for; `price.starts` is not used."""

    price: Price
    month: date
    #: Moments within the month; None: its beginning, its end.
    starts: str | None = None
    ends: str | None = None
    reason: str


def rerate(store: Store, act: Act, asked: Asked, *, is_applied: bool) -> dict[str, Any]:
    """
    Compute what a corrected price changes per tenant and, if *is_applied*, charge it; that is audited.

    Raises `Conflict` where it cannot be charged: another currency, or rows that are gone.
    """
    if not 1 <= len(asked.reason.strip()) <= REASON_LENGTH_MAX or len(asked.reason) > REASON_LENGTH_MAX:
        raise Invalid(f"A re-rating says why, in 1 to {REASON_LENGTH_MAX} characters.")
    starts_at, ends_at = _bounds(asked)
    with store.transaction(act.scope) as connection:
        connection.execute("select set_config('statement_timeout', %s, true)", (_TIMEOUT,))
        if is_applied:
            # No collector charges and no month closes meanwhile.
            lock_charging(connection)
        correction = rerating.Correction(
            model=asked.price.model, tenant_id=tenants.resolve_id(connection, asked.price.tenant), starts_at=starts_at,
            ends_at=ends_at, currency=asked.price.currency, tiers=tiers(asked.price), **columns(asked.price),
        )
        differences = rerating.find(connection, correction)
        found = rerating.obstacles(connection, correction)
        if found and is_applied:
            raise Conflict(f"This cannot be re-rated: {'; '.join(found)}.", mend="Choose another time or currency.")
        document = _document(correction, differences) | {"obstacles": found, "rerating_id": None}
        if is_applied and differences:
            made = rerating.apply(connection, correction, reason=asked.reason, by=act.actor, now=act.now)
            document["rerating_id"] = made
            for difference in differences:
                books.lock(connection, difference.tenant_id)
                book = books.book_of(connection, difference.tenant_id)
                if book is not None and book.currency == correction.currency:
                    books.settle(connection, book, act.now)
            audit.append(
                connection, act, "usage.rerated", str(made), tenant_id=correction.tenant_id, after=document | {"reason": asked.reason}
            )
    return document


def _bounds(asked: Asked) -> tuple[datetime, datetime]:
    first, following = month_bounds(asked.month)
    starts = first if asked.starts is None else _moment(asked.starts, what="from")
    ends = following if asked.ends is None else _moment(asked.ends, what="until")
    if not first <= starts < ends <= following:
        raise Invalid(f"From and until do not lie in {asked.month:%Y-%m}, one after the other.", mend="Re-rate one month at a time.")
    return starts, ends


def _moment(text: str, *, what: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as exc:
        raise Invalid(f"{what} is {text!r}.", mend="Write a date or a time such as 2026-11-10T12:00.") from exc
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _document(correction: rerating.Correction, differences: list[rerating.Difference]) -> dict[str, Any]:
    total = sum(it.after_nano - it.before_nano for it in differences)
    return {
        "model": correction.model, "currency": correction.currency, "starts_at": correction.starts_at, "ends_at": correction.ends_at,
        "difference_nano": total, "difference": decimal_text(total),
        "tenants": [
            asdict(it) | {"model": correction.model, "difference_nano": it.after_nano - it.before_nano,
                          "difference": decimal_text(it.after_nano - it.before_nano)}
            for it in differences
        ],
    }  # fmt: skip
