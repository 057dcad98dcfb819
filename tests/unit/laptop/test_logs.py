# SPDX-License-Identifier: Apache-2.0
"""Logs are bounded, the one before is kept, and their ends show no secret."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from control.laptop import logs

_SECRET = "s3cr3t-value"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Where a part writes."""
    return tmp_path / "envoy.log"


def test_a_new_log_is_the_owners_alone(log: Path) -> None:
    """It may hold what a library had to say."""
    os.close(logs.open_for_appending(log))

    assert 0o600 == stat.S_IMODE(log.stat().st_mode)


def test_the_log_of_the_last_time_is_kept_once(log: Path) -> None:
    """And the one before is forgotten; an empty one replaces nothing."""
    for text in ("first", "second", ""):
        log.write_text(text)
        logs.rotate(log)

    assert "second" == logs.old_name(log).read_text()
    logs.rotate(log.with_name("none.log"))  # nothing to rotate is no failure


def test_a_log_is_cut_above_its_bound_and_its_text_kept(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the bound it stays; the part goes on writing to the same file."""
    monkeypatch.setattr(logs, "LOG_BYTES_MAX", 10)
    descriptor = logs.open_for_appending(log)
    os.write(descriptor, b"0123456789")

    assert not logs.bound(log)
    os.write(descriptor, b"x")
    assert logs.bound(log)
    os.write(descriptor, b"after")
    os.close(descriptor)

    assert ("after", "0123456789x") == (log.read_text(), logs.old_name(log).read_text())
    assert 0o600 == stat.S_IMODE(logs.old_name(log).stat().st_mode)


def test_a_log_that_is_not_there_is_not_cut(log: Path) -> None:
    """A part that never started has none."""
    assert not logs.bound(log)
    assert [] == logs.tail(log, since=0, hide=())


def test_the_tail_is_the_last_lines(log: Path) -> None:
    """Twenty at most, in order."""
    log.write_text("".join(f"line {number}\n" for number in range(50)))

    assert [f"line {number}" for number in range(30, 50)] == logs.tail(log, since=0, hide=())


def test_the_tail_begins_with_the_life_that_is_told_about(log: Path) -> None:
    """What an earlier life wrote is not shown as this one's."""
    log.write_text("earlier\n")
    since = log.stat().st_size
    with log.open("a") as file:
        file.write("now\n")

    assert ["now"] == logs.tail(log, since=since, hide=())


def test_the_tail_of_a_log_that_was_cut_since_is_its_end(log: Path) -> None:
    """The offset lies beyond the file."""
    log.write_text("after the cut\n")

    assert [] == logs.tail(log, since=10_000, hide=())


def test_no_secret_is_in_a_tail(log: Path) -> None:
    """Nor a part of one where a line is cut."""
    log.write_text(f"url postgresql://peaje:{_SECRET}@host\n" + "x" * 395 + _SECRET + "\n")

    tail = logs.tail(log, since=0, hide=[_SECRET])

    assert "url postgresql://peaje:***@host" == tail[0]
    assert "x" * 395 + "***" == tail[1]


@pytest.mark.parametrize("shown", range(1, len(_SECRET)))
def test_no_part_of_a_secret_is_in_a_tail_that_begins_inside_it(log: Path, shown: int) -> None:
    """Only the end of a large log is read, and that may begin anywhere."""
    after = "y" * (logs._TAIL_BYTES - shown - len("\nlast\n"))
    log.write_text(f"before {_SECRET}{after}\nlast\n")

    assert ["last"] == logs.tail(log, since=0, hide=[_SECRET])


def test_a_tail_is_bounded_and_never_fails_on_bytes(log: Path) -> None:
    """Long lines are cut, what is not text is replaced."""
    log.write_bytes(b"\xff\xfe" + b"z" * 1000 + b"\n")

    [line] = logs.tail(log, since=0, hide=())

    assert 400 == len(line)
