# SPDX-License-Identifier: Apache-2.0
"""`peaje reconcile`: what two sources of usage say differently."""

from __future__ import annotations

from typing import Annotated

import typer

from control.cli.client import at, call
from control.cli.options import Json
from control.cli.show import show
from control.reconciliation import State

app = typer.Typer(no_args_is_help=True, help="What two sources of usage say differently.")

Id = Annotated[int, typer.Argument(help="Of `peaje reconcile list`.")]
Note = Annotated[str, typer.Option("--note", help="Why; kept with it.")]
_SHOWN = (
    "exception_id", "kind", "request_id", "tenant", "state", "input_tokens", "output_tokens", "quantity",
    "ledger_tenant", "ledger_input_tokens", "ledger_output_tokens", "ledger_quantity", "note",
)


@app.command("list")
def list_exceptions(
    state: Annotated[State | None, typer.Option("--state", help="Only those.")] = None, as_json: Json = False
) -> None:
    """List exceptions, the oldest first, with what the second witness has said in all."""
    found = call("GET", "/v1/reconciliation", query={"state": state and state.value})
    if as_json:
        show(found, as_json=True)
        return
    show({"exceptions": [{name: row[name] for name in _SHOWN} for row in found["exceptions"]]}, as_json=False)
    show(found["counts"] | {"witness_agreed": found["witness"]["agreed"]}, as_json=False)


@app.command("explain")
def explain_exception(exception_id: Id, note: Note, as_json: Json = False) -> None:
    """Say what the cause was: the exception is no obstacle to closing its month any more."""
    show(call("POST", at("/v1/reconciliation/{}/explain", str(exception_id)), body={"note": note}), as_json=as_json)


@app.command("sign")
def sign_exception(exception_id: Id, note: Note, as_json: Json = False) -> None:
    """Answer for an exception whose cause is not known: its month may be closed all the same."""
    show(call("POST", at("/v1/reconciliation/{}/sign", str(exception_id)), body={"note": note}), as_json=as_json)
