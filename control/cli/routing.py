# SPDX-License-Identifier: Apache-2.0
"""
`peaje apply` and `peaje diff`: the models document, and what Envoy runs of it.

What they need is imported late: Envoy's messages are large, and no other command uses them.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from chassis.errors import PeajeError
from chassis.models_document import Faulty
from control.cli.options import Json

if TYPE_CHECKING:
    from control.apply import Desk

_Document = Annotated[
    Path | None, typer.Argument(help="A models document; default: this installation's envoy/models.yaml.", show_default=False)
]
_AdminUrl = Annotated[
    str | None, typer.Option("--admin", metavar="URL", help="Envoy's admin interface; default: of what `up` runs.", show_default=False)
]
DIFFERENT = 1


def register(app: typer.Typer) -> None:
    """Add both commands to the command line."""

    @app.command("apply")
    def apply_command(document: _Document = None, admin: _AdminUrl = None, as_json: Json = False) -> None:
        """Check a models document and put it into force while requests pass; all of it or nothing."""
        from control.apply import apply

        try:
            applied = apply(_desk(admin), document)
        except PeajeError as exc:
            _refuse(exc, as_json=as_json)
        if as_json:
            print(json.dumps({**asdict(applied), "changes": [asdict(change) for change in applied.changes]}, indent=2))
            return
        unread = [f"{file} was edited; only a restart reads it: ./peaje restart envoy." for file in applied.unread]
        print("\n".join([*map(str, applied.changes), *unread, _in_force(applied.models, confirmed=applied.confirmed)]))

    @app.command("diff")
    def diff_command(document: _Document = None, admin: _AdminUrl = None, as_json: Json = False) -> None:
        """Show what a models document says that Envoy does not run; exit status 1 if there is something."""
        from control.apply import diff

        try:
            found = diff(_desk(admin), document)
        except PeajeError as exc:
            _refuse(exc, as_json=as_json)
        if as_json:
            print(json.dumps({"differences": [asdict(one) for one in found]}, indent=2))
        else:
            print("\n".join(map(str, found)) or "Envoy runs what the document says.")
        raise typer.Exit(DIFFERENT if found else 0)


def _desk(admin: str | None) -> Desk:
    from control.apply import Desk
    from control.envoy_admin import Admin
    from control.laptop import state
    from control.laptop.binaries import find_envoy
    from control.laptop.places import Places, read_home

    places = Places(read_home(os.environ))
    if admin is None:
        snapshot = state.read(places)
        port = (snapshot.document.get("ports") or {}).get("admin") if snapshot.supervisor is not None else None
        admin = f"http://127.0.0.1:{port}" if port else None
    return Desk(places=places, envoy=find_envoy(os.environ), admin=Admin(admin) if admin else None)


def _in_force(models: list[str], *, confirmed: bool) -> str:
    names = ", ".join(models)
    return f"In force: {names}." if confirmed else f"Envoy is not running; it will start with: {names}."


def _refuse(exc: PeajeError, *, as_json: bool) -> NoReturn:
    faults = exc.faults if isinstance(exc, Faulty) else (str(exc),)
    if as_json:
        print(json.dumps({"faults": list(faults)}, indent=2))
    typer.echo("\n".join(faults), err=True)
    raise typer.Exit(2)
