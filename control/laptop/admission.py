# SPDX-License-Identifier: Apache-2.0
"""
The last step of `up`: a tenant to try it with, and a real request through everything.

Speaks to the control API as anybody would. Keys are shown once by it, so they are kept in
`secrets/`, and made anew when the database no longer knows them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import httpx

from chassis.secrets import ADMIN_TOKEN_NAME, BOOTSTRAP_TOKEN_NAME, write_private
from control.laptop.errors import Trouble
from control.laptop.places import Places

DEMO_TENANT = "demo"
#: Its own tenant, so that nobody is billed for being watched over.
PROBE_TENANT = "peaje-probe"
_KEY_FILES = {DEMO_TENANT: "demo-key", PROBE_TENANT: "probe-key"}

#: A model server's first answer may take its time.
DEADLINE_SECONDS = 60.0
#: What is refused for a reason of its own is not asked for much longer.
_REFUSED_SECONDS = 5.0
_ATTEMPT_SECONDS = 20.0
#: The control plane writes its one-time token as it starts, or once Postgres answers.
_OPERATOR_SECONDS = 15.0
_EVERY_SECONDS = 0.2
_BODY_CHARACTERS_MAX = 300
#: May turn into 200 by themselves: the model is not discovered yet, or a limit was reached.
_PASSING = {HTTPStatus.NOT_FOUND, HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS}


@dataclass(frozen=True, slots=True, kw_only=True)
class Addresses:
    """Where the tenants' endpoint and the control API are, without a slash at the end."""

    endpoint: str
    control: str


async def admit(
    places: Places, addresses: Addresses, model: str, *, say: Callable[[str], None]
) -> str:
    """Ensure the first operator and two tenants' keys, send a request until it passes, and return the demo key."""
    async with httpx.AsyncClient(trust_env=False, timeout=_ATTEMPT_SECONDS) as client:
        await ensure_operator(client, places, addresses)
        demo_key = await ensure_key(client, places, addresses, DEMO_TENANT)
        probe_key = await ensure_key(client, places, addresses, PROBE_TENANT)
        await _until_passing(client, addresses, model, probe_key, say=say)
    return demo_key


async def ensure_operator(client: httpx.AsyncClient, places: Places, addresses: Addresses) -> None:
    """
    See to it that `secrets/` has the token of an operator whom this database knows.

    On a new one that is the first operator: made as anybody would, with the one-time token that the
    control plane has written beside it.
    """
    path, once = places.secrets / ADMIN_TOKEN_NAME, places.secrets / BOOTSTRAP_TOKEN_NAME
    deadline = time.monotonic() + _OPERATOR_SECONDS
    while True:
        if path.exists() and await _is_known(client, places, addresses):
            return
        if once.exists():
            answer = await client.post(f"{addresses.control}/v1/bootstrap", json={"token": once.read_text().strip()})
            if answer.status_code == HTTPStatus.CREATED:
                write_private(path, str(answer.json()["token"]) + "\n")
                return
        if time.monotonic() > deadline:
            raise Trouble(
                f"{path} is not the token of an operator whom this database knows.",
                mend="Put one there, or let the database's owner end all platform-admins (docs/operations.md, Bootstrap).",
            )
        await asyncio.sleep(_EVERY_SECONDS)


async def ensure_key(
    client: httpx.AsyncClient, places: Places, addresses: Addresses, tenant: str
) -> str:
    """The tenant's key from `secrets/` if the gateway knows it, else a new one."""
    path = places.secrets / _KEY_FILES[tenant]
    if path.exists():
        key = path.read_text().strip()
        try:
            answer = await client.get(
                f"{addresses.endpoint}/v1/models", headers={"authorization": f"Bearer {key}"}
            )
        except httpx.HTTPError:
            return key  # not the key's fault; the real request will tell
        if answer.status_code != HTTPStatus.UNAUTHORIZED:
            return key
    tenant_id = await _ensure_tenant(client, places, addresses, tenant)
    answer = await _ask(
        client, places, f"{addresses.control}/v1/tenants/{tenant_id}/keys", {"name": tenant}
    )
    if answer.status_code != HTTPStatus.CREATED:
        raise _unexpected("making a key", answer)
    key = str(answer.json()["key"])
    write_private(path, key + "\n")
    return key


async def _ensure_tenant(
    client: httpx.AsyncClient, places: Places, addresses: Addresses, tenant: str
) -> str:
    answer = await _ask(client, places, f"{addresses.control}/v1/tenants", {"name": tenant})
    if answer.status_code == HTTPStatus.CREATED:
        return str(answer.json()["tenant_id"])
    if answer.status_code == HTTPStatus.CONFLICT:
        return tenant  # the id is made from the name, which is a slug already
    raise _unexpected("making a tenant", answer)


async def _is_known(client: httpx.AsyncClient, places: Places, addresses: Addresses) -> bool:
    try:
        answer = await client.get(
            f"{addresses.control}/v1/tenants?limit=1",
            headers={"authorization": f"Bearer {places.secret(ADMIN_TOKEN_NAME)}"},
        )
    except httpx.HTTPError as exc:
        raise Trouble(f"The control API does not answer: {exc or type(exc).__name__}.") from exc
    return answer.status_code == HTTPStatus.OK


async def _ask(
    client: httpx.AsyncClient, places: Places, url: str, body: dict[str, Any]
) -> httpx.Response:
    token = places.secret(ADMIN_TOKEN_NAME)
    try:
        return await client.post(url, json=body, headers={"authorization": f"Bearer {token}"})
    except httpx.HTTPError as exc:
        raise Trouble(f"The control API does not answer: POST {url}: {exc or type(exc).__name__}.") from exc


async def _until_passing(
    client: httpx.AsyncClient,
    addresses: Addresses,
    model: str,
    key: str,
    *,
    say: Callable[[str], None],
) -> None:
    began = time.monotonic()
    url = f"{addresses.endpoint}/v1/chat/completions"
    told = ""
    while True:
        refused = False
        try:
            answer = await client.post(
                url,
                json={
                    "model": model,
                    "max_tokens": 1,
                    "messages": [{"role": "user", "content": "ping"}],
                },
                headers={"authorization": f"Bearer {key}"},
            )
            if answer.status_code == HTTPStatus.OK:
                return
            outcome = f"{answer.status_code} {_shorten(answer.text)}"
            refused = answer.is_client_error and answer.status_code not in _PASSING
        except httpx.HTTPError as exc:
            outcome = f"{type(exc).__name__} {exc}".strip()
        waited = time.monotonic() - began
        if waited > (_REFUSED_SECONDS if refused else DEADLINE_SECONDS):
            raise Trouble(
                f"No request passes after {waited:.0f} s: POST {url} (model {model}) gives {outcome}"
            )
        if outcome != told and waited > 1:
            say(f"waiting for a request to pass: {outcome}")
            told = outcome
        await asyncio.sleep(_EVERY_SECONDS)


def _unexpected(doing: str, answer: httpx.Response) -> Trouble:
    return Trouble(
        f"The control API answers {answer.status_code} to {doing}: {_shorten(answer.text)}"
    )


def _shorten(text: str) -> str:
    return " ".join(text.split())[:_BODY_CHARACTERS_MAX]
