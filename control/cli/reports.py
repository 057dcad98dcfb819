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
    def explain_request(request_id: str, as_json: Json = False) -> None:
        """Say what became of a request (its id is in the x-request-id response header)."""
        show(call("GET", at("/v1/requests/{}", request_id)), as_json=as_json)
