# SPDX-License-Identifier: Apache-2.0
"""API keys: make, list, rotate, revoke. A key is shown once, when it is made; only its hash is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from chassis import keys
from chassis.errors import Conflict, Invalid, NotFound
from chassis.models import ModelCatalogue
from control import key_limits, tenants
from control.durations import moment_ahead
from control.store import Store

EXPIRES_DEFAULT = "365d"
OVERLAP_MAX = timedelta(days=30)
NAME_LENGTH_MAX = 100
MODELS_MAX = 200

_COLUMNS = (
    "key_id, tenant_id, project_id, name, environment, last_four, models, created_at, expires_at, revoked_at"
)
_INSERT = f"""
insert into api_key (key_id, tenant_id, project_id, name, environment, key_hash, pepper_version, last_four,
                     models, created_at, expires_at)
values (%(key_id)s, %(tenant_id)s, %(project_id)s, %(name)s, %(environment)s, %(key_hash)s, %(pepper_version)s,
        %(last_four)s, %(models)s, %(created_at)s, %(expires_at)s)
returning {_COLUMNS}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyMaker:
    """What making a key needs besides the store."""

    peppers: Mapping[int, bytes]
    random_bytes: Callable[[int], bytes]
    catalogue: Callable[[], ModelCatalogue]

    def mint(self, environment: str) -> tuple[keys.MintedKey, bytes, int]:
        """A new key, its hash, and the version of the pepper in it: the newest."""
        minted = keys.mint(environment, self.random_bytes)
        version = max(self.peppers)
        return minted, keys.hash_key(self.peppers[version], minted.key), version


def create(
    store: Store,
    maker: KeyMaker,
    tenant: str,
    *,
    name: str,
    models: Sequence[str] | None,
    expires: str | None,
    environment: str,
    now: datetime,
) -> dict[str, Any]:
    """Make a key in the tenant's default project; the answer is the only one that has `key`."""
    if not 1 <= len(name) <= NAME_LENGTH_MAX or not name.isprintable():
        raise Invalid(f"A key's name has 1 to {NAME_LENGTH_MAX} printable characters.")
    refuse_unknown_models(models, maker.catalogue())
    expires_at = moment_ahead(expires or EXPIRES_DEFAULT, what="expires", now=now)
    minted, key_hash, version = maker.mint(environment)
    row = {
        "key_id": minted.key_id, "tenant_id": tenants.find(store, tenant)["tenant_id"],
        "project_id": tenants.DEFAULT_PROJECT, "name": name, "environment": environment, "key_hash": key_hash,
        "pepper_version": version, "last_four": minted.last_four,
        "models": sorted(set(models)) if models is not None else None, "created_at": now, "expires_at": expires_at,
    }
    with store.transaction() as connection:
        made = connection.execute(_INSERT, row).fetchone()
    assert made is not None
    return made | {"key": minted.key}


def list_all(store: Store, tenant: str | None) -> list[dict[str, Any]]:
    """Keys of a tenant, or of all if the caller says None; never the secret."""
    tenant_id = tenants.find(store, tenant)["tenant_id"] if tenant is not None else None
    with store.transaction() as connection:
        return connection.execute(
            f"select {_COLUMNS} from api_key where %(it)s::text is null or tenant_id = %(it)s "
            "order by tenant_id, created_at, key_id",
            {"it": tenant_id},
        ).fetchall()


def find(store: Store, key_id: str) -> dict[str, Any]:
    """One key; raises `NotFound`."""
    with store.transaction() as connection:
        found = connection.execute(f"select {_COLUMNS} from api_key where key_id = %s", (key_id,)).fetchone()
    if found is None:
        raise NotFound(f"There is no key {key_id!r}.", mend="See `peaje keys list`.")
    return found


def revoke(store: Store, key_id: str, *, now: datetime) -> dict[str, Any]:
    """End a key for good, everywhere within a second; revoking it again changes nothing."""
    find(store, key_id)
    with store.transaction() as connection:
        revoked = connection.execute(
            f"update api_key set revoked_at = coalesce(revoked_at, %s) where key_id = %s returning {_COLUMNS}",
            (now, key_id),
        ).fetchone()
    assert revoked is not None
    return revoked


def rotate(
    store: Store, maker: KeyMaker, key_id: str, *, overlap: timedelta, now: datetime
) -> dict[str, Any]:
    """
    Make a successor with the same rights; the old key works until *overlap* is over, not longer.

    In one transaction: a successor without an ending predecessor would be a second key.
    """
    if not timedelta(0) <= overlap <= OVERLAP_MAX:
        raise Invalid("overlap must be between 0 and 30 days.")
    old = find(store, key_id)
    if old["revoked_at"] is not None or (old["expires_at"] is not None and old["expires_at"] <= now):
        raise Conflict(f"Key {key_id!r} is over.", mend="Make a new one: `peaje keys create`.")
    minted, key_hash, version = maker.mint(old["environment"])
    lifetime = old["expires_at"] - old["created_at"] if old["expires_at"] is not None else None
    row = {
        **{name: old[name] for name in ("tenant_id", "project_id", "name", "environment", "models")},
        "key_id": minted.key_id, "key_hash": key_hash, "pepper_version": version,
        "last_four": minted.last_four, "created_at": now,
        "expires_at": now + lifetime if lifetime is not None else None,
    }
    with store.transaction() as connection:
        made = connection.execute(_INSERT, row).fetchone()
        connection.execute(
            "update api_key set expires_at = least(coalesce(expires_at, %(end)s), %(end)s) where key_id = %(id)s",
            {"end": now + overlap, "id": key_id},
        )
        key_limits.copy(connection, old_key_id=key_id, new_key_id=minted.key_id, now=now)
    assert made is not None
    return made | {"key": minted.key, "rotated_from": key_id, "old_expires_at": now + overlap}


def refuse_unknown_models(models: Sequence[str] | None, catalogue: ModelCatalogue) -> None:
    """Raise `Invalid` for a model that is not served: a rule about it could never act."""
    if models is not None and not 1 <= len(models) <= MODELS_MAX:
        raise Invalid(f"A list of models has 1 to {MODELS_MAX} names.")
    for model in models or ():
        if model not in catalogue.served:
            raise Invalid(f"Model {model!r} is not served.", mend=f"Served: {', '.join(catalogue.names)}.")
