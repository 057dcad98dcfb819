# SPDX-License-Identifier: Apache-2.0
"""`peaje projects`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from control.cli.client import at, call, call_pages
from control.cli.options import Json, Tenant, labelled
from control.cli.show import show

app = typer.Typer(no_args_is_help=True, help="What a tenant divides its keys by.")

Labels = Annotated[
    list[str] | None, typer.Option("--label", help="NAME=VALUE, for policies; may be repeated.", show_default=False)
]


@app.command("create")
def create_project(name: str, tenant: Tenant, label: Labels = None, as_json: Json = False) -> None:
    """Make a project."""
    body: dict[str, Any] = {"name": name, "labels": labelled(label or [])}
    show(call("POST", at("/v1/tenants/{}/projects", tenant), body=body), as_json=as_json)


@app.command("list")
def list_projects(tenant: Tenant, as_json: Json = False) -> None:
    """List a tenant's projects."""
    show(call_pages(at("/v1/tenants/{}/projects", tenant), "projects"), as_json=as_json)


@app.command("show")
def show_project(project: str, tenant: Tenant, as_json: Json = False) -> None:
    """Show a project."""
    show(call("GET", at("/v1/tenants/{}/projects/{}", tenant, project)), as_json=as_json)


@app.command("label")
def label_project(project: str, tenant: Tenant, label: Labels = None, as_json: Json = False) -> None:
    """Replace a project's labels; none given removes them all."""
    _change(tenant, project, {"labels": labelled(label or [])}, as_json=as_json)


@app.command("suspend")
def suspend_project(project: str, tenant: Tenant, as_json: Json = False) -> None:
    """Refuse all requests of a project until it is activated again."""
    _change(tenant, project, {"state": "suspended"}, as_json=as_json)


@app.command("activate")
def activate_project(project: str, tenant: Tenant, as_json: Json = False) -> None:
    """Let a suspended project back in."""
    _change(tenant, project, {"state": "active"}, as_json=as_json)


def _change(tenant: str, project: str, body: dict[str, Any], *, as_json: bool) -> None:
    show(call("PATCH", at("/v1/tenants/{}/projects/{}", tenant, project), body=body), as_json=as_json)
