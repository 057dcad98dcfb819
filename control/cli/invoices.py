# SPDX-License-Identifier: Apache-2.0
"""`peaje invoice` and `peaje period`: what a tenant owes, and months that are closed for good."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from chassis.errors import Invalid
from control.cli.client import at, call
from control.cli.options import Json
from control.cli.show import show

period_app = typer.Typer(no_args_is_help=True, help="Months: close for good, verify.")

class Format(StrEnum):
    """What an invoice is written as."""

    TABLE = "table"
    CSV = "csv"
    JSON = "json"
    PARQUET = "parquet"


Month = Annotated[str, typer.Argument(help="Such as 2026-11.")]
_SHOWN = (
    "project", "model", "kind", "request_count", "input_tokens", "output_tokens", "cached_tokens", "reasoning_tokens",
    "meter", "quantity", "currency", "amount",
)


def show_invoice(
    tenant: Annotated[str, typer.Option("--tenant", help="Id or name.")],
    month: Annotated[str, typer.Option("--month", help="Such as 2026-11.")],
    format_: Annotated[Format | None, typer.Option("--format", help="Amounts are exact decimals in each.", show_default=False)] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write to this file; parquet needs one.", show_default=False)] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="As --format csv.")] = False,
    as_json: Json = False,
) -> None:
    """Show what a tenant owes for a month."""
    asked = {*([format_] if format_ else []), *([Format.CSV] if as_csv else []), *([Format.JSON] if as_json else [])}
    if len(asked) > 1:
        raise Invalid("--csv, --json and --format exclude each other.")
    chosen = asked.pop() if asked else Format.TABLE
    if chosen is Format.PARQUET and out is None:
        raise Invalid("A Parquet file is not for the screen.", mend="Name a file with --out.")
    if chosen is Format.TABLE and out is not None:
        raise Invalid("A table is for the screen.", mend="Use --format csv, json or parquet with --out.")
    document = call("GET", at("/v1/tenants/{}/invoices/{}", tenant, month))
    if chosen is Format.TABLE:
        _print(document)
        return
    data = _encoded(document, chosen)
    if out is None:
        sys.stdout.write(data.decode())
        return
    try:
        out.write_bytes(data)
    except OSError as exc:
        raise Invalid(f"{out} cannot be written: {exc.strerror}.") from exc


@period_app.command("list")
def list_periods(as_json: Json = False) -> None:
    """List closed months."""
    show(call("GET", "/v1/periods"), as_json=as_json)


@period_app.command("close")
def close_period(
    month: Month,
    exception: Annotated[str | None, typer.Option("--exception", help="Why to close although something is unexplained.")] = None,
    as_json: Json = False,
) -> None:
    """Close a month for good: later facts become adjustments of the first open one."""
    show(call("POST", at("/v1/periods/{}/close", month), body={"exception": exception}), as_json=as_json)


@period_app.command("verify")
def verify_period(month: Month, as_json: Json = False) -> None:
    """Find out whether a closed month is what it was; exit status 1 if not."""
    found = call("GET", at("/v1/periods/{}/verification", month))
    show(found if as_json else found | {"changes": "; ".join(found["changes"]) or None}, as_json=as_json)
    raise typer.Exit(0 if found["ok"] else 1)


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command("invoice")(show_invoice)
    app.add_typer(period_app, name="period")


def _encoded(document: dict[str, Any], chosen: Format) -> bytes:
    from control import invoices

    match chosen:
        case Format.PARQUET:
            return invoices.as_parquet(document)
        case Format.CSV:
            return invoices.as_csv(document).encode()
        case _:
            return (json.dumps(document, indent=2) + "\n").encode()


def _print(document: dict[str, Any]) -> None:
    print(f"{document['tenant']}, {document['period']}, {document['state']}")
    show({"lines": [{name: line[name] for name in _SHOWN} for line in document["lines"]]}, as_json=False)
    for total in document["totals"]:
        print(f"total {total['currency']} {total['amount']}")
    if document["requests_without_price"]:
        print(f"{document['requests_without_price']} requests used something and have no price: `peaje rerate` charges them")
