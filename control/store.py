# SPDX-License-Identifier: Apache-2.0
"""
The control plane's way to Postgres: transactions that see one tenant, and library errors translated once.

Each transaction works as the role `peaje_control`, for the tenant in its scope; row-level security
(schema 0002) then hides every other tenant's rows, also from a query that forgets to ask.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from psycopg.rows import DictRow, dict_row
from psycopg_pool import ConnectionPool, PoolTimeout

from chassis.errors import Invalid, Unavailable
from control.act import OneTenant, Scope

_CONNECTIONS_MAX = 8
_WAIT_SECONDS = 2.0
_STATEMENT_TIMEOUT_MS = 10_000

#: Rows of one answer; a longer list comes in pages.
PAGE_ROWS_MAX = 1000

Connection = psycopg.Connection[dict[str, Any]]


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
                "options": f"-c statement_timeout={_STATEMENT_TIMEOUT_MS} -c timezone=UTC",
            },
            open=True,
        )

    @contextmanager
    def transaction(self, scope: Scope) -> Iterator[Connection]:
        """One transaction over the tenants of *scope*: all or nothing."""
        with self._translated(), self._pool.connection() as connection:
            _enter(connection, scope)
            yield connection

    @contextmanager
    def snapshot(self, scope: Scope) -> Iterator[Connection]:
        """One transaction whose reads all see the same moment."""
        with self._translated(), self._pool.connection() as connection:
            connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
            try:
                with connection.transaction():
                    _enter(connection, scope)
                    yield connection
            finally:
                if not connection.closed:
                    connection.isolation_level = None

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (psycopg.OperationalError, psycopg.InterfaceError, PoolTimeout) as exc:
            raise Unavailable("Postgres does not answer.", mend="Try again.") from exc
        except psycopg.errors.NumericValueOutOfRange as exc:
            raise Invalid("A number, or a sum that it is added to, would be larger than can be stored.") from exc
        except (psycopg.DataError, UnicodeEncodeError) as exc:
            # A NUL or half a surrogate pair in a name: nothing that is stored can have it.
            raise Invalid("A value holds a character that cannot be stored.") from exc

    def close(self) -> None:
        """Give all connections back."""
        self._pool.close()


def _enter(connection: Connection, scope: Scope) -> None:
    try:
        connection.execute("set local role peaje_control")
    except (psycopg.errors.InsufficientPrivilege, psycopg.errors.InvalidParameterValue) as exc:
        raise Unavailable(
            "Postgres does not let the control plane work as the role peaje_control.",
            mend=f"Run as its administrator: grant peaje_control to {connection.info.user}.",
        ) from exc
    tenant = scope.tenant_id if isinstance(scope, OneTenant) else scope.value
    connection.execute("select set_config('peaje.tenant', %s, true)", (tenant,))
