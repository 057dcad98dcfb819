# SPDX-License-Identifier: Apache-2.0
"""
The identity document of an installation: the one that PEAJE_IDENTITY names, else our own.

Ours has one entry: the control API, which signs tokens for service accounts.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import yaml

from chassis.contract import IDENTITY_PATH, TOKEN_AUDIENCE
from chassis.errors import Invalid
from control.finding import Finding
from control.laptop.errors import Trouble
from control.laptop.places import Places, Ports, read_home, write_private
from extauth.adapters.identity_document import load
from extauth.core.issuers import ACCESS_TOKEN_TYPE, EVERY_TENANT, IdentityFaults

_HEADER: Final = "# Written by each `up`; name a document of your own in PEAJE_IDENTITY.\n"
#: The control API's setting for what its tokens name as their issuer.
_ISSUER_VARIABLE: Final = "PEAJE_CONTROL_ISSUER"
_VARIABLE: Final = "PEAJE_IDENTITY"


def publish(places: Places, ports: Ports, environ: Mapping[str, str]) -> None:
    """Put the document into the state directory; raises `Trouble` for one of the user's that is not fit."""
    named = environ.get(_VARIABLE)
    if not named:
        write_private(places.home / IDENTITY_PATH, _HEADER + yaml.safe_dump(default(ports, environ), sort_keys=False))
        return
    path = Path(named)
    try:
        load(path, home=places.home)
        text = path.read_text("utf-8")
    except Invalid as exc:
        raise Trouble(f"PEAJE_IDENTITY: {exc}") from exc
    except OSError as exc:
        raise Trouble(f"PEAJE_IDENTITY: {path}: {exc.strerror}.") from exc
    write_private(places.home / IDENTITY_PATH, text)


def default(ports: Ports, environ: Mapping[str, str]) -> dict[str, Any]:
    """The document that trusts the control API's own tokens, for every tenant: it knows them all."""
    url = f"http://127.0.0.1:{ports.control}"
    return {
        "issuers": [
            {
                "kind": "jwt",
                "issuer": (environ.get(_ISSUER_VARIABLE) or url).rstrip("/"),
                # Fetched on this machine, whatever name it has for others.
                "jwks_url": f"{url}/.well-known/jwks.json",
                "audiences": [TOKEN_AUDIENCE],
                "algorithms": ["ES256"],
                "types": [ACCESS_TOKEN_TYPE],
                "claims": {"tenant": "tenant", "project": "project", "scopes": "scope"},
                "tenants": EVERY_TENANT,
                "without_scope": "every",
                "subjects": "service_accounts",
            }
        ]
    }


def find_faults(environ: Mapping[str, str]) -> list[Finding]:
    """What is wrong with the document that the next `up` would use, or that is in force now; nothing if there is none."""
    home = read_home(environ)
    named = environ.get(_VARIABLE)
    path = Path(os.path.abspath(named)) if named else home / IDENTITY_PATH
    if not named and not path.exists():
        return []
    mend = "Until it is mended the last good one stays in force."
    try:
        load(path, home=home)
    except IdentityFaults as exc:
        return [Finding(file=str(path), what=f"{fault}.", mend=mend) for fault in exc.faults]
    except Invalid as exc:
        return [Finding(file=str(path), what=exc.message.removeprefix(f"{path}: "), mend=mend)]
    return []
