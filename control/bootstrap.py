# SPDX-License-Identifier: Apache-2.0
"""
The first operator: a token in a file that only the owner of the installation can read, good once, for minutes.

There is no default password. The road is open only while nobody can administrate the platform.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final

from chassis import keys as formats
from chassis.errors import Unavailable
from chassis.secrets import write_private
from control import audit, operators
from control.act import ALL_TENANTS, Act
from control.core import rights
from control.core.roles import Role
from control.minting import Mint
from control.store import Store

LIFETIME: Final = timedelta(minutes=15)
FIRST_NAME: Final = "first operator"

_GOOD: Final = "token_hash = any(%(hashes)s) and used_at is null and expires_at > %(now)s"


def open_road(store: Store, mint: Mint, path: Path, *, now: datetime) -> bool:
    """
    Write a one-time token to *path* if there is no platform-admin, else remove what is there.

    True if a token was written. A token from an earlier start stops working: only its file's
    reader is to be trusted, and the file is this one.
    """
    act = Act(actor="control", scope=ALL_TENANTS, request_id="start", now=now)
    with store.transaction(ALL_TENANTS) as connection:
        connection.execute("lock table bootstrap in share row exclusive mode")
        if operators.has_platform_admin(connection, now):
            path.unlink(missing_ok=True)
            return False
        minted, hashed = mint.token(formats.BOOTSTRAP_TOKEN)
        connection.execute("update bootstrap set used_at = %s where used_at is null", (now,))
        connection.execute(
            "insert into bootstrap (token_hash, expires_at) values (%s, %s)", (hashed.hash, now + LIFETIME)
        )
        audit.append(connection, act, "bootstrap.opened", "bootstrap", tenant_id=None, after={"until": now + LIFETIME})
    try:
        write_private(path, minted.token + "\n")
    except OSError as exc:
        raise Unavailable(f"The bootstrap token cannot be written to {path}: {exc.strerror}.") from exc
    return True


def exchange(store: Store, act: Act, mint: Mint, token: str, *, name: str) -> dict[str, Any] | None:
    """
    Make the first platform-admin for the holder of the one-time token; the answer has its `token`.

    None for a token that is wrong, used or too old, and once there is a platform-admin: all the same.
    """
    rights.name(name, what="An operator's", length_max=operators.NAME_LENGTH_MAX)
    parsed = formats.parse_token(token)
    if parsed is None or parsed.kind != formats.BOOTSTRAP_TOKEN:
        return None
    wanted = {"now": act.now, "hashes": [formats.hash_key(pepper, token) for pepper in mint.peppers.values()]}
    with store.transaction(act.scope) as connection:
        # Anybody may call this: only who has the token makes others wait.
        if connection.execute(f"select from bootstrap where {_GOOD}", wanted).fetchone() is None:
            return None
        connection.execute("lock table bootstrap in share row exclusive mode")
        used = connection.execute(f"update bootstrap set used_at = %(now)s where {_GOOD}", wanted).rowcount
        if used == 0 or operators.has_platform_admin(connection, act.now):
            return None
        return operators.insert(
            connection, act, mint, name=name, role=Role.PLATFORM_ADMIN, tenant_id=None, expires_at=None
        )
