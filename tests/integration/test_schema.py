# SPDX-License-Identifier: Apache-2.0
"""The migrations and the partitions, on a real Postgres."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

from chassis.clock import utc_now
from chassis.schema.migrate import connect, migrate
from chassis.schema.partitions import DAYS_AHEAD, ensure_partitions

ROOT = Path(__file__).resolve().parents[2]
#: The newest version.
HEAD = max(path.name[:4] for path in (ROOT / "chassis/schema/versions").glob("[0-9]*.py"))

INSERT_USAGE = """
insert into usage_event (request_id, tenant_id, project_id, key_id, model, dialect, started_at, ended_at, status,
    outcome, input_tokens, output_tokens, cached_tokens, reasoning_tokens, basis, streamed, recorded_at)
values (%s, 't', 'default', 'k', 'm', 'openai.chat', %s, %s, 200, 'ok', 1, 2, 0, 0, 'reported', false, now())
"""


def insert_usage(connection: psycopg.Connection[Any], request_id: str, at: datetime) -> None:
    connection.execute(INSERT_USAGE, (request_id, at, at))


def partition_of(connection: psycopg.Connection[Any], request_id: str) -> str:
    row = connection.execute("select tableoid::regclass::text from usage_event where request_id = %s", (request_id,)).fetchone()
    assert row is not None
    return str(row[0])


def run_command(postgres_url: str | None) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PEAJE_")} | {"PYTHONPATH": str(ROOT)}
    if postgres_url is not None:
        environment["PEAJE_POSTGRES_URL"] = postgres_url
    return subprocess.run([sys.executable, "-m", "chassis.schema"], env=environment, capture_output=True, text=True, check=False, timeout=60)


def test_two_migrations_at_once_leave_one_schema(empty_database: Callable[[], str]) -> None:
    """The command may run in every pod of a rollout at the same time."""
    url = empty_database()
    environment = os.environ | {"PEAJE_POSTGRES_URL": url, "PYTHONPATH": str(ROOT)}

    both = [
        subprocess.Popen([sys.executable, "-m", "chassis.schema"], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    lines = sorted(process.communicate(timeout=60)[0] for process in both)

    assert [0, 0] == [process.returncode for process in both]
    assert [f"schema {HEAD} already, 0 partitions made\n", f"schema nothing -> {HEAD}, 17 partitions made\n"] == lines


def test_migrating_again_changes_nothing(postgres_url: str) -> None:
    """A restart runs the migration each time."""
    again = migrate(postgres_url, utc_now().date())

    assert (HEAD, HEAD, 0) == (again.before, again.after, again.partition_count)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        (None, "PEAJE_POSTGRES_URL is not set"),
        ("postgresql://gw:hunter2@127.0.0.1:1/x", "does not answer"),
        ("postgresql//gw:hunter2@127.0.0.1:1/x", "is not a Postgres URL"),
        ("postgresql://gw:hunter2@127.0.0.1:notaport/x", "PEAJE_POSTGRES_URL"),
    ],
)
def test_a_wrong_url_is_one_clear_line_without_the_password(url: str | None, words: str) -> None:
    """The operator's first mistake must explain itself."""
    done = run_command(url)

    assert 1 == done.returncode
    assert "" == done.stdout
    assert 1 == len(done.stderr.splitlines())
    assert words in done.stderr
    assert "hunter2" not in done.stderr


def test_a_wrong_password_is_one_clear_line_without_it(postgres_server: str) -> None:
    """Postgres answers, and says no."""
    user, _, rest = postgres_server.rpartition("@")
    done = run_command(f"{user.rpartition(':')[0]}:hunter2@{rest}")

    assert 1 == done.returncode
    assert 1 == len(done.stderr.splitlines())
    assert "password authentication failed" in done.stderr
    assert "hunter2" not in done.stderr


def test_a_database_from_a_newer_peaje_is_left_alone(postgres_url: str) -> None:
    """Old code must not run against a schema that it does not know."""
    with psycopg.connect(postgres_url) as connection:
        connection.execute("update alembic_version set version_num = '9999'")

    done = run_command(postgres_url)

    assert 1 == done.returncode
    assert "schema is at version 9999" in done.stderr
    assert 1 == len(done.stderr.splitlines())


def test_an_owner_without_role_rights_can_migrate_when_the_role_exists(postgres_url: str, empty_database: Callable[[], str]) -> None:
    """On a managed Postgres the operator makes peaje_billing; the migration only grants."""
    url = empty_database()
    database = url.rpartition("/")[2]
    role = f"owner_{database}"
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"create role {role} login password 'pw' nocreaterole")
        connection.execute(f"alter database {database} owner to {role}")
    server = url.rpartition("@")[2]

    done = run_command(f"postgresql://{role}:pw@{server}")

    assert (0, "") == (done.returncode, done.stderr)


def test_partitions_cover_yesterday_to_two_weeks_ahead(postgres_url: str) -> None:
    """Rows of these days go to the partition of their UTC day, whatever the server's own zone."""
    today = utc_now().date()
    midnight = datetime(today.year, today.month, today.day, tzinfo=UTC)
    with connect(postgres_url) as connection:
        insert_usage(connection, "first", midnight)
        insert_usage(connection, "last", midnight + timedelta(days=1) - timedelta(microseconds=1))
        insert_usage(connection, "yesterday", midnight - timedelta(microseconds=1))
        insert_usage(connection, "farthest", midnight + timedelta(days=DAYS_AHEAD))

        assert f"usage_event_{today:%Y%m%d}" == partition_of(connection, "first") == partition_of(connection, "last")
        assert f"usage_event_{today - timedelta(days=1):%Y%m%d}" == partition_of(connection, "yesterday")
        assert f"usage_event_{today + timedelta(days=DAYS_AHEAD):%Y%m%d}" == partition_of(connection, "farthest")


def test_a_row_of_any_other_day_is_kept_and_moves_when_its_day_is_made(postgres_url: str) -> None:
    """No row is ever refused; a day that fell into the default partition gets its own later."""
    far = datetime(2031, 2, 28, 23, 59, 59, 999999, tzinfo=UTC)
    with connect(postgres_url) as connection:
        insert_usage(connection, "far", far)
        assert "usage_event_default" == partition_of(connection, "far")

        made = ensure_partitions(connection, date(2031, 2, 28), days_ahead=1)

        assert ["usage_event_20310227", "usage_event_20310228", "usage_event_20310301"] == made
        assert "usage_event_20310228" == partition_of(connection, "far")
        with pytest.raises(psycopg.errors.UniqueViolation), connection.transaction():
            insert_usage(connection, "far", far)
        assert [] == ensure_partitions(connection, date(2031, 2, 28), days_ahead=1)


def test_partitions_made_in_a_callers_transaction_go_with_it(postgres_url: str) -> None:
    """The collector's transaction may fail after this; nothing half-made may stay."""
    with connect(postgres_url) as connection:
        with connection.transaction(force_rollback=True):
            ensure_partitions(connection, date(2032, 1, 1), days_ahead=0)

        assert ["usage_event_20311231", "usage_event_20320101"] == ensure_partitions(connection, date(2032, 1, 1), days_ahead=0)


def test_every_column_that_the_billing_role_may_read_is_explained(postgres_url: str) -> None:
    """By its name, beside its view's, in docs/billing.md."""
    text = (ROOT / "docs/billing.md").read_text()
    with psycopg.connect(postgres_url) as connection:
        columns = connection.execute(
            "select table_name, column_name from information_schema.column_privileges where grantee = 'peaje_billing'"
        ).fetchall()

    assert len({view for view, _ in columns}) >= 9
    assert [] == sorted({name for name in {*(view for view, _ in columns), *(column for _, column in columns)} if f"`{name}`" not in text})


def test_the_billing_role_reads_views_and_nothing_else(postgres_url: str) -> None:
    """Billing depends on versioned views; a table read would break at the next migration."""
    with connect(postgres_url) as connection:
        insert_usage(connection, "one", utc_now())
        readable = connection.execute(
            "select relname from pg_class where relnamespace = 'public'::regnamespace and relkind in ('r', 'p', 'v', 'm') "
            "and has_table_privilege('peaje_billing', oid, 'select')"
        ).fetchall()
        assert {name for (name,) in readable if not (name.startswith("billing_") and name.endswith("_v1"))} == set()
        connection.execute("set role peaje_billing")

        assert (1,) == connection.execute("select count(*) from billing_usage_v1").fetchone()
        for table in ("usage_event", "usage_event_default", "api_key", "tenant"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege), connection.transaction():
                connection.execute(f"select * from {table}")
