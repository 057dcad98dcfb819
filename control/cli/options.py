# SPDX-License-Identifier: Apache-2.0
"""Options that several commands have, and how lists are written in one."""

from __future__ import annotations

from typing import Annotated

import typer

from chassis.errors import Invalid

Json = Annotated[bool, typer.Option("--json", help="As JSON, with the field names of the API.")]
Tenant = Annotated[str, typer.Option("--tenant", help="Id or name.")]
AnyTenant = Annotated[str | None, typer.Option("--tenant", help="Id or name; all if left out.", show_default=False)]
Project = Annotated[str, typer.Option("--project", help="Id.")]
Key = Annotated[str | None, typer.Option("--key", help="Key id; any if left out.", show_default=False)]
Model = Annotated[str | None, typer.Option("--model", help="Served model; any if left out.", show_default=False)]
Models = Annotated[
    str | None, typer.Option("--models", help="Comma-separated, * for any characters; every model if left out.")
]
DeniedModels = Annotated[
    str | None, typer.Option("--denied-models", help="Comma-separated, * for any characters; wins over --models.")
]
Scopes = Annotated[str | None, typer.Option("--scopes", help="Comma-separated; everything if left out.")]
Expires = Annotated[str | None, typer.Option("--expires", help="30d, 12h, or a date; default 365d.")]
Overlap = Annotated[str, typer.Option("--overlap", help="How long both work, up to 30d.")]


def listed(text: str) -> list[str]:
    """
    The parts of a comma-separated list.

    >>> listed("a, b,")
    ['a', 'b']
    """
    return [part.strip() for part in text.split(",") if part.strip()]


def labelled(pairs: list[str]) -> dict[str, str]:
    """
    Labels written as NAME=VALUE.

    >>> labelled(["team=search"])
    {'team': 'search'}
    """
    labels = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or name in labels:
            raise Invalid(f"Label {pair!r} is not usable.", mend="Write --label NAME=VALUE, each name once.")
        labels[name] = value
    return labels
