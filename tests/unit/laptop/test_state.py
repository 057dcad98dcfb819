# SPDX-License-Identifier: Apache-2.0
"""What a supervisor leaves behind, and who may be one."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from control.laptop import state
from control.laptop.commands import describe
from control.laptop.errors import Trouble
from control.laptop.places import Places
from control.laptop.processes import ProcessId, identify

_GONE = ProcessId(pid=2**22 + 1, started_ticks=1)  # above the kernel's largest pid


@pytest.fixture
def place(tmp_path: Path) -> Places:
    """A state directory with nothing in it but the directory for the state."""
    (tmp_path / "run").mkdir()
    return Places(tmp_path)


@pytest.fixture
def child() -> Iterator[ProcessId]:
    """A process that runs until the test is over."""
    with subprocess.Popen(["/bin/sleep", "600"]) as process:
        identity = identify(process.pid)
        assert identity is not None
        yield identity
        process.kill()


def part(name: str, process: ProcessId | None, **fields: object) -> dict[str, object]:
    """A part as the supervisor writes it down."""
    return {
        "name": name, "state": "ready", "since": 0.0, "restarts": 0, "ports": {}, "log": "x.log",
        "process": state.process_document(process), **fields,
    }  # fmt: skip


def write(place: Places, supervisor: ProcessId, *parts: dict[str, object], phase: str = state.RUNNING) -> None:
    """Leave a state as *supervisor* would."""
    state.write(
        place,
        {"phase": phase, "since": 0.0, "supervisor": state.process_document(supervisor), "parts": list(parts), "endpoint": "http://x"},
    )


def this_process() -> ProcessId:
    """The process of the test."""
    identity = identify(os.getpid())
    assert identity is not None
    return identity


def test_a_state_is_read_as_it_was_written(place: Places, child: ProcessId) -> None:
    """By the same boot of the machine."""
    write(place, this_process(), part("envoy", child))

    snapshot = state.read(place)

    assert this_process() == snapshot.supervisor
    assert state.RUNNING == snapshot.phase
    assert ["envoy"] == [one["name"] for one in snapshot.parts]


def test_nothing_is_left_over_while_the_supervisor_lives(place: Places, child: ProcessId) -> None:
    """Its parts are its own business."""
    write(place, this_process(), part("envoy", child))

    assert {} == state.read(place).leftovers()


def test_what_a_killed_supervisor_left_is_found(place: Places, child: ProcessId) -> None:
    """Those that still run, by name; and the whole counts as stopped."""
    write(place, _GONE, part("envoy", child), part("valkey", _GONE), part("extauth", None))

    snapshot = state.read(place)

    assert {"envoy": child} == snapshot.leftovers()
    assert (None, state.STOPPED) == (snapshot.supervisor, snapshot.phase)


def test_a_pid_that_was_given_to_another_process_is_not_left_over(place: Places, child: ProcessId) -> None:
    """Nobody else's process is ended for its number."""
    earlier = ProcessId(pid=child.pid, started_ticks=child.started_ticks - 1)
    write(place, _GONE, part("envoy", earlier))

    assert {} == state.read(place).leftovers()


def test_a_state_of_another_boot_names_nobody(place: Places, child: ProcessId) -> None:
    """Start times count from the boot."""
    write(place, _GONE, part("envoy", child))
    document = json.loads(place.state.read_text())
    place.state.write_text(json.dumps(document | {"boot": "another"}))

    snapshot = state.read(place)

    assert ({}, []) == (snapshot.leftovers(), snapshot.parts)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"'])
def test_a_state_that_cannot_be_read_is_no_state(place: Places, text: str) -> None:
    """`up`, `down` and `status` go on without it."""
    place.state.write_text(text)

    assert ([], None) == (state.read(place).parts, state.read(place).supervisor)


@pytest.mark.parametrize("document", [None, [], {}, {"pid": 1}, {"pid": "x", "started_ticks": 1}, {"pid": None, "started_ticks": None}])
def test_what_is_not_a_process_is_read_as_none(document: object) -> None:
    """Whatever it is."""
    assert state.read_process(document) is None


def test_there_is_one_supervisor_to_a_state_directory(place: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second is told who the first is, and how to go on."""
    monkeypatch.setattr(state, "_LOCK_PATIENCE_SECONDS", 0.0)

    with state.hold_lock(place), pytest.raises(Trouble, match=rf"already running in {place.home} \(pid {os.getpid()}\)\. See `\./peaje status`"), state.hold_lock(place):
        pass


def test_the_next_supervisor_may_start_when_the_last_has_gone(place: Places) -> None:
    """However it went: the lock is the kernel's."""
    with state.hold_lock(place):
        pass
    with state.hold_lock(place):
        assert f"{os.getpid()}\n" == place.lock.read_text()


@pytest.mark.parametrize(
    ("supervisor_lives", "phase", "part_state", "expected"),
    [
        (True, state.RUNNING, "ready", "running"),
        (True, state.RUNNING, "done", "running"),
        (True, state.RUNNING, "died", "degraded"),
        (True, state.RUNNING, "starting", "degraded"),
        (True, state.STARTING, "starting", "starting"),
        (True, state.STOPPING, "stopping", "stopping"),
        (False, state.RUNNING, "ready", "degraded"),
    ],
)
def test_status_says_how_the_whole_is(
    place: Places, child: ProcessId, *, supervisor_lives: bool, phase: str, part_state: str, expected: str
) -> None:
    """Degraded is: a part is not well, or the supervisor was killed and left some."""
    write(place, this_process() if supervisor_lives else _GONE, part("envoy", child, state=part_state), phase=phase)

    document = describe(state.read(place), place)

    assert expected == document["state"]
    assert [child.pid] == [one["pid"] for one in document["parts"]]


def test_status_of_nothing_is_not_running(place: Places) -> None:
    """And shows no part of the last time, nor where it was."""
    write(place, _GONE, part("envoy", _GONE))

    document = describe(state.read(place), place)

    assert ("not running", [], None) == (document["state"], document["parts"], document["endpoint"])


def test_status_believes_the_kernel_over_the_last_word_of_a_dead_supervisor(place: Places, child: ProcessId) -> None:
    """What it called ready may have died since."""
    write(place, _GONE, part("envoy", child), part("valkey", _GONE))

    document = describe(state.read(place), place)

    assert {"envoy": "ready", "valkey": "died"} == {one["name"]: one["state"] for one in document["parts"]}
