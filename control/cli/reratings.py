# SPDX-License-Identifier: Apache-2.0
"""`peaje rerate`: charge again what was charged by a wrong price."""

from __future__ import annotations

from typing import Annotated

import typer

from control.cli.client import call
from control.cli.options import AnyTenant, Json
from control.cli.show import show
from control.cli.tiers import Tiers, tier_bodies

_SECONDS = 1800.0
_SHOWN = ("tenant_id", "model", "request_count", "unpriced_count", "before_nano", "after_nano", "difference")


def rerate(
    model: Annotated[str, typer.Option("--model")],
    month: Annotated[str, typer.Option("--month", help="Such as 2026-11.")],
    input_price: Annotated[str, typer.Option("--input", help="The right price per million input tokens.")],
    output_price: Annotated[str, typer.Option("--output", help="Per million output tokens.")],
    reason: Annotated[str, typer.Option("--reason", help="Kept with it.")],
    cached: Annotated[str | None, typer.Option("--cached", show_default=False)] = None,
    reasoning: Annotated[str | None, typer.Option("--reasoning", show_default=False)] = None,
    minimum: Annotated[str, typer.Option("--minimum")] = "0",
    meter: Annotated[str | None, typer.Option("--meter", help="What else is charged: images, characters or searches.", show_default=False)] = None,
    each: Annotated[str | None, typer.Option("--each", help="What one of it costs, such as 0.04.", show_default=False)] = None,
    tier: Tiers = None,
    currency: Annotated[str, typer.Option("--currency")] = "USD",
    tenant: AnyTenant = None,
    starts: Annotated[str | None, typer.Option("--from", help="Within the month.", show_default=False)] = None,
    ends: Annotated[str | None, typer.Option("--until", help="Within the month.", show_default=False)] = None,
    is_applied: Annotated[bool, typer.Option("--apply", help="Charge the differences; without, they are only shown.")] = False,
    as_json: Json = False,
) -> None:
    """Show what a corrected price changes, and with --apply charge it: rows stay, the invoice gets a line."""
    body = {
        "model": model, "month": month, "input": input_price, "output": output_price, "cached": cached, "reasoning": reasoning,
        "minimum": minimum, "meter": meter, "each": each, "currency": currency, "tenant": tenant, "from": starts, "until": ends, "reason": reason,
        "tiers": tier_bodies(tier), "apply": is_applied,
    }
    done = call("POST", "/v1/reratings", body=body, timeout_seconds=_SECONDS)
    if as_json:
        show(done, as_json=True)
        return
    show({"tenants": [{name: it[name] for name in _SHOWN} for it in done["tenants"]]}, as_json=False)
    for obstacle in done["obstacles"]:
        print(f"cannot be applied: {obstacle}")
    applied = f"applied as {done['rerating_id']}" if done["rerating_id"] else "nothing was changed"
    print(f"difference {done['currency']} {done['difference']}: {applied}")


def register(app: typer.Typer) -> None:
    """Add the command to *app*."""
    app.command("rerate")(rerate)
