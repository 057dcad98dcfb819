# SPDX-License-Identifier: Apache-2.0
"""`peaje ledger`: whether the ledger holds."""

from __future__ import annotations

import typer

from control.cli.options import Json
from control.cli.show import show

app = typer.Typer(no_args_is_help=True, help="The record of usage.")


@app.command("verify")
def verify_ledger(as_json: Json = False) -> None:
    """Look for what breaks an invariant; exit status 1 if anything does. Reads Postgres itself, for as long as it takes."""
    from control.cli.database import connect, ledger_url
    from control.ledger import verification

    with connect(ledger_url()) as connection:
        found = verification(connection)
    if as_json:
        show(found, as_json=True)
    else:
        for verdict in found["invariants"]:
            broken = f": {verdict['violations']}, such as {', '.join(verdict['examples'])}" if verdict["violations"] else ""
            print(f"{'BROKEN' if broken else 'holds '}  {verdict['invariant']}{broken}")
        show(found["notes"] | {"sums_digest": found["sums_digest"]}, as_json=False)
    raise typer.Exit(0 if found["ok"] else 1)
