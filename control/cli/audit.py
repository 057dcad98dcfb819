# SPDX-License-Identifier: Apache-2.0
"""`peaje audit`."""

from __future__ import annotations

from typing import Annotated

import typer

from control.cli.client import call
from control.cli.options import Json
from control.cli.show import show

app = typer.Typer(no_args_is_help=True, help="What was done, by whom; append-only and chained.")

#: A long log takes its time: about ten seconds a million entries.
_VERIFY_SECONDS = 600.0


@app.command("list")
def list_audit(
    after: Annotated[int, typer.Option("--after", help="The sequence number to go on from.")] = 0,
    limit: Annotated[int, typer.Option("--limit", help="Entries, at most 1000.")] = 100,
    as_json: Json = False,
) -> None:
    """List entries, oldest first."""
    answer = call("GET", "/v1/audit", query={"after": str(after), "limit": str(limit)})
    columns = ("sequence", "at", "actor", "tenant_id", "action", "object")
    show(answer if as_json else {"entries": answer["entries"]}, as_json=as_json, columns=columns)


@app.command("verify")
def verify_audit(
    anchor: Annotated[
        str | None, typer.Option("--anchor", help="SEQUENCE:HASH, as an earlier verification answered.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Check that no entry was changed, removed or moved; exit status 1 if one was."""
    answer = call("GET", "/v1/audit/verify", query={"anchor": anchor}, timeout_seconds=_VERIFY_SECONDS)
    show(answer, as_json=as_json)
    if not answer["intact"]:
        raise typer.Exit(1)
