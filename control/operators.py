# SPDX-License-Identifier: Apache-2.0
"""
Operators: the people and programs that use the control API. One role each, on one tenant or on all.

The token is shown once; only its hash is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from chassis import keys as formats
from chassis.errors import Conflict, Forbidden, Invalid, NotFound
from control import audit, tenants
from control.act import ALL_TENANTS, Act, OneTenant, Scope
from control.core import rights, roles
from control.core.roles import Role
from control.durations import moment_ahead
from control.minting import Hashed, Mint
from control.store import Connection, Store

ID_PREFIX: Final = "op_"
NAME_LENGTH_MAX: Final = 100
EXPIRES_DEFAULT: Final = "365d"

_COLUMNS = "operator_id, name, role, tenant_id, created_at, expires_at, revoked_at"
_SELECT = f"select {_COLUMNS} from operator where operator_id = %s"
_INSERT = f"""
insert into operator (operator_id, name, role, tenant_id, token_hash, pepper_version, created_at, expires_at)
values (%(operator_id)s, %(name)s, %(role)s, %(tenant_id)s, %(token_hash)s, %(pepper_version)s, %(created_at)s,
        %(expires_at)s)
returning {_COLUMNS}
"""
_USABLE_ADMINS = """
select operator_id from operator
where role = 'platform-admin' and revoked_at is null and (expires_at is null or expires_at > %s)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """Who is calling the control API; `tenant_id` None means on all tenants."""

    operator_id: str
    role: Role
    tenant_id: str | None

    @property
    def scope(self) -> Scope:
        """What this operator may see."""
        return ALL_TENANTS if self.tenant_id is None else OneTenant(self.tenant_id)


def authenticate(store: Store, mint: Mint, text: str, *, now: datetime) -> Operator | None:
    """
    Who *text* is the token of; None for any that is unknown, over or no token at all.

    Garbage costs no I/O. A token hashed with an old pepper is hashed anew while it is at hand.
    """
    parsed = formats.parse_token(text)
    if parsed is None or parsed.kind != formats.OPERATOR_TOKEN:
        return None
    operator_id = ID_PREFIX + parsed.token_id
    # Every tenant's: who is calling decides the scope, and is not known yet.
    with store.transaction(ALL_TENANTS) as connection:
        row = connection.execute(
            "select operator_id, role, tenant_id, token_hash, pepper_version, expires_at, revoked_at "
            "from operator where operator_id = %s",
            (operator_id,),
        ).fetchone()
        stored = None if row is None else Hashed(hash=bytes(row["token_hash"]), pepper_version=row["pepper_version"])
        if mint.match(text, stored) is None or row is None or stored is None:
            return None
        if row["revoked_at"] is not None or (row["expires_at"] is not None and row["expires_at"] <= now):
            return None
        if mint.is_outdated(stored):
            fresh = mint.hashed(text)
            connection.execute(
                "update operator set token_hash = %s, pepper_version = %s where operator_id = %s",
                (fresh.hash, fresh.pepper_version, operator_id),
            )
    return Operator(operator_id=operator_id, role=Role(row["role"]), tenant_id=row["tenant_id"])


def create(
    store: Store, act: Act, mint: Mint, *, name: str, role: Role, tenant: str | None, expires: str | None
) -> dict[str, Any]:
    """
    Make an operator; the answer is the only one that has `token`.

    An operator of a tenant makes others of that tenant and no other; leaving the tenant out means it.
    """
    rights.name(name, what="An operator's", length_max=NAME_LENGTH_MAX)
    expires_at = moment_ahead(expires or EXPIRES_DEFAULT, what="expires", now=act.now)
    with store.transaction(act.scope) as connection:
        tenant_id = tenants.resolve_id(connection, tenant) or act.tenant_id
        if act.tenant_id is not None and not roles.can_be_held(role, tenant_id=act.tenant_id):
            raise Forbidden(f"An operator of a tenant cannot make a {role}.")
        if not roles.can_be_held(role, tenant_id=tenant_id):
            raise Invalid(
                f"A {role} is not an operator of {'one tenant' if tenant_id else 'all tenants'}.",
                mend="Leave the tenant out." if tenant_id else "Name the tenant.",
            )
        return insert(connection, act, mint, name=name, role=role, tenant_id=tenant_id, expires_at=expires_at)


def insert(
    connection: Connection, act: Act, mint: Mint, *, name: str, role: Role, tenant_id: str | None,
    expires_at: datetime | None,
) -> dict[str, Any]:
    """Store a new operator whose rights were checked, within a use case's transaction."""
    minted, hashed = mint.token(formats.OPERATOR_TOKEN)
    made = connection.execute(
        _INSERT,
        {
            "operator_id": ID_PREFIX + minted.token_id, "name": name, "role": role.value, "tenant_id": tenant_id,
            "token_hash": hashed.hash, "pepper_version": hashed.pepper_version, "created_at": act.now,
            "expires_at": expires_at,
        },
    ).fetchone()
    assert made is not None
    audit.append(connection, act, "operator.created", made["operator_id"], tenant_id=tenant_id, after=made)
    return made | {"token": minted.token}


def list_page(store: Store, act: Act, *, after: str | None, limit: int) -> list[dict[str, Any]]:
    """Operators in scope by id, those after *after*; never the token."""
    with store.transaction(act.scope) as connection:
        return connection.execute(
            f"select {_COLUMNS} from operator where operator_id > coalesce(%s, '') order by operator_id limit %s",
            (after, limit),
        ).fetchall()


def find(store: Store, act: Act, operator_id: str) -> dict[str, Any]:
    """One operator; raises `NotFound`."""
    with store.transaction(act.scope) as connection:
        found = connection.execute(_SELECT, (operator_id,)).fetchone()
    if found is None:
        raise _no_such(operator_id)
    return found


def revoke(store: Store, act: Act, operator_id: str) -> dict[str, Any]:
    """
    End an operator's token; revoking it again changes nothing.

    The last platform-admin stays: without one, only the owner of the database could help.
    """
    with store.transaction(act.scope) as connection:
        # All of them, in one order: of two who revoke each other at once, one is the last.
        rows = connection.execute(f"{_USABLE_ADMINS} order by operator_id for update", (act.now,))
        admins = [row["operator_id"] for row in rows]
        if admins == [operator_id]:
            raise Conflict(f"{operator_id} is the last platform-admin.", mend="Make another one first.")
        return revoke_in(connection, act, operator_id)


def revoke_in(connection: Connection, act: Act, operator_id: str) -> dict[str, Any]:
    """End an operator's token, the last platform-admin's too, within another use case's transaction."""
    before = _resolve(connection, operator_id)
    if before["revoked_at"] is not None:
        return before
    after = connection.execute(
        f"update operator set revoked_at = %s where operator_id = %s returning {_COLUMNS}", (act.now, operator_id)
    ).fetchone()
    assert after is not None
    audit.append(
        connection, act, "operator.revoked", operator_id, tenant_id=after["tenant_id"], before=before, after=after
    )
    return after


def has_platform_admin(connection: Connection, now: datetime) -> bool:
    """Whether anybody can administrate the platform; the scope must be all tenants."""
    return connection.execute(_USABLE_ADMINS, (now,)).fetchone() is not None


def _resolve(connection: Connection, operator_id: str) -> dict[str, Any]:
    found = connection.execute(f"{_SELECT} for update", (operator_id,)).fetchone()
    if found is None:
        raise _no_such(operator_id)
    return found


def _no_such(operator_id: str) -> NotFound:
    return NotFound(f"There is no operator {operator_id!r}.", mend="See `peaje operators list`.")
