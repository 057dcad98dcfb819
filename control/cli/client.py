# SPDX-License-Identifier: Apache-2.0
"""Call the control API of this installation, as its administrator."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

from chassis.errors import Invalid, Unavailable
from chassis.secrets import read_secret
from control.laptop.places import DEFAULT_CONTROL_PORT, read_home

_TIMEOUT_SECONDS = 15.0


def call(
    method: str, path: str, *, body: dict[str, Any] | None = None, query: dict[str, str | None] | None = None
) -> Any:
    """The answer's JSON; raises `Invalid` with the API's own sentence, or `Unavailable`."""
    import httpx  # noqa: PLC0415 - half of a command's start-up time

    home = read_home(os.environ)
    token_path = home / "secrets/admin-token"
    if not token_path.exists():
        raise Unavailable("Peaje has not been started here.", mend="Start it with ./peaje up.")
    try:
        answer = httpx.request(
            method, base_url(home) + quote(path), json=body,
            params={name: value for name, value in (query or {}).items() if value is not None},
            headers={"authorization": f"Bearer {read_secret(token_path)}"}, timeout=_TIMEOUT_SECONDS,
        )
    except httpx.HTTPError as exc:
        raise Unavailable("Peaje is not running here.", mend="Start it with ./peaje up.") from exc
    document = answer.json()
    if answer.status_code >= 400:
        raise Invalid(document["error"]["message"])
    return document


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
