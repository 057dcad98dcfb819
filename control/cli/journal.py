# SPDX-License-Identifier: Apache-2.0
"""`peaje journal`: whether the journal is whole, and its ledger made again from nothing."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from chassis.contract import JOURNAL_PATH
from control.cli.options import Json
from control.cli.show import show
from control.laptop.places import read_home

app = typer.Typer(no_args_is_help=True, help="The record that the ledger is made of.")

File = Annotated[
    Path | None,
    typer.Option("--file", help="The live file; older ones lie beside it. Default: this installation's.", show_default=False),
]


@app.command("verify")
def verify_journal(file: File = None, as_json: Json = False) -> None:
    """Read every line; exit status 1 if something is no record. A line that is being written is not a fault."""
    from metering.adapters.replay import examine

    found = examine(_live(file))
    document: dict[str, Any] = {
        "ok": not found.defects,
        "files": found.files if as_json else ", ".join(found.files),
        "byte_count": found.byte_count,
        "records": dict(found.records),
        "unfinished": found.unfinished,
        "defects": [{"file": name, "offset": offset, "reason": reason} for name, offset, reason in found.defects],
    }
    if not as_json:
        document["defects"] = "; ".join(f"{name} at {offset}: {reason}" for name, offset, reason in found.defects) or None
        document["unfinished"] = found.unfinished or None
    show(document, as_json=as_json)
    raise typer.Exit(1 if found.defects else 0)


@app.command("replay")
def replay_journal(
    into: Annotated[str, typer.Option("--into", help="URL of an empty database; it gets the schema.")],
    file: File = None,
    prices: Annotated[bool, typer.Option("--prices/--no-prices", help="With this installation's rate cards.")] = True,
    as_json: Json = False,
) -> None:
    """Make the ledger again from the journal's files; its sums digest equals `peaje ledger verify` of a whole journal."""
    from chassis.clock import utc_now
    from chassis.schema.migrate import migrate
    from control.cli.database import ledger_url
    from metering.adapters.replay import replay

    now = utc_now()
    migrate(into, now.date())
    done = replay(_live(file), into, prices_from=ledger_url() if prices else None, now=now)
    show(asdict(done), as_json=as_json)


def _live(file: Path | None) -> Path:
    return file if file is not None else read_home(os.environ) / JOURNAL_PATH
