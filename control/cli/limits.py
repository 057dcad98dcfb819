# SPDX-License-Identifier: Apache-2.0
"""`peaje limits`: how much they may use."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from chassis.errors import Invalid
from control.cli.client import at, call
from control.cli.options import AnyTenant, Json, Key, Model, Tenant
from control.cli.show import show

app = typer.Typer(no_args_is_help=True, help="How much they may use.")

Project = Annotated[str | None, typer.Option("--project", help="Project id; any if left out.", show_default=False)]


def _number(option: str, what: str) -> Any:
    return typer.Option(option, help=f"{what}, or none to remove.", show_default=False)


Number = str | None


@app.command("set")
def set_limit(
    tenant: Tenant,
    project: Project = None,
    key: Key = None,
    model: Model = None,
    rps: Annotated[Number, _number("--rps", "Requests per second")] = None,
    rpm: Annotated[Number, _number("--rpm", "Requests per minute")] = None,
    rph: Annotated[Number, _number("--rph", "Requests per hour")] = None,
    rpd: Annotated[Number, _number("--rpd", "Requests per 24 hours")] = None,
    tps: Annotated[Number, _number("--tps", "Tokens per second")] = None,
    tpm: Annotated[Number, _number("--tpm", "Tokens per minute")] = None,
    tph: Annotated[Number, _number("--tph", "Tokens per hour")] = None,
    tpd: Annotated[Number, _number("--tpd", "Tokens per 24 hours")] = None,
    input_tpm: Annotated[Number, _number("--input-tpm", "Input tokens per minute")] = None,
    output_tpm: Annotated[Number, _number("--output-tpm", "Output tokens per minute")] = None,
    cached_tpm: Annotated[Number, _number("--cached-tpm", "Cached input tokens per minute")] = None,
    concurrency: Annotated[Number, _number("--concurrency", "Requests at once")] = None,
    daily_requests: Annotated[Number, _number("--daily-requests", "Requests per UTC day")] = None,
    monthly_requests: Annotated[Number, _number("--monthly-requests", "Requests per UTC month")] = None,
    daily_tokens: Annotated[Number, _number("--daily-tokens", "Tokens per UTC day")] = None,
    monthly_tokens: Annotated[Number, _number("--monthly-tokens", "Tokens per UTC month")] = None,
    daily_budget: Annotated[Number, _number("--daily-budget", "Money per UTC day, such as 10.00")] = None,
    monthly_budget: Annotated[Number, _number("--monthly-budget", "Money per UTC month, such as 100.00")] = None,
    prepaid: Annotated[Number, _number("--prepaid", "Money paid in advance, in all")] = None,
    currency: Annotated[str | None, typer.Option("--currency", help="Of the budget; default USD.", show_default=False)] = None,
    burst: Annotated[
        int | None, typer.Option("--burst", help="Most at once; default: one period's amount.", show_default=False)
    ] = None,
    on_store_error: Annotated[
        str | None,
        typer.Option("--on-store-error", help="local, allow or deny while the counter store is away.", show_default=False),
    ] = None,
    shadow: Annotated[bool, typer.Option("--shadow", help="Refuse nobody, only log who would be.")] = False,
    soft: Annotated[bool, typer.Option("--soft", help="Refuse nobody, count on past the limit.")] = False,
    hard: Annotated[bool, typer.Option("--hard", help="Refuse: the default; ends --shadow and --soft.")] = False,
    as_json: Json = False,
) -> None:
    """Set limits; what is not named stays. All limits that match a request must allow it."""
    numbers = {
        "--rps": ("requests_per_second", rps), "--rpm": ("requests_per_minute", rpm), "--rph": ("requests_per_hour", rph),
        "--rpd": ("requests_per_day", rpd), "--tps": ("tokens_per_second", tps), "--tpm": ("tokens_per_minute", tpm),
        "--tph": ("tokens_per_hour", tph), "--tpd": ("tokens_per_day", tpd),
        "--input-tpm": ("input_tokens_per_minute", input_tpm), "--output-tpm": ("output_tokens_per_minute", output_tpm),
        "--cached-tpm": ("cached_tokens_per_minute", cached_tpm), "--concurrency": ("concurrency", concurrency),
        "--daily-requests": ("daily_requests", daily_requests), "--monthly-requests": ("monthly_requests", monthly_requests),
        "--daily-tokens": ("daily_tokens", daily_tokens), "--monthly-tokens": ("monthly_tokens", monthly_tokens),
    }  # fmt: skip
    budgets = {"daily_budget": daily_budget, "monthly_budget": monthly_budget, "prepaid_budget": prepaid}
    body: dict[str, Any] = {"project_id": project, "key_id": key, "model": model}
    body |= {field: _whole(text, option) for option, (field, text) in numbers.items() if text is not None}
    body |= {field: None if text == "none" else text for field, text in budgets.items() if text is not None}
    manner = {
        "burst": burst, "on_store_error": on_store_error, "currency": currency, "effect": _effect(shadow, soft, hard),
    }  # fmt: skip
    body |= {field: value for field, value in manner.items() if value is not None}
    show(_flat(call("PUT", at("/v1/tenants/{}/limits", tenant), body=body), as_json), as_json=as_json)


@app.command("show")
def show_limits(
    tenant: AnyTenant = None,
    as_json: Json = False,
) -> None:
    """Show limits."""
    answer = call("GET", "/v1/limits" if tenant is None else at("/v1/tenants/{}/limits", tenant))
    if as_json:
        show(answer, as_json=True)
        return
    show({"limits": [row for scope in answer["limits"] for row in _rows(scope)]}, as_json=False)


@app.command("delete")
def delete_limit(
    tenant: Tenant, project: Project = None, key: Key = None, model: Model = None, as_json: Json = False
) -> None:
    """Remove the limits of exactly this tenant, project, key and model."""
    query = {"project_id": project, "key_id": key, "model": model}
    show(_flat(call("DELETE", at("/v1/tenants/{}/limits", tenant), query=query), as_json), as_json=as_json)


@app.command("explain")
def explain_limits(tenant: Tenant, key: Key = None, model: Model = None, as_json: Json = False) -> None:
    """Say which limits a request of this tenant, key and model would meet, and what each does."""
    query = {"key_id": key, "model": model}
    show(call("GET", at("/v1/tenants/{}/limits/explain", tenant), query=query), as_json=as_json)


capacities = typer.Typer(no_args_is_help=True, help="What the servers behind a model can take, shared among tenants.")
app.add_typer(capacities, name="capacity")

_Served = Annotated[str, typer.Option("--model", help="Served model.")]


@capacities.command("set")
def set_capacity(
    model: _Served,
    slots: Annotated[int | None, typer.Option("--slots", help="Requests under way.", show_default=False)] = None,
    tokens_per_second: Annotated[
        int | None, typer.Option("--tokens-per-second", help="Input and output together.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Share the servers behind a model: once they are full, each tenant has a part of them by its weight."""
    body = {"model": model, "slots": slots, "tokens_per_second": tokens_per_second}
    show(call("PUT", "/v1/capacities", body=body), as_json=as_json)


@capacities.command("show")
def show_capacities(as_json: Json = False) -> None:
    """Show all capacities."""
    show(call("GET", "/v1/capacities"), as_json=as_json)


@capacities.command("delete")
def delete_capacity(model: _Served, as_json: Json = False) -> None:
    """Share no more: whoever comes first is served."""
    show(call("DELETE", "/v1/capacities", query={"model": model}), as_json=as_json)


@app.command("weight")
def weight(
    tenant: Tenant,
    weight_: Annotated[
        int | None, typer.Option("--set", help="1 to 1000; a tenant that was given none has 1.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Show or set a tenant's weight where it shares a model's servers with others."""
    path = at("/v1/tenants/{}/weight", tenant)
    answer = call("GET", path) if weight_ is None else call("PUT", path, body={"weight": weight_})
    show(answer, as_json=as_json)


def _effect(shadow: bool, soft: bool, hard: bool) -> str | None:
    if shadow + soft + hard > 1:
        raise Invalid("--shadow, --soft and --hard exclude each other.", mend="Give one of them.")
    return "shadow" if shadow else "count" if soft else "refuse" if hard else None


def _flat(scope: dict[str, Any], as_json: bool) -> dict[str, Any]:
    return scope if as_json else {"limits": _rows(scope)}


def _rows(scope: dict[str, Any]) -> list[dict[str, Any]]:
    place = {name: scope[name] for name in ("tenant_id", "project_id", "key_id", "model")}
    return [
        {**place, "limit": name, "amount": limit["amount"], "effect": limit["effect"], "on_store_error": limit["on_store_error"]}
        for name, limit in scope["limits"].items()
    ]


def _whole(text: str, option: str) -> int | None:
    if text == "none":
        return None
    try:
        return int(text)
    except ValueError as exc:
        raise Invalid(f"{option} is {text!r}.", mend="Write a whole number, or none.") from exc
