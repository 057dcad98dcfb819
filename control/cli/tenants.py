# SPDX-License-Identifier: Apache-2.0
"""`peaje tenants`."""

from __future__ import annotations

import typer

from control.cli.client import at, call, call_pages
from control.cli.options import Json
from control.cli.show import show

app = typer.Typer(no_args_is_help=True, help="Who pays.")


@app.command("create")
def create_tenant(name: str, as_json: Json = False) -> None:
    """Make a tenant."""
    show(call("POST", "/v1/tenants", body={"name": name}), as_json=as_json)


@app.command("list")
def list_tenants(as_json: Json = False) -> None:
    """List tenants."""
    show(call_pages("/v1/tenants", "tenants"), as_json=as_json)


@app.command("suspend")
def suspend_tenant(tenant: str, as_json: Json = False) -> None:
    """Refuse all requests of a tenant until it is activated again."""
    show(call("PATCH", at("/v1/tenants/{}", tenant), body={"state": "suspended"}), as_json=as_json)


@app.command("activate")
def activate_tenant(tenant: str, as_json: Json = False) -> None:
    """Let a suspended tenant back in."""
    show(call("PATCH", at("/v1/tenants/{}", tenant), body={"state": "active"}), as_json=as_json)
