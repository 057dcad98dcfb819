# SPDX-License-Identifier: Apache-2.0
"""`peaje prices`: what a million tokens cost, and one of what else is metered."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from control.cli.client import call
from control.cli.options import Json
from control.cli.show import show
from control.cli.tiers import Tiers, tier_bodies, tiers_cell

app = typer.Typer(no_args_is_help=True, help="What a million tokens cost.")

Tenant = Annotated[str | None, typer.Option("--tenant", help="Id or name; everybody if left out.", show_default=False)]
_SHOWN = (
    "rate_card_id", "tenant", "model", "currency", "input", "output", "cached", "reasoning", "minimum", "meter", "each",
    "tiers", "effective_from", "effective_until",
)


@app.command("set")
def set_price(
    model: Annotated[str, typer.Option("--model", help="Served model.")],
    input_price: Annotated[str, typer.Option("--input", help="Per million input tokens, such as 0.15.")],
    output_price: Annotated[str, typer.Option("--output", help="Per million output tokens.")],
    cached: Annotated[str | None, typer.Option("--cached", help="Per million cached input tokens; default as input.")] = None,
    reasoning: Annotated[str | None, typer.Option("--reasoning", help="Per million reasoning tokens; default as output.")] = None,
    minimum: Annotated[str, typer.Option("--minimum", help="The least that a request that used anything costs.")] = "0",
    meter: Annotated[str | None, typer.Option("--meter", help="What else is charged: images, characters or searches.", show_default=False)] = None,
    each: Annotated[str | None, typer.Option("--each", help="What one of it costs, such as 0.04.", show_default=False)] = None,
    tier: Tiers = None,
    currency: Annotated[str, typer.Option("--currency")] = "USD",
    tenant: Tenant = None,
    starts: Annotated[str | None, typer.Option("--from", help="A date, a time or a duration; default now.")] = None,
    as_json: Json = False,
) -> None:
    """Set a price; the one before it ends then. What was charged stays as it was."""
    body = {
        "model": model, "input": input_price, "output": output_price, "cached": cached, "reasoning": reasoning,
        "minimum": minimum, "meter": meter, "each": each, "tiers": tier_bodies(tier),
        "currency": currency, "tenant": tenant, "from": starts,
    }
    made = call("POST", "/v1/prices", body=body)
    show(made if as_json else _line(made), as_json=as_json)


@app.command("list")
def list_prices(
    tenant: Tenant = None,
    in_force: Annotated[bool, typer.Option("--in-force", help="Only those that hold now.")] = False,
    as_json: Json = False,
) -> None:
    """List prices with the time they hold."""
    found = call("GET", "/v1/prices", query={"tenant": tenant, "in_force": "true" if in_force else None})
    if not as_json:
        found = {"prices": [_line(price) for price in found["prices"]]}
    show(found, as_json=as_json)


def _line(price: dict[str, Any]) -> dict[str, Any]:
    return {name: price[name] for name in _SHOWN} | {"tiers": tiers_cell(price["tiers"])}
