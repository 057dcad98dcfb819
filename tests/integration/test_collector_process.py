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

import httpx
import psycopg
from prometheus_client.parser import text_string_to_metric_families

from tests.dataplane.installation import free_ports
from tests.journals import exchanges, rows, write_apart

ROOT = Path(__file__).resolve().parents[2]
#: Far above the usual: the machine may be busy.
_WAIT_SECONDS = 60.0


@contextmanager
def running(home: Path, url: str, **more: str) -> Iterator[subprocess.Popen[bytes]]:
    """A collector of its own process, with *more* settings."""
    settings = {
        "PEAJE_HOME": str(home), "PEAJE_POSTGRES_URL": url, "PYTHONPATH": str(ROOT), "PEAJE_COLLECTOR_RETRY_SECONDS": "0.05",
        "PEAJE_COLLECTOR_ROTATE_BYTES": "60000", "PEAJE_COLLECTOR_CONSERVATION_SECONDS": "0", "PEAJE_ADMIN_PORT": "1",
    }
    with (home / "log").open("ab") as log:
        process = subprocess.Popen([sys.executable, "-m", "metering.collector"], cwd=home, env=os.environ | settings | more, stderr=log)
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


def scrape(port: int) -> dict[str, float]:
    """Every sample that the process shows, by its name and labels; none while it does not."""
    try:
        page = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text
    except httpx.HTTPError:
        return {}
    return {
        f"{sample.name}{sorted(sample.labels.values())}": sample.value
        for family in text_string_to_metric_families(page) for sample in family.samples
    }


def test_one_collector_reads_many_journals_and_a_broken_one_holds_up_no_other(ledger_url: str, tmp_path: Path) -> None:
    """One whose directory is a file, one that somebody else reads; each journal has its places, its lives, its metrics."""
    [port] = free_ports(1)
    (tmp_path / "broken").write_text("no directory")
    names = ("one", "two", "taken")
    for number, name in enumerate(names):
        write_apart(tmp_path / name / "journal.jsonl", [*exchanges(30, first=100 * number), b"no record\n"])
    journals = ",".join(f"{name}={tmp_path / name / 'journal.jsonl'}" for name in (*names, "broken"))
    settings = {"PEAJE_COLLECTOR_JOURNALS": journals, "PEAJE_COLLECTOR_METRICS_PORT": str(port)}
    with psycopg.connect(ledger_url, autocommit=True) as other:
        other.execute("select pg_advisory_lock(hashtextextended('peaje-journal:taken', 0))")
        with running(tmp_path, ledger_url, **settings) as process:
            wait_for_rows(ledger_url, 60)
            write_apart(tmp_path / "two" / "journal.jsonl", exchanges(5, first=900))
            wait_for_rows(ledger_url, 65)
            other.close()
            wait_for_rows(ledger_url, 95)
            (tmp_path / "broken").unlink()
            write_apart(tmp_path / "broken" / "journal.jsonl", exchanges(5, first=800))
            wait_for_rows(ledger_url, 100)
            wait_until(lambda: scrape(port).get("peaje_collector_lag_bytes['broken']") == 0)
            shown = scrape(port)
            process.send_signal(signal.SIGTERM)
            assert 0 == process.wait(timeout=_WAIT_SECONDS)

    assert ["broken", "one", "taken", "two"] == [
        row[0] for row in rows(ledger_url, "select distinct journal from journal_position order by 1")
    ]
    assert 100 == shown["peaje_collector_rows_total['ok', 'reported']"] == shown["peaje_collector_row_delay_seconds_count[]"]
    assert [1, 1, 1] == [shown[f"peaje_collector_defects_total['{name}']"] for name in names]
    for name in ("lag_bytes", "lag_seconds", "disk_used_percent", "road_closed"):
        assert {*names, "broken"} == {key.split("'")[1] for key in shown if key.startswith(f"peaje_collector_{name}[")}
    assert (0, 0) == (shown["peaje_reconciliation_exceptions_open[]"], shown["peaje_collector_duplicates_absorbed_total[]"])


def test_journals_below_a_directory_are_found_as_they_come(ledger_url: str, tmp_path: Path) -> None:
    """A pod's directory appears; its name is the journal's."""
    pods = tmp_path / "pods"
    write_apart(pods / "envoy-a" / "journal.jsonl", exchanges(10))
    with running(tmp_path, ledger_url, PEAJE_COLLECTOR_JOURNALS=str(pods)):
        wait_for_rows(ledger_url, 10)
        write_apart(pods / "envoy-b" / "journal.jsonl", exchanges(10, first=10))
        wait_for_rows(ledger_url, 20)

    assert [("envoy-a",), ("envoy-b",)] == rows(ledger_url, "select distinct journal from journal_position order by 1")
