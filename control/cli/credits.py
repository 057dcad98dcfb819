# SPDX-License-Identifier: Apache-2.0
"""`peaje credits`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from control.cli.client import at, call
from control.cli.options import Json, Tenant
from control.cli.show import show

app = typer.Typer(no_args_is_help=True, help="What a tenant has paid in advance.")

Reason = Annotated[str, typer.Option("--reason", help="Kept with it.")]


@app.command("grant")
def grant_credits(
    amount: Annotated[str, typer.Argument(help="Such as 100.00.")],
    tenant: Tenant,
    reason: Reason,
    currency: Annotated[str, typer.Option("--currency")] = "USD",
    expires: Annotated[str | None, typer.Option("--expires", help="365d, or a date; never if left out.", show_default=False)] = None,
    reference: Annotated[
        str | None, typer.Option("--reference", help="Such as a payment's number: given twice, it is granted once.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Add credits; from the first one on, a tenant's prepaid budget is its credits."""
    body = {"amount": amount, "currency": currency, "expires": expires, "reason": reason, "reference": reference}
    _show(call("POST", at("/v1/tenants/{}/credits", tenant), body=body), as_json=as_json)


@app.command("show")
def show_credits(tenant: Tenant, as_json: Json = False) -> None:
    """Show what is available, and each grant."""
    _show(call("GET", at("/v1/tenants/{}/credits", tenant)), as_json=as_json)


@app.command("expire")
def expire_credits(grant_id: str, tenant: Tenant, reason: Reason, as_json: Json = False) -> None:
    """End a grant now; what was used of it stays used."""
    _show(call("POST", at("/v1/tenants/{}/credits/{}/expire", tenant, grant_id), body={"reason": reason}), as_json=as_json)


def _show(document: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        show(document, as_json=True)
        return
    print(f"{document['tenant_id']}: {document['available']} {document['currency']} available")
    show({"grants": document["grants"]}, as_json=False)
