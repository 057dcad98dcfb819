# SPDX-License-Identifier: Apache-2.0
"""
Keys, service accounts and projects, read from Postgres one at a time and remembered.

When Postgres is away what is remembered keeps working within the grace; the unknown is
`Unavailable`, which extauth answers with 503: authentication never fails open.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import datetime
from typing import Any, Final, LiteralString, TypeVar

from chassis.errors import Unavailable
from chassis.stores.postgres import ReadPool, fetch_all, listen
from extauth.adapters import metrics
from extauth.core.cache import Remembered
from extauth.core.identity import AccountState, Identity, KeyState, Standing
from extauth.core.patterns import Patterns

KEY_BY_ID: Final = """
select k.key_id, k.tenant_id, k.project_id, k.key_hash, k.pepper_version, k.models, k.denied_models, k.scopes,
       k.allowed_cidrs, k.state = 'active', coalesce(a.state, 'active') = 'active', k.expires_at, k.revoked_at,
       k.rotated_to is not null, t.state = 'active', p.state = 'active', p.labels
from api_key k
join tenant t using (tenant_id)
join project p using (tenant_id, project_id)
left join service_account a on a.service_account_id = k.service_account_id
where k.key_id = %s
"""
ACCOUNT_BY_ID: Final = """
select a.tenant_id, a.project_id, a.state = 'active', a.scopes, a.models, a.denied_models,
       t.state = 'active', p.state = 'active', p.labels
from service_account a
join tenant t using (tenant_id)
join project p using (tenant_id, project_id)
where a.service_account_id = %s
"""
PROJECT_BY_ID: Final = """
select t.state = 'active', p.state = 'active', p.labels
from project p join tenant t using (tenant_id)
where p.tenant_id = %s and p.project_id = %s
"""

#: Payload: a key id.
_KEY_CHANNEL: Final = "peaje_api_key"
#: Payload: a tenant id.
_TENANT_CHANNELS: Final = ("peaje_tenant", "peaje_project", "peaje_service_account")

Value = TypeVar("Value")


class Directory:
    """Looks up who exists; safe to call from several threads."""

    def __init__(self, pool: ReadPool, *, clock: Callable[[], datetime]) -> None:
        self._pool = pool
        self._clock = clock
        self._lock = threading.Lock()
        self._remembered: Remembered[Any] = Remembered()

    def watch(self, url: str) -> None:
        """Forget the moment Postgres says that something changed."""
        listen(url, (_KEY_CHANNEL, *_TENANT_CHANNELS), self.changed, name="extauth")

    def find(self, key_id: str) -> KeyState | None:
        """The state of a key, None if there is no such key; raises `Unavailable`."""
        # A key id, a tenant id and an account id never look alike, so one table holds all.
        return self._find(key_id, KEY_BY_ID, (key_id,), read_key)

    def remembers(self, key_id: str) -> bool:
        """Whether a key is in memory as one that exists or existed, or as one that does not: no stranger's."""
        with self._lock:
            return self._remembered.has(key_id, self._clock())

    def find_account(self, account_id: str) -> AccountState | None:
        """The state of a service account, None if there is no such account; raises `Unavailable`."""
        return self._find(account_id, ACCOUNT_BY_ID, (account_id,), read_account)

    def find_project(self, tenant_id: str, project_id: str) -> Standing | None:
        """The standing of a project, None if there is no such project; raises `Unavailable`."""
        return self._find(
            f"{tenant_id}/{project_id}", PROJECT_BY_ID, (tenant_id, project_id), lambda row, _: (read_standing(*row), tenant_id)
        )

    def changed(self, channel: str, payload: str) -> None:
        """Hear of a change; without a payload, of any number of changes."""
        del channel
        with self._lock:
            if payload:
                self._remembered.mark(payload, self._clock())
            else:
                self._remembered.expire_all(self._clock())

    def _find(
        self, name: str, query: LiteralString, arguments: tuple[str, ...], read: Callable[[tuple[Any, ...], datetime], tuple[Value, str]]
    ) -> Value | None:
        now = self._clock()
        with self._lock:
            found = self._remembered.fresh(name, now)
        if found is not None:
            metrics.cache_hit(known=found.value is not None)
            return found.value
        metrics.CACHE_MISS.inc()
        try:
            rows = fetch_all(self._pool, query, arguments)
        except Unavailable:
            with self._lock:
                found = self._remembered.stale(name, now)
            if found is None:
                raise
            metrics.CACHE_GRACE.inc()
            return found.value
        value, owner = read(rows[0], now) if rows else (None, arguments[0])
        with self._lock:
            self._remembered.put(name, value, now, owner=owner)
        return value


def read_key(row: tuple[Any, ...], asked_at: datetime) -> tuple[KeyState, str]:
    """A row of `KEY_BY_ID`, and the tenant with which it changes."""
    (
        key_id, tenant_id, project_id, key_hash, pepper_version, models, denied_models, scopes,
        networks, is_active, account_active, expires_at, revoked_at, is_rotated, *standing,
    ) = row  # fmt: skip
    identity = Identity(
        tenant_id=tenant_id,
        project_id=project_id,
        key_id=key_id,
        standing=read_standing(*standing),
        scopes=None if scopes is None else frozenset(scopes),
        models=None if models is None else Patterns.of(models),
        denied_models=Patterns.of(denied_models),
        networks=None if networks is None else tuple(networks),
        is_active=is_active,
        account_active=account_active,
        is_rotated=is_rotated,
        expires_at=expires_at,
        revoked_at=revoked_at,
        known_at=asked_at,
    )
    return KeyState(identity=identity, key_hash=bytes(key_hash), pepper_version=pepper_version), tenant_id


def read_account(row: tuple[Any, ...], _asked_at: datetime) -> tuple[AccountState, str]:
    """A row of `ACCOUNT_BY_ID`, and the tenant with which it changes."""
    tenant_id, project_id, is_active, scopes, models, denied_models, *standing = row
    state = AccountState(
        tenant_id=tenant_id,
        project_id=project_id,
        is_active=is_active,
        scopes=None if scopes is None else frozenset(scopes),
        models=None if models is None else Patterns.of(models),
        denied_models=Patterns.of(denied_models),
        standing=read_standing(*standing),
    )
    return state, tenant_id


def read_standing(tenant_active: bool, project_active: bool, labels: dict[str, Any]) -> Standing:  # noqa: FBT001 - columns
    """A row of `PROJECT_BY_ID`."""
    return Standing(tenant_active=tenant_active, project_active=project_active, labels=labels)
