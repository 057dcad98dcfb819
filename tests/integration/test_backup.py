# SPDX-License-Identifier: Apache-2.0
"""The ledger is copied, lost, made anew and verified; the journal brings back what came after the copy."""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest

from chassis.errors import Conflict, Invalid, Unavailable
from control.backup import dump, restore
from metering.adapters.invariants import sums_digest
from tests.journals import collect, exchanges, rows, write_apart


def digest(url: str) -> str:
    """Of every sum of the ledger."""
    with psycopg.connect(url) as connection:
        return sums_digest(connection)


def test_a_lost_ledger_comes_back_whole_with_what_came_after_its_copy(
    postgres_server: str, ledger_url: str, empty_database: Callable[[], str], tmp_path: Path
) -> None:
    """Dump, go on, lose the database, restore, read on: every row once, every sum as it was."""
    live, file = tmp_path / "journal/journal.jsonl", tmp_path / "ledger.dump"
    write_apart(live, exchanges(60))
    collect(ledger_url, live)
    size = dump(ledger_url, file)
    at_dump = digest(ledger_url)
    write_apart(live, exchanges(40, first=60))
    collect(ledger_url, live)
    before_the_loss = digest(ledger_url)

    again = empty_database()
    verified = restore(file, again)
    restored = digest(again)
    collect(again, live)

    assert verified["ok"], verified
    assert (0o600, size) == (stat.S_IMODE(file.stat().st_mode), file.stat().st_size)
    assert at_dump == restored
    assert [(100, 100)] == rows(again, "select count(*), count(distinct request_id) from usage_event")
    assert before_the_loss == digest(again)
    assert [] == rows(again, "select * from usage_conflict")


def test_who_may_read_what_is_restored_too(ledger_url: str, empty_database: Callable[[], str], tmp_path: Path) -> None:
    """Grants and row-level security are part of a ledger."""
    rights = (
        "select relname, relrowsecurity, relacl::text from pg_class where relnamespace = 'public'::regnamespace "
        "and relkind in ('r', 'p', 'v') order by 1"
    )
    policies = "select tablename, policyname, roles::text, qual from pg_policies order by 1, 2"
    dump(ledger_url, tmp_path / "ledger.dump")

    again = empty_database()
    restore(tmp_path / "ledger.dump", again)

    assert rows(ledger_url, rights) == rows(again, rights)
    assert rows(ledger_url, policies) == rows(again, policies)


def test_what_would_be_overwritten_is_refused_and_stays(ledger_url: str, tmp_path: Path) -> None:
    """A database with tables, a file that is there, a file that is none, a URL without a database."""
    file = tmp_path / "ledger.dump"
    dump(ledger_url, file)
    before = digest(ledger_url)

    with pytest.raises(Conflict):
        restore(file, ledger_url)
    with pytest.raises(Invalid):
        dump(ledger_url, file)
    with pytest.raises(Invalid):
        restore(tmp_path / "none", ledger_url)
    with pytest.raises(Invalid):
        dump("postgresql://127.0.0.1", tmp_path / "other")
    assert before == digest(ledger_url)
    assert not (tmp_path / "other").exists()


def test_a_damaged_copy_leaves_an_empty_database(ledger_url: str, empty_database: Callable[[], str], tmp_path: Path) -> None:
    """All or nothing: half a ledger looks like a whole one."""
    file = tmp_path / "ledger.dump"
    dump(ledger_url, file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])

    again = empty_database()
    with pytest.raises(Unavailable):
        restore(file, again)

    assert [(0,)] == rows(again, "select count(*) from pg_tables where schemaname = 'public'")
