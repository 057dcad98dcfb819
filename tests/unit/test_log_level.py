# SPDX-License-Identifier: Apache-2.0
"""The level of the log changes while a process runs, by a file."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import structlog

from chassis.telemetry.log import LevelGate


def passes(gate: LevelGate, method: str) -> bool:
    """Whether an event of that loudness gets through."""
    try:
        gate(None, method, {"event": "something"})
    except structlog.DropEvent:
        return False
    return True


def test_the_file_wins_while_it_is_there(tmp_path: Path) -> None:
    """Louder, quieter, and back to what the process was started with."""
    path = tmp_path / "log-level"
    gate = LevelGate(logging.INFO, path)
    heard = [(passes(gate, "debug"), passes(gate, "info"))]

    for text in ("debug\n", "error", None):
        if text is None:
            path.unlink()
        else:
            path.write_text(text)
        gate.look()
        heard.append((passes(gate, "debug"), passes(gate, "info")))

    assert [(False, True), (True, True), (False, False), (False, True)] == heard
    assert passes(gate, "error")


@pytest.mark.parametrize("text", [b"loud", b"", b"\xff", b"x" * 1000])
def test_what_is_no_level_changes_nothing(tmp_path: Path, text: bytes) -> None:
    """Never a process without a log."""
    path = tmp_path / "log-level"
    gate = LevelGate(logging.WARNING, path)
    path.write_bytes(text)

    gate.look()

    assert logging.WARNING == gate.level


def test_a_change_is_told_once(tmp_path: Path) -> None:
    """By the process itself, and to the libraries' loggers."""
    path = tmp_path / "log-level"
    gate, told = LevelGate(logging.INFO, path), []
    gate.changed = lambda: told.append(gate.level)
    path.write_text("debug")

    gate.look()
    gate.look()

    assert [logging.DEBUG] == told
