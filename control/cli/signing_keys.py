# SPDX-License-Identifier: Apache-2.0
"""`peaje signing-keys`."""

from __future__ import annotations

from typing import Annotated

import typer

from control.cli.client import call
from control.cli.options import Json
from control.cli.show import show

app = typer.Typer(no_args_is_help=True, help="The keys that sign service accounts' tokens.")


@app.command("list")
def list_signing_keys(as_json: Json = False) -> None:
    """List signing keys and which one signs."""
    show(call("GET", "/v1/signing-keys"), as_json=as_json)


@app.command("rotate")
def rotate_signing_keys(
    at_once: Annotated[
        bool, typer.Option("--at-once", help="For a stolen key: the old ones go now, and every token with them.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make the next signing key; it signs ten minutes from now, the old one stays known until its tokens are over."""
    answer = call("POST", "/v1/signing-keys/rotate", body={"at_once": at_once})
    show(answer if as_json else {"keys": answer["keys"]}, as_json=as_json)
