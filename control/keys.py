# SPDX-License-Identifier: Apache-2.0
"""API keys: make, list, disable, rotate, revoke. A key is shown once, when it is made; only its hash is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

from chassis.errors import Conflict, Invalid, NotFound
from chassis.models import ModelCatalogue
from control import audit, key_limits, projects, service_accounts, tenants
from control.act import Act
from control.core import rights
from control.durations import moment_ahead
from control.minting import Mint
from control.outbox import tell
from control.store import Connection, Store
from metering.core import outgoing

State = Literal["active", "disabled"]

EXPIRES_DEFAULT = "365d"
OVERLAP_MAX = timedelta(days=30)
NAME_LENGTH_MAX = 100

#: What a successor has in common with the key that it replaces.
_RIGHTS = (
    "tenant_id", "project_id", "name", "environment", "service_account_id", "scopes", "models", "denied_models",
    "allowed_cidrs",
)
_COLUMNS = (
    "key_id, tenant_id, project_id, service_account_id, name, environment, state, last_four, scopes, models, "
    "denied_models, allowed_cidrs, created_at, expires_at, revoked_at, rotated_to, last_used_at, uses_after_rotation"
)
_SELECT = f"select {_COLUMNS} from api_key where key_id = %s"
_INSERT = f"""
insert into api_key (key_id, tenant_id, project_id, service_account_id, name, environment, key_hash, pepper_version,
                     last_four, scopes, models, denied_models, allowed_cidrs, created_at, expires_at)
values (%(key_id)s, %(tenant_id)s, %(project_id)s, %(service_account_id)s, %(name)s, %(environment)s, %(key_hash)s,
        %(pepper_version)s, %(last_four)s, %(scopes)s, %(models)s, %(denied_models)s, %(allowed_cidrs)s::cidr[],
        %(created_at)s, %(expires_at)s)
returning {_COLUMNS}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewKey(rights.Rights):
    """What is asked of a new key, as people write it; None means every, or no end."""

    name: str = "key"
    environment: str = "live"
    project: str = tenants.DEFAULT_PROJECT
    service_account_id: str | None = None
    allowed_cidrs: Sequence[str] | None = None
    expires: str | None = None


def create(
    store: Store, act: Act, mint: Mint, tenant: str, asked: NewKey, *, catalogue: ModelCatalogue
) -> dict[str, Any]:
    """Make a key; the answer is the only one that has `key`."""
    row = {
        "name": rights.name(asked.name, what="A key's", length_max=NAME_LENGTH_MAX),
        "environment": asked.environment,
        **asked.checked(served=catalogue.served),
        "allowed_cidrs": rights.allowed_cidrs(asked.allowed_cidrs),
        "created_at": act.now,
        "expires_at": moment_ahead(asked.expires or EXPIRES_DEFAULT, what="expires", now=act.now),
    }
    with store.transaction(act.scope) as connection:
        tenant_id = tenants.resolve(connection, tenant)["tenant_id"]
        project_id = projects.resolve(connection, tenant_id, asked.project)["project_id"]
        if asked.service_account_id is not None:
            account = service_accounts.resolve(connection, asked.service_account_id)
            if (account["tenant_id"], account["project_id"]) != (tenant_id, project_id):
                raise service_accounts.no_such(asked.service_account_id)
        place = {"tenant_id": tenant_id, "project_id": project_id, "service_account_id": asked.service_account_id}
        made, key = _insert(connection, mint, row | place)
        audit.append(connection, act, "key.created", made["key_id"], tenant_id=tenant_id, after=made)
        tell(connection, act, outgoing.KEY_CREATED, tenant_id=tenant_id, data=_told(made))
    return made | {"key": key}


def list_page(store: Store, act: Act, tenant: str | None, *, after: str | None, limit: int) -> list[dict[str, Any]]:
    """Keys of a tenant, or of all in scope if the caller says None, those after *after*; never the secret."""
    with store.transaction(act.scope) as connection:
        return connection.execute(
            f"select {_COLUMNS} from api_key k where (%(it)s::text is null or tenant_id = %(it)s) "
            "and (%(after)s::text is null or (tenant_id, created_at, key_id) > "
            "(select tenant_id, created_at, key_id from api_key where key_id = %(after)s)) "
            "order by tenant_id, created_at, key_id limit %(limit)s",
            {"it": tenants.resolve_id(connection, tenant) or act.tenant_id, "after": after, "limit": limit},
        ).fetchall()


def find(store: Store, act: Act, key_id: str) -> dict[str, Any]:
    """One key; raises `NotFound`."""
    with store.transaction(act.scope) as connection:
        found = connection.execute(_SELECT, (key_id,)).fetchone()
    if found is None:
        raise no_such(key_id)
    return found


def resolve(connection: Connection, key_id: str) -> dict[str, Any]:
    """One key, locked until the transaction ends; raises `NotFound`."""
    found = connection.execute(f"{_SELECT} for update", (key_id,)).fetchone()
    if found is None:
        raise no_such(key_id)
    return found


def no_such(key_id: str) -> NotFound:
    """The same for a key that does not exist and for one of somebody else."""
    return NotFound(f"There is no key {key_id!r}.", mend="See `peaje keys list`.")


def set_state(store: Store, act: Act, key_id: str, state: State) -> dict[str, Any]:
    """Refuse a key until it is enabled again, or enable it; everywhere within a second."""
    with store.transaction(act.scope) as connection:
        before = resolve(connection, key_id)
        if before["revoked_at"] is not None:
            raise Conflict(f"Key {key_id!r} is revoked.", mend="Make a new one: `peaje keys create`.")
        after = connection.execute(
            f"update api_key set state = %s where key_id = %s returning {_COLUMNS}", (state, key_id)
        ).fetchone()
        assert after is not None
        action = "key.disabled" if state == "disabled" else "key.enabled"
        audit.append(connection, act, action, key_id, tenant_id=after["tenant_id"], before=before, after=after)
    return after


def revoke(store: Store, act: Act, key_id: str) -> dict[str, Any]:
    """End a key for good, everywhere within a second; revoking it again changes nothing."""
    with store.transaction(act.scope) as connection:
        return revoke_in(connection, act, key_id)


def revoke_in(connection: Connection, act: Act, key_id: str) -> dict[str, Any]:
    """`revoke` within another use case's transaction."""
    before = resolve(connection, key_id)
    if before["revoked_at"] is not None:
        return before
    after = connection.execute(
        f"update api_key set revoked_at = %s where key_id = %s returning {_COLUMNS}", (act.now, key_id)
    ).fetchone()
    assert after is not None
    audit.append(connection, act, "key.revoked", key_id, tenant_id=after["tenant_id"], before=before, after=after)
    tell(connection, act, outgoing.KEY_REVOKED, tenant_id=after["tenant_id"], data=_told(after))
    return after


def rotate(store: Store, act: Act, mint: Mint, key_id: str, *, overlap: timedelta) -> dict[str, Any]:
    """
    Make a successor with the same rights; the old key works until *overlap* is over, not longer.

    In one transaction: a successor without an ending predecessor would be a second key.
    """
    if not timedelta(0) <= overlap <= OVERLAP_MAX:
        raise Invalid("overlap must be between 0 and 30 days.")
    with store.transaction(act.scope) as connection:
        old = resolve(connection, key_id)
        _refuse_rotation(old, act)
        lifetime = old["expires_at"] - old["created_at"] if old["expires_at"] is not None else None
        expires_at = act.now + lifetime if lifetime is not None else None
        made, key = _insert(
            connection, mint, {name: old[name] for name in _RIGHTS} | {"created_at": act.now, "expires_at": expires_at}
        )
        ended = connection.execute(
            "update api_key set rotated_to = %(new)s, expires_at = least(coalesce(expires_at, %(end)s), %(end)s) "
            f"where key_id = %(id)s returning {_COLUMNS}",
            {"new": made["key_id"], "end": act.now + overlap, "id": key_id},
        ).fetchone()
        assert ended is not None
        key_limits.copy(connection, old_key_id=key_id, new_key_id=made["key_id"], now=act.now)
        tenant_id = old["tenant_id"]
        audit.append(connection, act, "key.rotated", key_id, tenant_id=tenant_id, before=old, after=ended)
        audit.append(connection, act, "key.created", made["key_id"], tenant_id=tenant_id, after=made)
        tell(connection, act, outgoing.KEY_ROTATED, tenant_id=tenant_id, data=_told(ended))
    return made | {"key": key, "rotated_from": key_id, "old_expires_at": ended["expires_at"]}


def refuse_unknown_models(models: Sequence[str], catalogue: ModelCatalogue) -> None:
    """Raise `Invalid` for a model that is not served: a limit on it could never act."""
    for model in models:
        if model not in catalogue.served:
            raise Invalid(f"Model {model!r} is not served.", mend=f"Served: {', '.join(catalogue.names)}.")


def _told(key: dict[str, Any]) -> dict[str, Any]:
    """What a webhook is told of a key: whose and which, nothing that helps to use it."""
    return {
        "key_id": key["key_id"], "project": key["project_id"], "name": key["name"], "expires_at": key["expires_at"],
        "rotated_to": key["rotated_to"],
    }


def _refuse_rotation(old: dict[str, Any], act: Act) -> None:
    key_id = old["key_id"]
    if old["revoked_at"] is not None or (old["expires_at"] is not None and old["expires_at"] <= act.now):
        raise Conflict(f"Key {key_id!r} is over.", mend="Make a new one: `peaje keys create`.")
    if old["rotated_to"] is not None:
        raise Conflict(f"Key {key_id!r} has a successor.", mend=f"Rotate that one: {old['rotated_to']}.")
    if old["state"] == "disabled":
        # Its successor would work at once: that is for `enable` to say.
        raise Conflict(f"Key {key_id!r} is disabled.", mend=f"Enable it first: `peaje keys enable {key_id}`.")


def _insert(connection: Connection, mint: Mint, row: dict[str, Any]) -> tuple[dict[str, Any], str]:
    minted, hashed = mint.key(row["environment"])
    secret = {
        "key_id": minted.key_id, "last_four": minted.last_four, "key_hash": hashed.hash,
        "pepper_version": hashed.pepper_version,
    }
    made = connection.execute(_INSERT, row | secret).fetchone()
    assert made is not None
    return made, minted.key
