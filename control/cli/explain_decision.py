# SPDX-License-Identifier: Apache-2.0
"""`peaje would`: would a request be let through, and which rule says so?"""

from __future__ import annotations

from typing import Annotated

import typer

from control.cli.client import call
from control.cli.show import show


def register(app: typer.Typer) -> None:
    """Add the command to *app*."""
    app.command("would")(explain_decision)


def explain_decision(
    key_id: Annotated[str | None, typer.Option("--key-id", help="Whose request: a key's.")] = None,
    service_account: Annotated[str | None, typer.Option("--service-account", help="Or a service account's.")] = None,
    tenant: Annotated[str | None, typer.Option("--tenant", help="Or anybody's of this tenant.")] = None,
    project: Annotated[str, typer.Option("--project")] = "default",
    model: Annotated[str | None, typer.Option("--model")] = None,
    dialect: Annotated[str, typer.Option("--dialect", help="openai.chat, anthropic.messages, ...")] = "openai.chat",
    address: Annotated[str, typer.Option("--address", help="Where it would come from.")] = "127.0.0.1",
    time: Annotated[str | None, typer.Option("--time", help="When, with its zone; now if left out.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, with the field names of the API.")] = False,
) -> None:
    """Say whether a request would be let through, and which rule says so, without sending it."""
    body = {
        "key_id": key_id, "service_account_id": service_account, "tenant": tenant, "project": project, "model": model,
        "dialect": dialect, "address": address, "time": time,
    }  # fmt: skip
    given = {name: value for name, value in body.items() if value is not None}
    show(call("POST", "/v1/explain", body=given), as_json=as_json)
