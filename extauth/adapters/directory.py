# SPDX-License-Identifier: Apache-2.0
"""
The keys that exist, read from Postgres one at a time and remembered.

When Postgres is away a remembered key keeps working within the grace; an unknown one is
`Unavailable`, which extauth answers with 503: authentication never fails open.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import datetime
from typing import Final

from psycopg_pool import ConnectionPool

from chassis.errors import Unavailable
from chassis.stores.postgres import fetch_all, listen
from extauth.core.cache import Remembered
from extauth.core.decision import KeyState

_KEY_BY_ID: Final = """
select k.key_id, k.tenant_id, k.project_id, k.key_hash, k.pepper_version, k.models,
       k.expires_at, k.revoked_at, t.state = 'active', p.state = 'active'
from api_key k
join tenant t using (tenant_id)
join project p using (tenant_id, project_id)
where k.key_id = %s
"""

#: Channels whose payload is a key id; a change elsewhere may touch many keys.
_KEY_CHANNEL = "peaje_api_key"
_WIDE_CHANNELS = ("peaje_tenant", "peaje_project")


class Directory:
    """Looks keys up; safe to call from several threads."""

    def __init__(self, pool: ConnectionPool, *, clock: Callable[[], datetime]) -> None:
        self._pool = pool
        self._clock = clock
        self._lock = threading.Lock()
        self._remembered: Remembered[KeyState] = Remembered()

    def watch(self, url: str) -> None:
        """Forget a key the moment Postgres says that it changed."""
        listen(url, (_KEY_CHANNEL, *_WIDE_CHANNELS), self._changed, name="extauth")

    def find(self, key_id: str) -> KeyState | None:
        """The state of *key_id*, None if there is no such key; raises `Unavailable`."""
        now = self._clock()
        with self._lock:
            found = self._remembered.fresh(key_id, now)
        if found is not None:
            return found.value
        try:
            rows = fetch_all(self._pool, _KEY_BY_ID, (key_id,))
        except Unavailable:
            with self._lock:
                found = self._remembered.stale(key_id, now)
            if found is None:
                raise
            return found.value
        state = _state(rows[0]) if rows else None
        with self._lock:
            self._remembered.put(key_id, state, now)
        return state

    def _changed(self, channel: str, payload: str) -> None:
        with self._lock:
            if channel == _KEY_CHANNEL and payload:
                self._remembered.drop(payload)
            else:
                self._remembered.expire_all(self._clock())


def _state(row: tuple) -> KeyState:
    key_id, tenant_id, project_id, key_hash, pepper_version, models, expires_at, revoked_at, tenant, project = row
    return KeyState(
        key_id=key_id,
        tenant_id=tenant_id,
        project_id=project_id,
        key_hash=bytes(key_hash),
        pepper_version=pepper_version,
        models=None if models is None else frozenset(models),
        expires_at=expires_at,
        revoked_at=revoked_at,
        tenant_active=tenant,
        project_active=project,
    )
