# SPDX-License-Identifier: Apache-2.0
"""
The command line: a thin face on the control API, plus what runs on this machine.

Exit status 0 only on success; every error is one line on stderr with the mend.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from chassis.errors import PeajeError
from control.cli.client import call
from control.cli.limits import limits_app
from control.cli.show import show
from control.laptop import commands as laptop

app = typer.Typer(
    name="peaje", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Keys, limits and exact metering for your model servers, beside Envoy.",
)
tenants_app = typer.Typer(no_args_is_help=True, help="Who pays.")
keys_app = typer.Typer(no_args_is_help=True, help="API keys.")
app.add_typer(tenants_app, name="tenants")
app.add_typer(keys_app, name="keys")
app.add_typer(limits_app, name="limits")
laptop.register(app)

Json = Annotated[bool, typer.Option("--json", help="As JSON, with the field names of the API.")]
Tenant = Annotated[str, typer.Option("--tenant", help="Id or name.")]
AnyTenant = Annotated[str | None, typer.Option("--tenant", help="Id or name; all if left out.", show_default=False)]


@tenants_app.command("create")
def create_tenant(name: str, as_json: Json = False) -> None:
    """Make a tenant."""
    show(call("POST", "/v1/tenants", body={"name": name}), as_json=as_json)


@tenants_app.command("list")
def list_tenants(as_json: Json = False) -> None:
    """List tenants."""
    show(call("GET", "/v1/tenants"), as_json=as_json)


@tenants_app.command("suspend")
def suspend_tenant(tenant: str, as_json: Json = False) -> None:
    """Refuse all requests of a tenant until it is activated again."""
    show(call("PATCH", f"/v1/tenants/{tenant}", body={"state": "suspended"}), as_json=as_json)


@tenants_app.command("activate")
def activate_tenant(tenant: str, as_json: Json = False) -> None:
    """Let a suspended tenant back in."""
    show(call("PATCH", f"/v1/tenants/{tenant}", body={"state": "active"}), as_json=as_json)


@keys_app.command("create")
def create_key(
    tenant: Tenant,
    name: Annotated[str, typer.Option("--name")] = "key",
    models: Annotated[str | None, typer.Option("--models", help="Comma-separated; every model if left out.")] = None,
    expires: Annotated[str | None, typer.Option("--expires", help="30d, 12h, or a date; default 365d.")] = None,
    environment: Annotated[str, typer.Option("--environment", help="live or test.")] = "live",
    as_json: Json = False,
) -> None:
    """Make a key. It is shown now and never again."""
    body: dict[str, Any] = {"name": name, "environment": environment}
    if models is not None:
        body["models"] = [model.strip() for model in models.split(",") if model.strip()]
    if expires is not None:
        body["expires"] = expires
    show(call("POST", f"/v1/tenants/{tenant}/keys", body=body), as_json=as_json)


@keys_app.command("list")
def list_keys(tenant: AnyTenant = None, as_json: Json = False) -> None:
    """List keys, without their secrets."""
    show(call("GET", "/v1/keys" if tenant is None else f"/v1/tenants/{tenant}/keys"), as_json=as_json)


@keys_app.command("rotate")
def rotate_key(
    key_id: str, overlap: Annotated[str, typer.Option("--overlap", help="How long both work.")] = "24h",
    as_json: Json = False,
) -> None:
    """Make a successor of a key; the old one ends when the overlap is over."""
    show(call("POST", f"/v1/keys/{key_id}/rotate", body={"overlap": overlap}), as_json=as_json)


@keys_app.command("revoke")
def revoke_key(key_id: str, as_json: Json = False) -> None:
    """End a key for good, everywhere, within a second."""
    show(call("POST", f"/v1/keys/{key_id}/revoke"), as_json=as_json)


@app.command("usage")
def show_usage(
    tenant: AnyTenant = None,
    since: Annotated[str, typer.Option("--since", help="A duration such as 1h or 30d.")] = "24h",
    by: Annotated[str, typer.Option("--by", help="model, key, hour or tenant.")] = "model",
    as_json: Json = False,
) -> None:
    """Sum up requests and tokens."""
    show(call("GET", "/v1/usage", query={"tenant": tenant, "since": since, "by": by}), as_json=as_json)


@app.command("explain")
def explain_request(request_id: str, as_json: Json = False) -> None:
    """Say what became of a request (its id is in the x-request-id response header)."""
    show(call("GET", f"/v1/requests/{request_id}"), as_json=as_json)


@app.command("check")
def check_configuration(
    directory: Annotated[str | None, typer.Argument(help="An envoy/ directory; default: this installation's source.")] = None,
    as_json: Json = False,
) -> None:
    """Check settings, Envoy's configuration and limits; refuses what would silently do nothing."""
    from control.cli.check import check  # noqa: PLC0415 - starts Envoy, which the other commands need not pay for

    raise typer.Exit(check(directory, as_json=as_json))


@app.command("psql", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def run_psql(
    context: typer.Context,
    billing: Annotated[bool, typer.Option("--billing", help="As the role that reads views and nothing else.")] = False,
) -> None:
    """Open psql on the ledger; further arguments go to psql."""
    from control.cli.psql import run  # noqa: PLC0415

    raise typer.Exit(run(context.args, billing=billing))


def main() -> int:
    """Run the command line; the exit status."""
    try:
        result = app(standalone_mode=False)
    except PeajeError as exc:
        sys.stderr.write(f"{exc}\n")
        return 1
    except typer.Abort:
        return 130
    except Exception as exc:
        # Typer's own usage errors know how to show themselves; anything else is a defect.
        if hasattr(exc, "format_message"):
            sys.stderr.write(f"{exc.format_message()}\n")
            return 2
        raise
    return result if isinstance(result, int) else 0
