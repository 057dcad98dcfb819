# SPDX-License-Identifier: Apache-2.0
"""
Bring the schema of one Postgres database to the newest version.

Forward only: there is no downgrade, because a bill that was written is never unwritten.
All pending versions and the partitions are one transaction: afterwards the database is either
new or untouched.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Final

import psycopg
import sqlalchemy
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from psycopg.conninfo import conninfo_to_dict
from sqlalchemy.exc import SQLAlchemyError

from chassis.errors import Invalid, PeajeError, Unavailable
from chassis.schema.partitions import ensure_partitions
from chassis.settings import redacted

#: `unique nulls not distinct` and permissions of views came with 15.
SERVER_VERSION_MIN: Final = 150000
#: Seconds. A database that needs longer to accept a connection is not there.
_CONNECT_TIMEOUT_SECONDS: Final = 5
#: Any constant of our own. Two that migrate at once must wait for each other.
_LOCK: Final = 0x7065616A_65000001


@dataclass(frozen=True, slots=True, kw_only=True)
class Migration:
    """Hold what an upgrade did: versions before and after, and how many partitions were made."""

    before: str | None
    after: str
    partition_count: int

    def __str__(self) -> str:
        moved = f"{self.before or 'nothing'} -> {self.after}" if self.before != self.after else f"{self.after} already"
        return f"schema {moved}, {self.partition_count} partitions made"


def migrate(postgres_url: str, today: date) -> Migration:
    """Upgrade to the newest version and make the coming days' partitions; refuse in one line."""
    engine = sqlalchemy.create_engine(
        "postgresql+psycopg://",
        # libpq reads the URL itself, so that every form it knows works here as everywhere.
        creator=lambda: connect(postgres_url),
        poolclass=sqlalchemy.NullPool,
    )
    try:
        with engine.begin() as connection:
            return _upgrade(connection, today)
    except PeajeError:
        raise
    except (psycopg.Error, SQLAlchemyError) as exc:
        raise Unavailable(f"The schema in {redacted(postgres_url)} could not be upgraded: {_first_line(exc)}.") from exc


def newest_version() -> str:
    """The version that this code brings a schema to; by the names of its files, because alembic takes half a second."""
    return max(path.name.partition("_")[0] for path in (Path(__file__).parent / "versions").glob("[0-9]*.py"))


def connect(postgres_url: str) -> psycopg.Connection[Any]:
    """Connect, or say in one line, without the password, why not. Refuses a server that is too old."""
    try:
        timeout = conninfo_to_dict(postgres_url).get("connect_timeout", _CONNECT_TIMEOUT_SECONDS)
        connection = psycopg.connect(postgres_url, connect_timeout=timeout)
    except psycopg.ProgrammingError as exc:
        # The driver's message quotes the text that it could not read, password and all.
        raise Invalid("PEAJE_POSTGRES_URL is not a Postgres URL.", mend=_MEND_URL) from exc
    except psycopg.OperationalError as exc:
        raise Unavailable(f"Postgres at {redacted(postgres_url)} does not answer: {_first_line(exc)}.", mend=_MEND_URL) from exc
    version = connection.info.server_version
    if version < SERVER_VERSION_MIN:
        connection.close()
        raise Invalid(
            f"Postgres at {redacted(postgres_url)} is version {version // 10000}.",
            mend=f"Peaje needs {SERVER_VERSION_MIN // 10000} or newer.",
        )
    return connection


def _upgrade(connection: sqlalchemy.Connection, today: date) -> Migration:
    connection.execute(sqlalchemy.text("select pg_advisory_xact_lock(:key)"), {"key": _LOCK})
    before = _current(connection)
    config = _config()
    config.attributes["connection"] = connection
    head = ScriptDirectory.from_config(config).get_current_head()
    if head is None:
        raise Invalid("The schema has no versions: the installation is incomplete.")
    if before is None or before < head:
        command.upgrade(config, "head")
    elif before > head:
        raise Invalid(f"The schema is at version {before}, this Peaje knows {head}.", mend="Install the newer Peaje.")
    driver = connection.connection.driver_connection
    assert isinstance(driver, psycopg.Connection)
    made = ensure_partitions(driver, today)
    return Migration(before=before, after=head, partition_count=len(made))


def _current(connection: sqlalchemy.Connection) -> str | None:
    if connection.execute(sqlalchemy.text("select to_regclass('alembic_version')")).scalar() is None:
        return None
    return connection.execute(sqlalchemy.text("select version_num from alembic_version")).scalar()


def _config() -> Config:
    config = Config()
    # The scripts lie beside this file, wherever it was installed; "%" would be interpolated.
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    return config


def _first_line(exc: BaseException) -> str:
    lines = [line.strip() for line in str(getattr(exc, "orig", None) or exc).splitlines() if line.strip()]
    return redacted(lines[0]).rstrip(".") if lines else type(exc).__name__


_MEND_URL: Final = "Check PEAJE_POSTGRES_URL and that the server is running."
