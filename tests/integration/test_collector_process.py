# SPDX-License-Identifier: Apache-2.0
"""The collector as a process: killed, and cut off from Postgres, while the journal grows and is rotated."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg

from tests.journals import exchanges, rows, write_apart

ROOT = Path(__file__).resolve().parents[2]
#: Far above the usual: the machine may be busy.
_WAIT_SECONDS = 60.0


@contextmanager
def running(home: Path, url: str) -> Iterator[subprocess.Popen[bytes]]:
    """A collector of its own process."""
    settings = {
        "PEAJE_HOME": str(home), "PEAJE_POSTGRES_URL": url, "PYTHONPATH": str(ROOT), "PEAJE_COLLECTOR_RETRY_SECONDS": "0.05",
        "PEAJE_COLLECTOR_ROTATE_BYTES": "60000", "PEAJE_COLLECTOR_CONSERVATION_SECONDS": "0", "PEAJE_ADMIN_PORT": "1",
    }
    with (home / "log").open("ab") as log:
        process = subprocess.Popen([sys.executable, "-m", "metering.collector"], cwd=home, env=os.environ | settings, stderr=log)
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()


def cut_off(url: str) -> None:
    """End every connection of collectors, as a restart of Postgres does."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'collector' "
            "and datname = current_database()"
        )


def wait_for_rows(url: str, count: int) -> None:
    """Until that many rows are there."""
    wait_until(lambda: rows(url, "select count(*) from usage_event")[0][0] >= count)


def wait_until(condition: Callable[[], bool]) -> None:
    """Look every 50 ms."""
    deadline = time.monotonic() + _WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_killed_and_cut_off_again_and_again_it_writes_each_exchange_once(ledger_url: str, tmp_path: Path) -> None:
    """Five lives, each cut off from Postgres three times and then killed; the last one ends in order."""
    live = tmp_path / "journal/journal.jsonl"
    chance = random.Random(11)
    written = 0
    for _ in range(5):
        with running(tmp_path, ledger_url) as process:
            for _ in range(3):
                write_apart(live, exchanges(40, first=written))
                written += 40
                time.sleep(chance.random() / 2)
                cut_off(ledger_url)
            wait_for_rows(ledger_url, chance.randint(1, written))
            process.kill()
    ready = tmp_path / "run/collector.ready"
    ready.unlink()
    with running(tmp_path, ledger_url) as process:
        # Its handler for the signal is there before it says so.
        wait_until(ready.exists)
        write_apart(live, exchanges(40, first=written))
        process.send_signal(signal.SIGTERM)
        assert 0 == process.wait(timeout=_WAIT_SECONDS)

    assert [(written + 40, written + 40)] == rows(ledger_url, "select count(*), count(distinct request_id) from usage_event")
    assert [(written + 40,)] == rows(ledger_url, "select sum(request_count)::int from usage_hour")
    assert [] == rows(ledger_url, "select * from journal_defect")
    assert [] == rows(ledger_url, "select * from usage_conflict")
    assert 1 < len(list(live.parent.glob("journal-*.jsonl")))
