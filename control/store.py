# SPDX-License-Identifier: Apache-2.0
"""The control plane's way to Postgres: a pool, and library errors translated once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from psycopg.rows import DictRow, dict_row
from psycopg_pool import ConnectionPool, PoolTimeout

from chassis.errors import Unavailable

_CONNECTIONS_MAX = 8
_WAIT_SECONDS = 2.0
_STATEMENT_TIMEOUT_MS = 10_000


class Store:
    """Transactions for use cases; raises `Unavailable` when Postgres does not answer."""

    def __init__(self, url: str) -> None:
        self._pool: ConnectionPool[psycopg.Connection[DictRow]] = ConnectionPool(
            url,
            min_size=1,
            max_size=_CONNECTIONS_MAX,
            timeout=_WAIT_SECONDS,
            name="control",
            kwargs={
                "row_factory": dict_row,
                "application_name": "control",
                "connect_timeout": 2,
                "options": f"-c statement_timeout={_STATEMENT_TIMEOUT_MS}",
            },
            open=True,
        )

    @contextmanager
    def transaction(self) -> Iterator[psycopg.Connection[dict[str, Any]]]:
        """One transaction: all or nothing."""
        try:
            with self._pool.connection() as connection:
                yield connection
        except (psycopg.OperationalError, psycopg.InterfaceError, PoolTimeout) as exc:
            raise Unavailable("Postgres does not answer.", mend="Try again.") from exc

    def close(self) -> None:
        """Give all connections back."""
        self._pool.close()
