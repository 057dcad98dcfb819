# SPDX-License-Identifier: Apache-2.0
"""`peaje keys`."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

import typer

from chassis.clock import utc_now
from control.cli.client import at, call, call_pages
from control.cli.options import AnyTenant, DeniedModels, Expires, Json, Models, Overlap, Project, Scopes, Tenant, listed
from control.cli.show import show

app = typer.Typer(no_args_is_help=True, help="API keys.")

#: What a person looks for in a list; `show` has the rest.
_LISTED = (
    "key_id", "tenant_id", "project_id", "name", "environment", "state", "expires_at", "revoked_at", "last_used_at",
)


@app.command("create")
def create_key(
    tenant: Tenant,
    name: Annotated[str, typer.Option("--name")] = "key",
    project: Project = "default",
    service_account: Annotated[
        str | None, typer.Option("--service-account", help="Whose key it is: an id such as sa_….", show_default=False)
    ] = None,
    scopes: Scopes = None,
    models: Models = None,
    denied_models: DeniedModels = None,
    allowed_cidrs: Annotated[
        str | None, typer.Option("--allowed-cidrs", help="Comma-separated, such as 192.0.2.0/24; any if left out.")
    ] = None,
    expires: Expires = None,
    environment: Annotated[str, typer.Option("--environment", help="live or test.")] = "live",
    as_json: Json = False,
) -> None:
    """Make a key. It is shown now and never again."""
    body: dict[str, Any] = {"name": name, "environment": environment, "project": project}
    lists = {"scopes": scopes, "models": models, "denied_models": denied_models, "allowed_cidrs": allowed_cidrs}
    body |= {field: listed(text) for field, text in lists.items() if text is not None}
    if service_account is not None:
        body["service_account_id"] = service_account
    if expires is not None:
        body["expires"] = expires
    show(call("POST", at("/v1/tenants/{}/keys", tenant), body=body), as_json=as_json)


@app.command("list")
def list_keys(tenant: AnyTenant = None, as_json: Json = False) -> None:
    """List keys, without their secrets."""
    path = "/v1/keys" if tenant is None else at("/v1/tenants/{}/keys", tenant)
    found = call_pages(path, "keys")
    if not as_json:
        now = utc_now()
        found = {"keys": [key | {"state": _standing(key, now)} for key in found["keys"]]}
    show(found, as_json=as_json, columns=_LISTED)


@app.command("show")
def show_key(key_id: str, as_json: Json = False) -> None:
    """Show a key, without its secret: what it may do, when it was used last, whether it was rotated."""
    show(call("GET", at("/v1/keys/{}", key_id)), as_json=as_json)


@app.command("rotate")
def rotate_key(key_id: str, overlap: Overlap = "24h", as_json: Json = False) -> None:
    """Make a successor of a key; the old one ends when the overlap is over."""
    show(call("POST", at("/v1/keys/{}/rotate", key_id), body={"overlap": overlap}), as_json=as_json)


@app.command("disable")
def disable_key(key_id: str, as_json: Json = False) -> None:
    """Refuse a key until it is enabled again, everywhere, within a second."""
    show(call("PATCH", at("/v1/keys/{}", key_id), body={"state": "disabled"}), as_json=as_json)


@app.command("enable")
def enable_key(key_id: str, as_json: Json = False) -> None:
    """Let a disabled key work again."""
    show(call("PATCH", at("/v1/keys/{}", key_id), body={"state": "active"}), as_json=as_json)


@app.command("revoke")
def revoke_key(key_id: str, as_json: Json = False) -> None:
    """End a key for good, everywhere, within a second."""
    show(call("POST", at("/v1/keys/{}/revoke", key_id)), as_json=as_json)


def _standing(key: dict[str, Any], now: datetime) -> str:
    """
    What a key is good for, for a person: the API's state is only whether it was switched off.

    >>> key = {"state": "active", "revoked_at": None, "expires_at": "2026-11-26T09:00:00Z"}
    >>> [_standing(key, datetime.fromisoformat(f"2026-11-26T0{hour}:00:00Z")) for hour in (8, 9)]
    ['active', 'expired']
    """
    for word, field in (("revoked", "revoked_at"), ("expired", "expires_at")):
        ended = key[field]
        if ended is not None and datetime.fromisoformat(ended) <= now:
            return word
    return str(key["state"])
