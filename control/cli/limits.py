# SPDX-License-Identifier: Apache-2.0
"""`peaje limits`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from chassis.errors import Invalid
from control.cli.client import at, call
from control.cli.options import AnyTenant, Json, Key, Model, Tenant
from control.cli.show import show

app = typer.Typer(no_args_is_help=True, help="How much they may use.")


@app.command("set")
def set_limit(
    tenant: Tenant, key: Key = None, model: Model = None,
    rpm: Annotated[str | None, typer.Option("--rpm", help="Requests per minute, or none to remove.")] = None,
    tpm: Annotated[str | None, typer.Option("--tpm", help="Tokens per minute, or none to remove.")] = None,
    as_json: Json = False,
) -> None:
    """Set a limit; what is not named stays."""
    body: dict[str, Any] = {"key_id": key, "model": model}
    for field, option, text in (("requests_per_minute", "--rpm", rpm), ("tokens_per_minute", "--tpm", tpm)):
        if text is not None:
            body[field] = _number(text, option)
    show(call("PUT", at("/v1/tenants/{}/limits", tenant), body=body), as_json=as_json)


@app.command("show")
def show_limits(tenant: AnyTenant = None, as_json: Json = False) -> None:
    """Show limits."""
    show(call("GET", "/v1/limits" if tenant is None else at("/v1/tenants/{}/limits", tenant)), as_json=as_json)


@app.command("delete")
def delete_limit(tenant: Tenant, key: Key = None, model: Model = None, as_json: Json = False) -> None:
    """Remove the limit of exactly this tenant, key and model."""
    query = {"key_id": key, "model": model}
    show(call("DELETE", at("/v1/tenants/{}/limits", tenant), query=query), as_json=as_json)


def _number(text: str, option: str) -> int | None:
    if text == "none":
        return None
    try:
        return int(text)
    except ValueError as exc:
        raise Invalid(f"{option} is {text!r}.", mend="Write a whole number, or none.") from exc
