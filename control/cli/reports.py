# SPDX-License-Identifier: Apache-2.0
"""`peaje usage` and `peaje explain`."""

from __future__ import annotations

from typing import Annotated

import typer

from control.cli.client import at, call
from control.cli.options import AnyTenant, Json
from control.cli.show import show


def register(app: typer.Typer) -> None:
    """Add the commands to *app*."""

    @app.command("usage")
    def show_usage(
        tenant: AnyTenant = None,
        since: Annotated[str, typer.Option("--since", help="A duration such as 1h or 30d.")] = "24h",
        by: Annotated[str, typer.Option("--by", help="model, key, hour or tenant.")] = "model",
        as_json: Json = False,
    ) -> None:
        """Sum up requests and tokens."""
        answer = call("GET", "/v1/usage", query={"tenant": tenant, "since": since, "by": by})
        show(answer if as_json else {"usage": answer["usage"]}, as_json=as_json)

    @app.command("explain")
    def explain(
        request_id: Annotated[str | None, typer.Argument(help="What became of this request.", show_default=False)] = None,
        key_id: Annotated[str | None, typer.Option("--key-id", help="Or: would this key be let through?")] = None,
        service_account: Annotated[str | None, typer.Option("--service-account", help="Or this service account?")] = None,
        tenant: Annotated[str | None, typer.Option("--tenant", help="Or anybody of this tenant?")] = None,
        project: Annotated[str | None, typer.Option("--project", help="With --tenant.")] = None,
        model: Annotated[str | None, typer.Option("--model")] = None,
        dialect: Annotated[str | None, typer.Option("--dialect", help="openai.chat if left out.")] = None,
        address: Annotated[str | None, typer.Option("--address", help="Where it would come from.")] = None,
        time: Annotated[str | None, typer.Option("--time", help="When, with its zone; now if left out.")] = None,
        as_json: Json = False,
    ) -> None:
        """Say what became of a request (its id is in the x-request-id header), or whether one would be let through."""
        if request_id is not None:
            show(call("GET", at("/v1/requests/{}", request_id)), as_json=as_json)
            return
        asked = {
            "key_id": key_id, "service_account_id": service_account, "tenant": tenant, "project": project,
            "model": model, "dialect": dialect, "address": address, "time": time,
        }  # fmt: skip
        body = {name: value for name, value in asked.items() if value is not None}
        show(call("POST", "/v1/explain", body=body), as_json=as_json)
