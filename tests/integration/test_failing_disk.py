# SPDX-License-Identifier: Apache-2.0
"""A journal's disk that fails: what cannot be read is waited for, what can only be read is read, and nothing is lost."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from structlog.testing import capture_logs

from metering.adapters import disk
from metering.adapters.invariants import verify
from metering.adapters.metrics import Exchanges
from metering.adapters.sources import Source
from metering.adapters.tail import next_piece
from metering.collector import Settings, collect
from tests.journals import NOON, collecting, end, exchanges, request_id, rows, write, write_apart

IDS = "select request_id from usage_event order by 1"
_WAIT_SECONDS_MAX = 30.0


@pytest.fixture
def live(tmp_path: Path) -> Path:
    """Where a journal's live file is."""
    return tmp_path / "journal" / "journal.jsonl"


def failing(code: int) -> Callable[..., Any]:
    """A call that the disk answers with an error."""

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return fail


def going_bad(monkeypatch: pytest.MonkeyPatch, live: Path, good_until: Callable[[], int | None]) -> None:
    """Have the kernel read *live* up to a byte and answer with an error there, for as long as *good_until* says one."""
    healthy = os.pread

    def pread(descriptor: int, size: int, offset: int) -> bytes:
        limit = good_until()
        if limit is None or Path(f"/proc/self/fd/{descriptor}").readlink() != live:
            return healthy(descriptor, size, offset)
        if offset >= limit:
            failing(errno.EIO)()
        return healthy(descriptor, min(size, limit - offset), offset)

    monkeypatch.setattr(os, "pread", pread)


def until(condition: Callable[[], object]) -> None:
    """Wait for *condition*."""
    deadline = time.monotonic() + _WAIT_SECONDS_MAX
    while not condition():
        assert time.monotonic() < deadline, "nothing came"
        time.sleep(0.02)


def test_a_disk_that_does_not_answer_is_waited_for_and_every_record_comes_once(
    monkeypatch: pytest.MonkeyPatch, ledger_url: str, live: Path
) -> None:
    """It fails in the middle of a journal that is being read, again and again; the collector says so and lives on."""
    # Where its mark of being ready goes.
    monkeypatch.chdir(live.parents[1])
    write_apart(live, exchanges(100))
    limit: list[int | None] = [0]
    going_bad(monkeypatch, live, lambda: limit[0])
    stop = threading.Event()
    source = Source(name="local", live=live, admin_port=None)
    settings = Settings(retry_seconds=0.02, idle_seconds=0.02)
    with capture_logs() as said:
        thread = threading.Thread(target=collect, args=(source, ledger_url, settings, stop, Exchanges(tenants_max=10)))
        thread.start()
        until(lambda: len([it for it in said if it["event"] == "journal_unavailable"]) >= 3)
        assert [(0,)] == rows(ledger_url, "select count(*) from usage_event")
        limit[0] = None
        until(lambda: len(rows(ledger_url, IDS)) == 100)
        limit[0] = live.stat().st_size
        write(live, [end(500)])
        until(lambda: said[-1]["event"] == "journal_unavailable")
        limit[0] = None
        until(lambda: len(rows(ledger_url, IDS)) == 101)
        stop.set()
        thread.join(_WAIT_SECONDS_MAX)

    assert not thread.is_alive()
    assert {"Input/output error"} == {it["reason"] for it in said if it["event"] == "journal_unavailable"}
    assert sorted([*(request_id(n) for n in range(100)), request_id(500)]) == [it for (it,) in rows(ledger_url, IDS)]
    assert [] == rows(ledger_url, "select reason from journal_defect")
    with psycopg.connect(ledger_url) as connection:
        assert verify(connection).holds


def test_a_bad_spot_stops_reading_there_and_a_copy_without_it_goes_on(
    monkeypatch: pytest.MonkeyPatch, ledger_url: str, live: Path
) -> None:
    """What is before it is charged; zeros in its place, as a rescue writes them, are one defect and cost what they cover."""
    lines = [end(number) for number in range(30)]
    write(live, lines)
    spot = sum(map(len, lines[:20])) + 40
    going_bad(monkeypatch, live, lambda: spot)

    with collecting(ledger_url, live) as collector:
        while rows(ledger_url, "select count(*) from usage_event") != [(20,)]:
            collector.step(NOON, 0.0)
        with pytest.raises(OSError, match="Input/output error"):
            collector.step(NOON, 0.1)
    monkeypatch.undo()
    data = live.read_bytes()
    live.unlink()
    live.write_bytes(data[:spot] + bytes(8) + data[spot + 8 :])
    with collecting(ledger_url, live) as collector:
        while collector.step(NOON, 0.0):
            pass

    assert [request_id(number) for number in range(30) if number != 20] == [it for (it,) in rows(ledger_url, IDS)]
    assert [(sum(map(len, lines[:20])),)] == rows(ledger_url, "select byte_offset from journal_defect")


@pytest.mark.parametrize("code", [errno.EROFS, errno.EIO, errno.ENOSPC], ids=errno.errorcode.__getitem__)
def test_a_disk_that_cannot_be_written_is_still_read(
    monkeypatch: pytest.MonkeyPatch, ledger_url: str, live: Path, code: int
) -> None:
    """A journal that is due to be renamed, a mark that is due to be made: neither can be, and the rows come all the same."""
    write_apart(live, exchanges(50))
    monkeypatch.setattr(Path, "rename", failing(code))
    monkeypatch.setattr(Path, "touch", failing(code))
    monkeypatch.setattr(disk, "measure", lambda _: 99.0)

    with capture_logs() as said, collecting(ledger_url, live, rotate_bytes=1) as collector:
        while collector.step(NOON, 0.0):
            pass

    assert 50 == len(rows(ledger_url, IDS))
    assert {"journal_mark_failed", "journal_files_unavailable"} <= {it["event"] for it in said}


def test_a_file_that_cannot_be_looked_at_is_not_taken_for_one_that_is_gone(monkeypatch: pytest.MonkeyPatch, live: Path) -> None:
    """Else its open exchanges would be closed, and a month behind it."""
    write(live, [end(1)])
    assert next_piece(live, {}) is not None
    healthy = Path.stat

    def stat(path: Path, **options: Any) -> os.stat_result:
        return failing(errno.EIO)() if path == live else healthy(path, **options)

    monkeypatch.setattr(Path, "stat", stat)
    # From Python 3.14 on this swallows every error.
    monkeypatch.setattr(Path, "exists", lambda path: path != live)

    with pytest.raises(OSError, match="Input/output error"):
        next_piece(live, {})
