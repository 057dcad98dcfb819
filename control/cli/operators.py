# SPDX-License-Identifier: Apache-2.0
"""`peaje operators`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from chassis.secrets import BOOTSTRAP_TOKEN_NAME, read_secret
from control.cli.client import at, call, call_pages
from control.cli.options import AnyTenant, Expires, Json
from control.cli.show import show
from control.laptop.places import read_home

app = typer.Typer(no_args_is_help=True, help="People and programs that use the control API.")


@app.command("create")
def create_operator(
    name: str,
    role: Annotated[
        str, typer.Option("--role", help="platform-admin, tenant-admin, developer, billing-reader, billing-admin or auditor.")
    ],
    tenant: AnyTenant = None,
    expires: Expires = None,
    as_json: Json = False,
) -> None:
    """Make an operator. Its token is shown now and never again."""
    body: dict[str, Any] = {"name": name, "role": role}
    body |= {field: it for field, it in {"tenant": tenant, "expires": expires}.items() if it is not None}
    show(call("POST", "/v1/operators", body=body), as_json=as_json)


@app.command("list")
def list_operators(as_json: Json = False) -> None:
    """List operators, without their tokens."""
    show(call_pages("/v1/operators", "operators"), as_json=as_json)


@app.command("revoke")
def revoke_operator(operator_id: str, as_json: Json = False) -> None:
    """End an operator's token."""
    show(call("POST", at("/v1/operators/{}/revoke", operator_id)), as_json=as_json)


@app.command("bootstrap")
def bootstrap(
    token_file: Annotated[
        Path | None,
        typer.Option("--token-file", help="Default: bootstrap-token in this installation's secrets.", show_default=False),
    ] = None,
    name: Annotated[str, typer.Option("--name")] = "first operator",
    as_json: Json = False,
) -> None:
    """Exchange the one-time token for the first platform-admin's. It is shown now and never again."""
    token = read_secret(token_file or read_home(os.environ) / "secrets" / BOOTSTRAP_TOKEN_NAME)
    show(call("POST", "/v1/bootstrap", body={"token": token, "name": name}, is_public=True), as_json=as_json)
