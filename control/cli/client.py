# SPDX-License-Identifier: Apache-2.0
"""Call the control API of this installation, as the operator whose token is at hand."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

from chassis.errors import Invalid, Unavailable
from chassis.secrets import ADMIN_TOKEN_NAME, read_secret
from control.laptop.places import DEFAULT_CONTROL_PORT, read_home

_TIMEOUT_SECONDS = 15.0
#: Names a file with an operator's token; without it, the first operator's, in `secrets/`.
TOKEN_FILE_VARIABLE = "PEAJE_OPERATOR_TOKEN_FILE"


def at(template: str, *segments: str) -> str:
    """
    A path whose `{}` are filled with *segments*, each of which stays one segment.

    >>> at("/v1/tenants/{}/keys", "a/b")
    '/v1/tenants/a%2Fb/keys'
    """
    return template.format(*(quote(segment, safe="") for segment in segments))


def call_pages(path: str, name: str) -> dict[str, Any]:
    """Every row of a list that comes in pages, under *name*."""
    rows: list[dict[str, Any]] = []
    after: str | None = None
    while True:
        page = call("GET", path, query={"after": after})
        rows += page[name]
        after = page["next"]
        if after is None:
            return {name: rows}


def call(
    method: str, path: str, *, body: dict[str, Any] | None = None, query: dict[str, str | None] | None = None,
    is_public: bool = False, timeout_seconds: float = _TIMEOUT_SECONDS,
) -> Any:
    """The answer's JSON; raises `Invalid` with the API's own sentence, or `Unavailable`."""
    import httpx

    home = read_home(os.environ)
    token = None if is_public else operator_token(home)
    try:
        answer = httpx.request(
            method, base_url(home) + quote(path, safe="/%"), json=body,
            params={name: value for name, value in (query or {}).items() if value is not None},
            headers={"authorization": f"Bearer {token}"} if token else {}, timeout=timeout_seconds,
        )
    except httpx.HTTPError as exc:
        raise Unavailable("Peaje is not running here.", mend="Start it with ./peaje up.") from exc
    try:
        document = answer.json()
        message = document["error"]["message"] if answer.is_error else None
    except (ValueError, KeyError, TypeError) as exc:
        raise Unavailable(f"What answers at {base_url(home)} is not Peaje's control API.", mend="Check PEAJE_CONTROL_URL.") from exc
    if message is not None:
        raise Invalid(message)
    return document


def operator_token(home: Path) -> str:
    """The token of the operator who is calling; raises `Unavailable` if there is none here."""
    if named := os.environ.get(TOKEN_FILE_VARIABLE):
        return read_secret(Path(named))
    path = home / "secrets" / ADMIN_TOKEN_NAME
    if not path.exists():
        raise Unavailable(
            "There is no operator's token here.",
            mend=f"Start Peaje with ./peaje up, or name a file with a token in {TOKEN_FILE_VARIABLE}.",
        )
    return read_secret(path)


def base_url(home: Path) -> str:
    """Where the API is: PEAJE_CONTROL_URL, the running installation's port, PEAJE_CONTROL_PORT, the default."""
    if url := os.environ.get("PEAJE_CONTROL_URL"):
        return url.rstrip("/")
    port = running_state(home).get("control_port") or os.environ.get("PEAJE_CONTROL_PORT") or DEFAULT_CONTROL_PORT
    return f"http://127.0.0.1:{port}"


def running_state(home: Path) -> dict[str, Any]:
    """What the supervisor wrote down; empty if there is none."""
    try:
        document = json.loads((home / "run/state.json").read_text())
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}
