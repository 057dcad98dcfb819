# SPDX-License-Identifier: Apache-2.0
"""
What we know ourselves of whom a token or certificate names: is its tenant, project, service account in force?

Whoever vouches for a caller knows nothing of our suspensions. Read from Postgres one at a time,
remembered and pushed like keys (`Directory`); when Postgres is away, the same grace applies.
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
from extauth.core.token import Account

_ACCOUNT: Final = """
select t.state = 'active', p.state = 'active', p.labels, a.state = 'active', a.scopes, a.models, a.denied_models
from tenant t
join project p using (tenant_id)
left join service_account a
  on a.service_account_id = %(account)s and a.tenant_id = p.tenant_id and a.project_id = p.project_id
where t.tenant_id = %(tenant)s and p.project_id = %(project)s
  and (%(account)s::text is null or a.service_account_id is not null)
"""
CHANNELS: Final = ("peaje_tenant", "peaje_project", "peaje_service_account")


class Accounts:
    """Looks accounts up; safe to call from several threads."""

    def __init__(self, pool: ConnectionPool, *, clock: Callable[[], datetime]) -> None:
        self._pool = pool
        self._clock = clock
        self._lock = threading.Lock()
        self._remembered: Remembered[Account] = Remembered()

    def watch(self, url: str) -> None:
        """Ask again the moment Postgres says that something changed."""
        listen(url, CHANNELS, self.changed, name="extauth-accounts")

    def find(self, tenant_id: str, project_id: str, service_account_id: str | None) -> Account | None:
        """The account, None if there is none such (or the service account is another project's); raises `Unavailable`."""
        # None of the three can hold a slash: the first two are slugs, the last is compared by Postgres.
        name = f"{tenant_id}/{project_id}/{service_account_id or ''}"
        now = self._clock()
        with self._lock:
            found = self._remembered.fresh(name, now)
        if found is not None:
            return found.value
        arguments = {"tenant": tenant_id, "project": project_id, "account": service_account_id}
        try:
            rows = fetch_all(self._pool, _ACCOUNT, arguments)
        except Unavailable:
            with self._lock:
                found = self._remembered.stale(name, now)
            if found is None:
                raise
            return found.value
        account = _account(rows[0]) if rows else None
        with self._lock:
            self._remembered.put(name, account, now)
        return account

    def changed(self, channel: str, payload: str) -> None:
        """Take a notification: these change rarely, and one tenant may have many projects and accounts."""
        del channel, payload
        with self._lock:
            self._remembered.expire_all(self._clock())


def _account(row: tuple) -> Account:
    tenant_active, project_active, labels, account_active, scopes, models, denied_models = row
    return Account(
        tenant_active=tenant_active,
        project_active=project_active,
        account_active=account_active is not False,
        labels=labels,
        scopes=None if scopes is None else frozenset(scopes),
        models=None if models is None else tuple(models),
        denied_models=tuple(denied_models or ()),
    )
