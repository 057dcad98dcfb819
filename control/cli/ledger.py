# SPDX-License-Identifier: Apache-2.0
"""`peaje ledger`: whether the ledger holds, and copies of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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


@app.command("dump")
def dump_ledger(
    file: Annotated[Path, typer.Argument(help="Written new, readable by you alone.", show_default=False)], as_json: Json = False
) -> None:
    """Copy the ledger's database into a file, as it is at one moment; nothing has to stop."""
    from control.backup import dump
    from control.cli.database import ledger_url

    show({"file": str(file), "byte_count": dump(ledger_url(), file)}, as_json=as_json)


@app.command("restore")
def restore_ledger(
    file: Annotated[Path, typer.Argument(help="What `peaje ledger dump` wrote.", show_default=False)],
    into: Annotated[str, typer.Option("--into-file", help="A file with the URL of an empty database; - reads it from standard input.")],
    as_json: Json = False,
) -> None:
    """Make the ledger anew in an empty database, and verify it; exit status 1 if an invariant is broken."""
    import sys

    from control.backup import restore

    # Not an argument: a URL has a password, and everybody can read arguments.
    url = sys.stdin.readline().strip() if into == "-" else Path(into).read_text("utf-8").strip()
    found = restore(file, url)
    broken = [verdict["invariant"] for verdict in found["invariants"] if verdict["violations"]]
    show({"ok": found["ok"], "broken": broken, "sums_digest": found["sums_digest"]}, as_json=as_json)
    raise typer.Exit(0 if found["ok"] else 1)
