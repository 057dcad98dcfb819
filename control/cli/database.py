# SPDX-License-Identifier: Apache-2.0
"""Where this installation's ledger is, for commands that read it themselves."""

from __future__ import annotations

import os

import psycopg
from psycopg.conninfo import make_conninfo

from chassis.errors import Unavailable
from control.cli.client import running_state
from control.laptop.places import read_home


def ledger_url() -> str:
    """PEAJE_POSTGRES_URL, or the running installation's own Postgres with its password."""
    if url := os.environ.get("PEAJE_POSTGRES_URL"):
        return url
    home = read_home(os.environ)
    url = running_state(home).get("postgres_url")
    if not url:
        raise Unavailable("Peaje is not running here.", mend="Start it with ./peaje up, or set PEAJE_POSTGRES_URL.")
    password = home / "secrets/postgres-password"
    return make_conninfo(url, password=password.read_text().strip()) if password.exists() else url


def connect(url: str) -> psycopg.Connection[tuple[object, ...]]:
    """A connection, or one line that says why not."""
    from chassis.schema.migrate import connect as connect_or_say_why

    connection = connect_or_say_why(url)
    connection.autocommit = True
    return connection
