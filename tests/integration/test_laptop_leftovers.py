# SPDX-License-Identifier: Apache-2.0
"""A supervisor was killed in a way that left parts: `down` and the next `up` end them, and nobody else."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from control.laptop import places, runner, state
from control.laptop.places import Places
from control.laptop.processes import ProcessId, identify, is_alive
from tests.dataplane.installation import PEAJE

_GONE = ProcessId(pid=2**22 + 1, started_ticks=1)  # above the kernel's largest pid


@pytest.fixture
def place(tmp_path: Path) -> Places:
    """A state directory of ours."""
    place = Places(tmp_path / "home")
    places.make(place, passable=False)
    return place


@pytest.fixture
def children() -> Iterator[list[ProcessId]]:
    """Two processes that outlived whoever started them."""
    processes = [subprocess.Popen(["/bin/sleep", "600"], start_new_session=True) for _ in range(2)]
    yield [identity for process in processes if (identity := identify(process.pid)) is not None]
    for process in processes:
        process.kill()
        process.wait()


def leave(place: Places, **parts: ProcessId) -> None:
    """Write the state of a supervisor that is no more."""
    document = [
        {"name": name, "state": "ready", "since": 0.0, "restarts": 0, "ports": {}, "log": "x", "process": state.process_document(process)}
        for name, process in parts.items()
    ]
    state.write(place, {"phase": state.RUNNING, "since": 0.0, "supervisor": state.process_document(_GONE), "parts": document})


def peaje(place: Places, command: str) -> subprocess.CompletedProcess[str]:
    """Run a command on that state directory."""
    return subprocess.run(
        [PEAJE, command], env={**os.environ, "PEAJE_HOME": str(place.home)}, capture_output=True, text=True, timeout=120, check=False
    )


def test_down_ends_what_was_left_and_nothing_else(place: Places, children: list[ProcessId]) -> None:
    """By the process, not by its number: one that has the pid of a former part stays."""
    left, other = children
    leave(place, envoy=left, valkey=ProcessId(pid=other.pid, started_ticks=other.started_ticks - 1))

    before = peaje(place, "status")
    down = peaje(place, "down")
    after = peaje(place, "status")

    assert (1, 0, 3) == (before.returncode, down.returncode, after.returncode)
    assert "ended what was left: envoy\n" in down.stdout
    assert (False, True) == (is_alive(left), is_alive(other))


def test_the_next_up_ends_what_was_left_before_it_starts_anything(place: Places, children: list[ProcessId]) -> None:
    """And says so: two Envoys on one journal would be worse."""
    left, other = children
    leave(place, envoy=left, collector=other)
    said: list[str] = []

    runner._end_leftovers(place, said.append)

    assert ["ending what an earlier run has left: envoy, collector"] == said
    assert [False, False] == [is_alive(left), is_alive(other)]


def test_down_with_nothing_running_is_no_failure(place: Places) -> None:
    """It says where it looked."""
    down = peaje(place, "down")

    assert (0, f"nothing is running in {place.home}") == (down.returncode, down.stdout.strip())
