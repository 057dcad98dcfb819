# SPDX-License-Identifier: Apache-2.0
"""`peaje webhooks`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from chassis.secrets import read_private
from control.cli.client import at, call, call_pages
from control.cli.options import AnyTenant, Json, Overlap, listed
from control.cli.show import show

app = typer.Typer(no_args_is_help=True, help="Who is told of what happens: budgets, keys, months, usage.")

_LISTED = ("webhook_id", "tenant_id", "name", "format", "state", "url", "behind_count", "failure_count", "missed_count")


@app.command("add")
def add_webhook(
    url: Annotated[str | None, typer.Argument(help="https only; may be left out for stripe.", show_default=False)] = None,
    tenant: AnyTenant = None,
    name: Annotated[str, typer.Option("--name")] = "webhook",
    format_: Annotated[str, typer.Option("--format", help="standard, cloudevents, cloudevents-batch, lago or stripe.")] = "standard",
    events: Annotated[
        str | None, typer.Option("--events", help="Comma-separated kinds; all but usage if left out.", show_default=False)
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option("--token-file", help="File with the token that the receiver knows us by.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Tell a receiver of what happens from now on. Its secret is shown now and never again."""
    body: dict[str, Any] = {"url": url, "tenant": tenant, "name": name, "format": format_}
    if events is not None:
        body["events"] = listed(events)
    if token_file is not None:
        body["token"] = read_private(token_file)
    show(call("POST", "/v1/webhooks", body=body), as_json=as_json)


@app.command("list")
def list_webhooks(as_json: Json = False) -> None:
    """List webhooks and how each is doing."""
    show(call_pages("/v1/webhooks", "webhooks"), as_json=as_json, columns=_LISTED)


@app.command("show")
def show_webhook(webhook_id: str, as_json: Json = False) -> None:
    """Show a webhook, without its secret."""
    show(call("GET", at("/v1/webhooks/{}", webhook_id)), as_json=as_json)


@app.command("rotate-secret")
def rotate_secret(webhook_id: str, overlap: Overlap = "24h", as_json: Json = False) -> None:
    """Make a new secret; until the overlap is over every message is signed with both."""
    show(call("POST", at("/v1/webhooks/{}/rotate-secret", webhook_id), body={"overlap": overlap}), as_json=as_json)


@app.command("pause")
def pause_webhook(webhook_id: str, as_json: Json = False) -> None:
    """Send it nothing until it is resumed; what happens meanwhile waits, for two weeks at most."""
    show(call("POST", at("/v1/webhooks/{}/pause", webhook_id)), as_json=as_json)


@app.command("resume")
def resume_webhook(
    webhook_id: str,
    skip: Annotated[bool, typer.Option("--skip", help="Leave out the event that it could not be told.")] = False,
    as_json: Json = False,
) -> None:
    """Go on where it stopped, at once; also for one that was paused because it failed for long."""
    show(call("POST", at("/v1/webhooks/{}/resume", webhook_id), body={"skip": skip}), as_json=as_json)


@app.command("test")
def send_test(webhook_id: str, as_json: Json = False) -> None:
    """Send it an event of kind webhook.test; see `peaje webhooks deliveries` for what became of it."""
    show(call("POST", at("/v1/webhooks/{}/test", webhook_id)), as_json=as_json)


@app.command("deliveries")
def list_deliveries(
    webhook_id: str, limit: Annotated[int, typer.Option("--limit", help="At most 1000.")] = 50, as_json: Json = False
) -> None:
    """List its latest attempts, newest first."""
    show(call("GET", at("/v1/webhooks/{}/deliveries", webhook_id), query={"limit": str(limit)}), as_json=as_json)


@app.command("customer")
def set_customer(
    webhook_id: str, tenant: str,
    customer: Annotated[str | None, typer.Argument(help="Such as cus_…; none: our own id.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """Say what the receiver calls a tenant: Stripe's customer, Lago's subscription."""
    path = at("/v1/webhooks/{}/customers/{}", webhook_id, tenant)
    show(call("PUT", path, body={"customer": customer}), as_json=as_json)


@app.command("remove")
def remove_webhook(webhook_id: str, as_json: Json = False) -> None:
    """Forget a webhook, its secrets and what waited for it."""
    show(call("DELETE", at("/v1/webhooks/{}", webhook_id)), as_json=as_json)
