# SPDX-License-Identifier: Apache-2.0
"""
Postgres as the services use it: a small pool for reads, and a listener for changes.

A read that cannot be made raises `Unavailable`; the caller's failure policy decides.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, LiteralString

import psycopg
import structlog
from psycopg import sql
from psycopg_pool import ConnectionPool, PoolTimeout

from chassis.errors import Unavailable

log = structlog.get_logger()

#: Waiting longer for a connection than Envoy waits for the decision helps nobody.
_POOL_WAIT_SECONDS = 0.3
_STATEMENT_TIMEOUT_MS = 300
#: Between attempts to listen again; also the longest a change goes unnoticed beyond its cache's TTL.
_RECONNECT_SECONDS = 1.0


def read_pool(url: str, *, name: str, connections: int) -> ConnectionPool:
    """Open a pool for short reads; it fills itself in the background, so an absent Postgres does not block."""
    return ConnectionPool(
        url,
        min_size=1,
        max_size=connections,
        timeout=_POOL_WAIT_SECONDS,
        reconnect_timeout=5.0,
        name=name,
        kwargs={
            "autocommit": True,
            "application_name": name,
            "connect_timeout": 2,
            "options": f"-c statement_timeout={_STATEMENT_TIMEOUT_MS}",
        },
        open=True,
    )


def fetch_all(pool: ConnectionPool, query: LiteralString, arguments: Sequence[Any] | Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """Run one read, retried once on a connection that had died unnoticed; raises `Unavailable`."""
    for attempt in (1, 2):
        try:
            with pool.connection() as connection:
                return connection.execute(query, arguments).fetchall()
        except (psycopg.OperationalError, psycopg.InterfaceError, PoolTimeout) as exc:
            if attempt == 2 or isinstance(exc, PoolTimeout):
                raise Unavailable("Postgres did not answer.") from exc
    raise AssertionError("unreachable")


def listen(
    url: str, channels: Sequence[str], changed: Callable[[str, str], None], *, name: str
) -> threading.Thread:
    """
    Call *changed(channel, payload)* for each notification, from a daemon thread, for ever.

    After a lost connection it calls *changed(channel, "")* once for every channel: whatever
    happened meanwhile went unheard, so the receiver drops all that it remembers.
    """

    def run() -> None:
        while True:
            try:
                with psycopg.connect(
                    url, autocommit=True, application_name=f"{name}-listen", connect_timeout=2,
                    keepalives_idle=5, keepalives_interval=2, keepalives_count=3,
                ) as connection:
                    for channel in channels:
                        connection.execute(sql.SQL("listen {}").format(sql.Identifier(channel)))
                        changed(channel, "")
                    for notice in connection.notifies():
                        changed(notice.channel, notice.payload)
            except psycopg.Error as exc:
                log.warning("listen_lost", error=type(exc).__name__)
            threading.Event().wait(_RECONNECT_SECONDS)

    thread = threading.Thread(target=run, name="listen", daemon=True)
    thread.start()
    return thread
