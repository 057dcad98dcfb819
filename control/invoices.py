# SPDX-License-Identifier: Apache-2.0
"""Invoices of a tenant and a month, and the closing of months."""

from __future__ import annotations

import csv
import importlib
import io
import re
from dataclasses import asdict
from datetime import date
from decimal import Decimal
from typing import Any

from chassis.errors import Conflict, Invalid, NotFound, Unavailable
from control import audit, tenants
from control.act import Act
from control.money import decimal_text
from control.outbox import tell
from control.store import Connection, Store
from metering.adapters import periods
from metering.core import outgoing

#: A month of a large installation is read whole, row by row, when it closes.
_PERIOD_TIMEOUT = "30min"
_EXCEPTION_LENGTH_MAX = 500
_MONTH = re.compile(r"([0-9]{4})-(0[1-9]|1[0-2])")

_LINES = """
select period, tenant, project, model, kind, request_count, input_tokens, output_tokens, cached_tokens, reasoning_tokens,
       meter, quantity, currency, amount_nano, state
from control_invoice where tenant = %(tenant)s and period = %(period)s
order by kind desc, project, model, currency nulls last, meter nulls first
"""
#: Lines of a re-rating are by the month that their rows began in; a row that came late is charged in another one.
_PRICED_LATER = """
select (select coalesce(sum(unpriced_count), 0) from rerating_line where tenant_id = %(tenant)s and of_period = %(period)s)::bigint
     + count(*) filter (where a.period = %(period)s) - count(*) filter (where a.of_period = %(period)s) as count
from adjustment a join rerated_row r using (request_id)
where a.tenant_id = %(tenant)s and r.before_nano is null
"""
_TOTALS = """
select tenant, currency, sum(amount_nano)::bigint as amount_nano from control_invoice
where period = %(period)s and currency is not null group by 1, 2 order by 1, 2
"""
_CSV_COLUMNS = (
    "period", "tenant", "project", "model", "kind", "request_count", "input_tokens", "output_tokens", "cached_tokens",
    "reasoning_tokens", "currency", "amount", "state", "meter", "quantity",
)


def month(text: str) -> date:
    """
    The first day of a month such as 2026-11.

    >>> month("2026-11")
    datetime.date(2026, 11, 1)
    """
    matched = _MONTH.fullmatch(text)
    if matched is None or int(matched[1]) < 1:
        raise Invalid(f"The month is {text!r}.", mend="Write it as 2026-11.")
    return date(int(matched[1]), int(matched[2]), 1)


def invoice(store: Store, act: Act, tenant: str, period: date) -> dict[str, Any]:
    """What a tenant owes for a month: lines, a total per currency, and how many requests had no price."""
    with store.snapshot(act.scope) as connection:
        tenant_id = tenants.resolve(connection, tenant)["tenant_id"]
        lines = connection.execute(_LINES, {"tenant": tenant_id, "period": period}).fetchall()
        priced_later = connection.execute(_PRICED_LATER, {"tenant": tenant_id, "period": period}).fetchone()
        assert priced_later is not None
        closed = any(it.period >= period for it in periods.closed_periods(connection))
    totals: dict[str, int] = {}
    for line in lines:
        if line["currency"] is not None:
            totals[line["currency"]] = totals.get(line["currency"], 0) + line["amount_nano"]
    return {
        "tenant": tenant_id,
        "period": f"{period:%Y-%m}",
        "state": "closed" if closed else "open",
        "totals": [
            {"currency": currency, "amount_nano": amount, "amount": decimal_text(amount)}
            for currency, amount in sorted(totals.items())
        ],
        # Requests that used nothing need none.
        "requests_without_price": sum(
            line["request_count"] for line in lines
            if line["currency"] is None and line["input_tokens"] + line["output_tokens"] + line["quantity"] > 0
        ) - priced_later["count"],
        "lines": [_shown(line) for line in lines],
    }


def as_csv(document: dict[str, Any]) -> str:
    """The lines of an invoice as CSV with a header; amounts are exact decimals."""
    out = io.StringIO()
    writer = csv.DictWriter(out, _CSV_COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _safe(line[name]) for name in _CSV_COLUMNS} for line in document["lines"])
    return out.getvalue()


def as_parquet(document: dict[str, Any]) -> bytes:
    """
    The lines of an invoice as a Parquet file: counts as int64, amounts as decimal(38, 9), never a float.

    Raises `Unavailable` where the library for it is not installed.
    """
    try:
        pa = importlib.import_module("pyarrow")
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as exc:
        raise Unavailable(
            "Parquet needs the library pyarrow, which is not installed.", mend="Install the extra `parquet`, or use --format csv."
        ) from exc
    texts = ("tenant", "project", "model", "kind", "currency", "state", "meter")
    counts = ("request_count", "input_tokens", "output_tokens", "cached_tokens", "reasoning_tokens", "quantity", "amount_nano")
    kinds = {name: pa.string() for name in texts} | dict.fromkeys(counts, pa.int64())
    kinds |= {"period": pa.date32(), "amount": pa.decimal128(38, 9)}
    rows = [
        {**line, "period": month(line["period"]), "amount": None if line["amount"] is None else Decimal(line["amount"])}
        for line in document["lines"]
    ]
    schema = pa.schema([(name, kinds[name]) for name in (*_CSV_COLUMNS, "amount_nano")])
    out = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows, schema=schema), out)
    return out.getvalue()


def list_periods(store: Store, act: Act) -> list[dict[str, Any]]:
    """Closed months, in order."""
    with store.transaction(act.scope) as connection:
        return [_closed(it) for it in periods.closed_periods(connection)]


def close(store: Store, act: Act, period: date, *, exception: str | None) -> dict[str, Any]:
    """
    Close a month for good; raises `Conflict` with all that speaks against it.

    What is unexplained can be overruled by an *exception*, which is kept with the month. That a month
    is not over, or an earlier one is open, cannot.
    """
    if exception is not None and not 1 <= len(exception.strip()) <= _EXCEPTION_LENGTH_MAX:
        raise Invalid(f"An exception says why, in 1 to {_EXCEPTION_LENGTH_MAX} characters.")
    if periods.month_bounds(period)[1] > act.now:
        raise Conflict(f"{period:%Y-%m} is not over.", mend="Close it next month.")
    with store.transaction(act.scope) as connection:
        connection.execute("select set_config('statement_timeout', %s, true)", (_PERIOD_TIMEOUT,))
        periods.lock_charging(connection)
        if any(it.period >= period for it in periods.closed_periods(connection)):
            raise Conflict(f"{period:%Y-%m} is closed already.", mend="Later facts are adjustments of the first open month.")
        earlier = periods.earlier_open(connection, period)
        if earlier is not None:
            raise Conflict(f"{earlier:%Y-%m} has usage and is not closed.", mend="Close months in order.")
        found = periods.obstacles(connection, period)
        if found and exception is None:
            raise Conflict(
                f"{period:%Y-%m} cannot be closed: {'; '.join(found)}.",
                mend="Mend it, or close with --exception and the reason.",
            )
        closed = periods.close(
            connection, period, by=act.actor, exception=exception if found else None, now=act.now
        )
        shown = _closed(closed)
        audit.append(connection, act, "period.closed", shown["period"], tenant_id=None, after=shown)
        _tell(connection, act, period, shown)
    return shown


def verify(store: Store, act: Act, period: date) -> dict[str, Any]:
    """Whether a closed month is what it was: `ok`, and in what not; raises `NotFound` if it is not closed."""
    with store.snapshot(act.scope) as connection:
        connection.execute("select set_config('statement_timeout', %s, true)", (_PERIOD_TIMEOUT,))
        found = next((it for it in periods.closed_periods(connection) if it.period == period), None)
        if found is None:
            raise NotFound(f"{period:%Y-%m} is not closed.", mend="See `peaje period list`.")
        changed = periods.changes(connection, found)
    return _closed(found) | {"ok": not changed, "changes": changed}


def _tell(connection: Connection, act: Act, period: date, closed: dict[str, Any]) -> None:
    """The month to the platform, and to each tenant that is charged in it what it owes."""
    told = ("period", "closed_at", "exception", "row_count", "root_hash")
    tell(connection, act, outgoing.PERIOD_CLOSED, tenant_id=None, data={name: closed[name] for name in told})
    totals: dict[str, list[dict[str, Any]]] = {}
    for row in connection.execute(_TOTALS, {"period": period}).fetchall():
        totals.setdefault(row["tenant"], []).append(
            {"currency": row["currency"], "amount_nano": row["amount_nano"], "amount": decimal_text(row["amount_nano"])}
        )
    for tenant_id, amounts in totals.items():
        tell(connection, act, outgoing.INVOICE_CLOSED, tenant_id=tenant_id, data={"period": closed["period"], "totals": amounts})


def _closed(it: periods.Closed) -> dict[str, Any]:
    return asdict(it) | {"period": f"{it.period:%Y-%m}"}


def _shown(line: dict[str, Any]) -> dict[str, Any]:
    amount = None if line["amount_nano"] is None else decimal_text(line["amount_nano"])
    return line | {"period": f"{line['period']:%Y-%m}", "amount": amount}


def _safe(value: Any) -> Any:
    """A text that a spreadsheet would run as a formula is shown as text."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value
