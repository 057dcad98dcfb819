# SPDX-License-Identifier: Apache-2.0
"""
The limits in force, read whole from Postgres and swapped as one.

A change is pushed and read at once; the period bounds what a lost push can cost. While
Postgres is away the last table stays in force. Before the first one there is none to
stand on: the service does not serve until it has read it.
"""

from __future__ import annotations

import threading
import time
from typing import Final

import structlog
from psycopg_pool import ConnectionPool

from chassis.errors import Unavailable
from chassis.stores.postgres import fetch_all, listen
from ratelimit.core.limits import Limit, LimitTable

log = structlog.get_logger()

_ALL_LIMITS: Final = """
select limit_id, tenant_id, key_id, model, requests_per_minute, tokens_per_minute
from rate_limit
order by limit_id
"""
_RELOAD_EVERY_SECONDS = 5.0
_RETRY_EVERY_SECONDS = 0.5


class LimitsSource:
    """Holds the current table; `current` never blocks."""

    def __init__(self, pool: ConnectionPool) -> None:
        self._pool = pool
        self._changed = threading.Event()
        self.current = self._first()

    def watch(self, url: str) -> None:
        """Keep the table current from background threads."""
        listen(url, ("peaje_rate_limit",), lambda *_: self._changed.set(), name="ratelimit")
        threading.Thread(target=self._run, name="limits", daemon=True).start()

    def _first(self) -> LimitTable:
        while True:
            try:
                return self._fetch()
            except Unavailable:
                log.warning("limits_wait_for_postgres")
                time.sleep(_RETRY_EVERY_SECONDS)

    def _run(self) -> None:
        while True:
            self._changed.wait(_RELOAD_EVERY_SECONDS)
            self._changed.clear()
            try:
                self.current = self._fetch()
            except Unavailable:
                log.warning("limits_stale")

    def _fetch(self) -> LimitTable:
        return LimitTable(
            Limit(
                limit_id=limit_id, tenant_id=tenant_id, key_id=key_id, model=model,
                requests_per_minute=rpm, tokens_per_minute=tpm,
            )
            for limit_id, tenant_id, key_id, model, rpm, tpm in fetch_all(self._pool, _ALL_LIMITS, ())
        )
