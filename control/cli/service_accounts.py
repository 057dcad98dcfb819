# SPDX-License-Identifier: Apache-2.0
"""`peaje service-accounts`."""

from __future__ import annotations

from typing import Any

import typer

from control.cli.client import at, call, call_pages
from control.cli.options import DeniedModels, Json, Models, Overlap, Project, Scopes, Tenant, listed
from control.cli.show import show

app = typer.Typer(no_args_is_help=True, help="Machines that sign in for short-lived tokens.")


@app.command("create")
def create_service_account(
    name: str,
    tenant: Tenant,
    project: Project = "default",
    scopes: Scopes = None,
    models: Models = None,
    denied_models: DeniedModels = None,
    as_json: Json = False,
) -> None:
    """Make a service account. Its client secret is shown now and never again."""
    body: dict[str, Any] = {"name": name, "project": project}
    lists = {"scopes": scopes, "models": models, "denied_models": denied_models}
    body |= {field: listed(text) for field, text in lists.items() if text is not None}
    show(call("POST", at("/v1/tenants/{}/service-accounts", tenant), body=body), as_json=as_json)


@app.command("list")
def list_service_accounts(tenant: Tenant, as_json: Json = False) -> None:
    """List a tenant's service accounts, without their secrets."""
    show(call_pages(at("/v1/tenants/{}/service-accounts", tenant), "service_accounts"), as_json=as_json)


@app.command("show")
def show_service_account(service_account_id: str, as_json: Json = False) -> None:
    """Show a service account, without its secret."""
    show(call("GET", at("/v1/service-accounts/{}", service_account_id)), as_json=as_json)


@app.command("rotate")
def rotate_secret(service_account_id: str, overlap: Overlap = "24h", as_json: Json = False) -> None:
    """Make a new client secret; the old one ends when the overlap is over."""
    path = at("/v1/service-accounts/{}/rotate", service_account_id)
    show(call("POST", path, body={"overlap": overlap}), as_json=as_json)


@app.command("suspend")
def suspend_service_account(service_account_id: str, as_json: Json = False) -> None:
    """Refuse a service account, its keys and its tokens until it is activated again."""
    _set_state(service_account_id, "suspended", as_json=as_json)


@app.command("activate")
def activate_service_account(service_account_id: str, as_json: Json = False) -> None:
    """Let a suspended service account back in."""
    _set_state(service_account_id, "active", as_json=as_json)


def _set_state(service_account_id: str, state: str, *, as_json: bool) -> None:
    show(call("PATCH", at("/v1/service-accounts/{}", service_account_id), body={"state": state}), as_json=as_json)
