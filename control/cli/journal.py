# SPDX-License-Identifier: Apache-2.0
"""`peaje journal`: whether the journal is whole, its ledger made again from nothing, and journals that are gone for good."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from chassis.contract import JOURNAL_PATH
from chassis.errors import Conflict, Invalid
from control.cli.client import at, call
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


@app.command("list")
def list_journals(as_json: Json = False) -> None:
    """List the journals that months and comparisons wait for, the slowest first, and those that were retired."""
    found = call("GET", "/v1/journals")
    if as_json:
        show(found, as_json=True)
        return
    show({"journals": [{name: it[name] for name in ("journal", "read_until", "open_exchanges")} for it in found["journals"]]}, as_json=False)
    if found["retired"]:
        show({"retired": found["retired"]}, as_json=False)


@app.command("retire")
def retire_journal(
    journal: Annotated[str, typer.Argument(help="Of `peaje journal list`.")],
    reason: Annotated[str, typer.Option("--reason", help="Why it will never be read again; kept with it.")],
    file: Annotated[
        Path | None, typer.Option("--file", help="Its live file, looked at for what is not read yet.", show_default=False)
    ] = None,
    files_gone: Annotated[bool, typer.Option("--files-gone", help="Its files are gone with their disk.")] = False,
    as_json: Json = False,
) -> None:
    """Let nothing wait any more for a journal whose Envoy is gone for good; refused while it is alive or not read to its end."""
    if (file is None) != files_gone:
        raise Invalid("Say where its files are or that they are gone.", mend="Give either --file or --files-gone.")
    if file is not None:
        _refuse_unread(journal, file)
    body = {"reason": reason, "files": "gone" if files_gone else "read"}
    show(call("POST", at("/v1/journals/{}/retire", journal), body=body), as_json=as_json)


def _refuse_unread(journal: str, file: Path) -> None:
    """Raise `Conflict` if the files beside *file* have a whole line that was not read."""
    from metering.adapters.tail import Place, look, next_piece, starts_of

    found = next((it for it in call("GET", "/v1/journals")["journals"] if it["journal"] == journal), None)
    if not look(file):
        raise Invalid(f"There is no journal at {file}.", mend="If its disk is gone, say --files-gone.")
    places = {it["file_id"]: Place(it["file_id"], it["file"], it["offset"]) for it in (found or {"files": []})["files"]}
    # A line without an end will never have one: its writer is gone, and it is no record.
    if any(next_piece(live, places) is not None for live in (starts_of(file), file)):
        raise Conflict(
            f"The journal at {file} has records that are not read.",
            mend=f"Have a collector read it: PEAJE_COLLECTOR_JOURNALS={journal}={file}.",
        )


def _live(file: Path | None) -> Path:
    return file if file is not None else read_home(os.environ) / JOURNAL_PATH
