# SPDX-License-Identifier: Apache-2.0
"""The supervisor with small programs for parts: order, deaths, bounds, and that nothing is left running."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from control.laptop import reporter, state, supervisor
from control.laptop.errors import Trouble
from control.laptop.parts import Heir, Kind, Part
from control.laptop.places import REPOSITORY, Places
from control.laptop.processes import is_alive, wait_until
from control.laptop.supervisor import Supervisor

_PATIENCE_SECONDS = 30.0
#: Says that it runs, then waits; a shell ends at TERM by itself.
_STAYS = 'echo "$0 up" >>order; : >"$0.ready"; trap \'echo "$0 down" >>order; exit 0\' TERM; while :; do sleep 0.02; done'
_DIES = 'echo "$0 up" >>order; echo "last words of $0 with s3cr3t"; exit 7'


class Listener:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def tell(self, event: reporter.Event) -> None:
        """Take one event."""
        self.events.append(dict(event))

    @property
    def troubles(self) -> list[list[str]]:
        """The lines of each trouble."""
        return [event["lines"] for event in self.events if event["kind"] == reporter.TROUBLE]

    def parts(self, what: str) -> list[str]:
        """Names of the parts of which *what* was told, in order."""
        return [event["name"] for event in self.events if event["kind"] == reporter.PART and event["what"] == what]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Places:
    """A state directory that is the working directory, as `up` makes it."""
    for name in ("run", "log"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    return Places(tmp_path)


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path) -> Iterator[None]:
    """Whatever a test does, no process of it stays."""
    yield
    assert wait_until(lambda: processes_in(tmp_path) == [], seconds=_PATIENCE_SECONDS)


def processes_in(directory: Path) -> list[int]:
    """Processes that work in *directory*, this one aside."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and int(entry.name) != os.getpid() and (entry / "cwd").readlink() == directory:
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def part(name: str, script: str = _STAYS, **fields: Any) -> Part:
    """A shell script as a part; ready when it says so."""

    async def probe() -> str | None:
        return None if Path(f"{name}.ready").exists() else f"{name}.ready does not exist"

    def clear() -> dict[str, str]:
        Path(f"{name}.ready").unlink(missing_ok=True)
        return {}

    return Part(
        name=name, argv=("/bin/sh", "-c", script, name), env={"PATH": os.environ["PATH"]}, before_start=clear,
        **({"ready": probe} | fields),
    )  # fmt: skip


def order(place: Places) -> list[str]:
    """What the scripts have written, in time."""
    return (place.home / "order").read_text().splitlines()


async def admit_nothing() -> None:
    """Nothing to ask."""


def run(
    place: Places,
    *parts: Part,
    admit: Callable[[Supervisor], Awaitable[None]] | None = None,
    restarts_max: int = 0,
) -> tuple[int, Listener]:
    """Run parts; once they are admitted, *admit* decides, by default to stop. The exit status and what was told."""
    listener = Listener()
    subject = Supervisor(parts, place, listener, restarts_max=restarts_max, hide=["s3cr3t"])

    async def stop() -> None:
        subject.request_stop()

    def admission() -> Awaitable[None]:
        return stop() if admit is None else admit(subject)

    return asyncio.run(asyncio.wait_for(subject.run(admission), _PATIENCE_SECONDS)), listener


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that a process does."""
    async with asyncio.timeout(_PATIENCE_SECONDS):
        while not condition():
            await asyncio.sleep(0.01)


def test_parts_start_when_what_they_need_is_ready_and_stop_in_reverse(place: Places) -> None:
    """Asked to stop is no failure."""
    status, listener = run(place, part("a"), part("b", needs=("a",)), part("c", needs=("a", "b")))

    assert 0 == status
    assert ["a up", "b up", "c up", "c down", "b down", "a down"] == order(place)
    assert (["a", "b", "c"], ["c", "b", "a"]) == (listener.parts("ready"), listener.parts("stopped"))
    assert [] == listener.troubles


def test_a_task_is_done_before_what_needs_it(place: Places) -> None:
    """And is not stopped: it has ended."""
    task = part("migrations", "echo migrated >>order", kind=Kind.TASK, ready=None)

    status, listener = run(place, task, part("a", needs=("migrations",)))

    assert 0 == status
    assert ["migrated", "a up", "a down"] == order(place)
    assert (["migrations"], ["a"]) == (listener.parts("done"), listener.parts("stopped"))


@pytest.mark.parametrize("kind", [Kind.SERVICE, Kind.TASK])
def test_a_part_that_dies_while_starting_is_named_and_the_rest_is_stopped(place: Places, kind: Kind) -> None:
    """With how it died and its last words; what needs it never starts; no second try."""
    status, listener = run(
        place, part("a"), part("b", _DIES, kind=kind, needs=("a",)), part("c", needs=("b",)), restarts_max=3
    )

    [[line, *details]] = listener.troubles
    assert 1 == status
    assert line.startswith("b died with exit status 7 after ")
    assert line.endswith(f"while starting; the end of {place.log / 'b.log'}:")
    assert ["    last words of b with ***"] == details
    assert ["a up", "b up", "a down"] == order(place)


def test_a_part_that_is_killed_while_starting_is_named_with_the_signal(place: Places) -> None:
    """And one that said nothing has an empty log, which is said."""
    _, listener = run(place, part("a", "kill -KILL $$"))

    [[line, *details]] = listener.troubles
    assert line.startswith("a died by signal SIGKILL after ")
    assert ["    (empty)"] == details


def test_a_program_that_is_not_there_is_named(place: Places) -> None:
    """As the system says it."""
    absent = replace(part("a"), argv=("/nowhere/program",))

    status, listener = run(place, absent)

    [[line, *details]] = listener.troubles
    assert (1, True) == (status, line.startswith("a died with exit status 127"))
    assert ["    cannot run /nowhere/program: No such file or directory"] == details


def test_a_part_that_is_never_ready_is_named_with_its_last_answer(place: Places) -> None:
    """It runs, but it does not do what it is for."""
    slow = part("a", "echo busy; exec sleep 600", ready_within_seconds=0.3)

    status, listener = run(place, slow)

    [[line, *details]] = listener.troubles
    assert 1 == status
    assert line.startswith("a was not ready after 0 s: a.ready does not exist.")
    assert ["    busy"] == details


def test_a_probe_that_gives_up_ends_the_start(place: Places) -> None:
    """Waiting longer would not help."""

    async def probe() -> str | None:
        raise Trouble("a refuses the password.")

    status, listener = run(place, part("b"), part("a", ready=probe))

    assert (1, [["a refuses the password."]]) == (status, listener.troubles)


def test_an_admission_that_fails_stops_everything(place: Places) -> None:
    """No request passes: that is not running."""

    async def refuse(_: Supervisor) -> None:
        raise Trouble("No request passes.")

    status, listener = run(place, part("a"), admit=refuse)

    assert (1, [["No request passes."]]) == (status, listener.troubles)
    assert ["a up", "a down"] == order(place)


def test_a_death_during_admission_is_a_failed_start(place: Places) -> None:
    """Even where it could be started again later."""

    async def wait(_: Supervisor) -> None:
        (place.home / "die").touch()
        await asyncio.Event().wait()

    mortal = part("a", ': >"$0.ready"; until [ -e die ]; do sleep 0.01; done; exit 3')

    status, listener = run(place, mortal, admit=wait, restarts_max=3)

    assert 1 == status
    assert "a died with exit status 3" in listener.troubles[0][0]


def _killing(name: str, times: int) -> Callable[[Supervisor], Awaitable[None]]:
    """Kill a part as often, each time once it is ready again; then stop."""

    storms: list[asyncio.Task[None]] = []  # or the loop would forget it

    async def admit(subject: Supervisor) -> None:
        async def storm() -> None:
            await until(lambda: subject._phase == state.RUNNING)
            for _ in range(times):
                life = subject._lives[name]
                await until(lambda: life.state is supervisor.LifeState.READY and life.runs)
                assert life.process is not None
                pid = life.process.pid
                os.kill(pid, signal.SIGKILL)
                await until(lambda: life.process is not None and life.process.pid != pid)
            await until(lambda: subject._lives[name].state is supervisor.LifeState.READY)
            subject.request_stop()

        storms.append(asyncio.create_task(storm()))

    return admit


def test_a_part_that_dies_is_started_again_up_to_the_bound(place: Places) -> None:
    """Each time it is told; the others never notice."""
    status, listener = run(place, part("a"), part("b"), admit=_killing("b", 2), restarts_max=2)

    assert 0 == status
    assert ["and is started again (1 of 2)", "and is started again (2 of 2)"] == [
        lines[0].partition(" s ")[2].partition(";")[0] for lines in listener.troubles
    ]
    assert (1, 3) == (order(place).count("a up"), order(place).count("b up"))
    assert {"a": 0, "b": 2} == {one["name"]: one["restarts"] for one in state.read(place).document["parts"]}


def test_one_death_above_the_bound_is_given_up(place: Places) -> None:
    """Everything is stopped, in order, and the exit status says so."""
    status, listener = run(place, part("a"), part("b"), admit=_killing("b", 3), restarts_max=2)

    assert 1 == status
    assert "b died by signal SIGKILL" in listener.troubles[-1][0]
    assert "and had been started again 2 times within a minute" in listener.troubles[-1][0]
    assert ["a"] == listener.parts("stopped")


def test_without_restarts_the_first_death_is_given_up(place: Places) -> None:
    """`--restarts 0`."""
    status, listener = run(place, part("a"), admit=_killing("a", 1), restarts_max=0)

    assert 1 == status
    assert "and is not started again" in listener.troubles[-1][0]


def test_deaths_are_counted_within_a_window(place: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was long ago is forgotten."""
    monkeypatch.setattr(supervisor, "RESTARTS_WINDOW_SECONDS", 0.0)

    status, listener = run(place, part("a"), admit=_killing("a", 4), restarts_max=1)

    assert 0 == status
    assert 4 == len(listener.troubles)


def test_a_restart_that_fails_is_given_up(place: Places) -> None:
    """It died, and then was never ready again."""
    once = '[ -e lived ] && exec sleep 600; : >lived; : >"$0.ready"; until [ -e die ]; do sleep 0.01; done'

    async def die(_: Supervisor) -> None:
        (place.home / "die").touch()

    status, listener = run(place, part("a", once, ready_within_seconds=1.0), admit=die, restarts_max=3)

    assert 1 == status
    assert listener.troubles[-1][0].startswith("a was not ready after 1 s")


def test_a_part_that_does_not_stop_is_killed_when_its_grace_is_over(place: Places) -> None:
    """The next one is then stopped as well."""
    deaf = part("b", 'trap "" TERM; : >"$0.ready"; while :; do sleep 0.02; done', stop_grace_seconds=0.2)

    status, listener = run(place, part("a"), deaf)

    assert 0 == status
    assert (["b"], ["a"]) == (listener.parts("killed"), listener.parts("stopped"))


def test_asked_to_stop_twice_nothing_is_waited_for(place: Places) -> None:
    """Ctrl-C again."""
    deaf = part("a", 'trap "" TERM; : >"$0.ready"; while :; do sleep 0.02; done', stop_grace_seconds=600.0)

    async def stop_twice(subject: Supervisor) -> None:
        subject.request_stop()
        subject.request_stop()

    status, listener = run(place, deaf, admit=stop_twice)

    assert (0, ["a"]) == (status, listener.parts("killed"))


def test_what_a_part_has_started_ends_with_it(place: Places) -> None:
    """Each part leads a group of its own."""
    parent = part("a", 'sleep 600 & : >"$0.ready"; exec sleep 600')

    status, _ = run(place, parent)

    assert 0 == status
    assert wait_until(lambda: processes_in(place.home) == [], seconds=_PATIENCE_SECONDS)


def test_work_before_a_stop_is_done_for_what_was_ready(place: Places) -> None:
    """Such as Envoy's drain."""
    drained: list[str] = []

    async def drain() -> None:
        drained.append("a")

    run(place, part("a", before_stop=drain))
    run(place, part("b", "exec sleep 600", before_stop=drain, ready_within_seconds=0.2))

    assert ["a"] == drained


def test_the_state_says_what_became_of_each_part(place: Places) -> None:
    """For `status`, and for whoever comes after."""
    run(place, part("a"), part("m", "exit 0", kind=Kind.TASK, ready=None))

    document = state.read(place).document
    assert state.STOPPED == document["phase"]
    assert {"a": "stopped", "m": "done"} == {one["name"]: one["state"] for one in document["parts"]}
    assert {None} == {one["process"] for one in document["parts"]}


_SUPERVISOR = """
import asyncio, os, sys
from pathlib import Path
from control.laptop.parts import Part
from control.laptop.places import Places
from control.laptop.probes import file_exists
from control.laptop.reporter import Printer
from control.laptop.supervisor import Supervisor

part = Part(name="a", argv=("/bin/sh", "-c", ': >ready; exec sleep 600'), env=dict(os.environ), ready=file_exists(Path("ready")))
async def admit():
    print("admitted", flush=True)
asyncio.run(Supervisor([part], Places(Path.cwd()), Printer(out=sys.stderr)).run(admit))
"""


def test_parts_do_not_outlive_a_supervisor_that_is_killed(place: Places) -> None:
    """The kernel ends them; the state then says that nothing of it runs."""
    with subprocess.Popen(
        [sys.executable, "-c", _SUPERVISOR], cwd=place.home, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert b"admitted\n" == process.stdout.readline()
        recorded = state.read_process(state.read(place).parts[0]["process"])
        assert recorded is not None
        assert is_alive(recorded)

        process.kill()
        process.wait()

    assert wait_until(lambda: not is_alive(recorded), seconds=_PATIENCE_SECONDS)
    snapshot = state.read(place)
    assert (None, state.STOPPED, {}) == (snapshot.supervisor, snapshot.phase, snapshot.leftovers())


# --- Restarting, as somebody asked ----------------------------------------------------------------------


def heir_part(name: str, *, heir: Callable[[], Heir], ready: str) -> Part:
    """A part whose new life is ready by another sign than its first."""

    async def probe() -> str | None:
        current = ready if Path("asked").exists() else f"{name}.ready"
        return None if Path(current).exists() else f"{current} does not exist"

    return replace(part(name), heir=heir, ready=probe)


def test_a_part_without_an_heir_is_stopped_and_started_and_that_is_no_death(place: Places) -> None:
    """It was asked for: nothing is told as a trouble and nothing counted."""

    async def restart(subject: Supervisor) -> None:
        await asyncio.sleep(0)
        subject._phase = state.RUNNING
        await subject.restart("a")
        subject.request_stop()

    status, listener = run(place, part("a"), part("b", needs=("a",)), admit=restart)

    assert (0, []) == (status, listener.troubles)
    assert ["a up", "b up", "a down", "a up", "b down", "a down"] == order(place)


def heir(name: str) -> Heir:
    """A script that takes over."""
    return Heir(argv=("/bin/sh", "-c", _STAYS, name), env={"PATH": os.environ["PATH"]})


def test_an_heir_serves_before_the_old_one_ends_and_its_end_is_no_death(place: Places) -> None:
    """No moment without one; and a second heir is refused until then."""
    refused: list[str] = []

    async def restart(subject: Supervisor) -> None:
        subject._phase = state.RUNNING
        Path("asked").touch()
        await subject.restart("a")
        try:
            await subject.restart("a")
        except Trouble as trouble:
            refused.append(trouble.lines()[0])
        assert ["a up", "a1 up"] == order(place)
        [life] = subject._lives.values()
        assert life.forerunner is not None
        life.forerunner.terminate()
        await until(lambda: "handed over" in [event.get("what") for event in told])
        subject.request_stop()

    subject = Supervisor([heir_part("a", heir=lambda: heir("a1"), ready="a1.ready")], place, listener := Listener(), restarts_max=0)
    told = listener.events
    status = asyncio.run(asyncio.wait_for(subject.run(lambda: restart(subject)), _PATIENCE_SECONDS))

    assert (0, []) == (status, listener.troubles)
    assert ["a up", "a1 up", "a down", "a1 down"] == order(place)
    assert "still serves what it has" in refused[0]


@pytest.mark.parametrize("script", [_DIES, "exec sleep 600"], ids=["it dies", "it is never ready"])
def test_an_heir_that_does_not_come_to_serve_changes_nothing(place: Places, script: str) -> None:
    """The old one serves on, whoever asked is told why, and nothing of the new one is left."""
    refused: list[str] = []
    lost: list[bool] = []

    async def restart(subject: Supervisor) -> None:
        subject._phase = state.RUNNING
        Path("asked").touch()
        try:
            await subject.restart("a")
        except Trouble as trouble:
            refused.extend(trouble.lines())
        subject.request_stop()

    made = heir_part("a", heir=lambda: replace(heir("a1"), argv=("/bin/sh", "-c", script, "a1")), ready="a1.ready")
    status, listener = run(place, replace(made, ready_within_seconds=1.0, heir_lost=lambda: lost.append(True)), admit=restart)

    assert (0, [], [True]) == (status, listener.troubles, lost)
    assert "did not come to serve" in refused[0]
    assert ["a up", "a down"] == [line for line in order(place) if not line.startswith("a1")]


def test_what_is_asked_for_by_a_file_and_a_signal_is_answered_in_the_state(place: Places) -> None:
    """As `peaje restart` asks."""

    async def ask(subject: Supervisor) -> None:
        subject._phase = state.RUNNING
        state.ask_restart(place, {"part": "a", "id": "one"})
        os.kill(os.getpid(), signal.SIGUSR1)
        await until(lambda: (state.read(place).parts[0]["asked"] or {}).get("outcome") == "done")
        subject.request_stop()

    status, _ = run(place, part("a"), admit=ask)

    assert 0 == status
    assert ["a up", "a down", "a up", "a down"] == order(place)


def test_stopping_while_two_serve_ends_the_heir_before_the_one_it_asks(place: Places) -> None:
    """Envoy's heir dies badly of a forerunner that is gone."""

    async def restart(subject: Supervisor) -> None:
        subject._phase = state.RUNNING
        Path("asked").touch()
        await subject.restart("a")
        subject.request_stop()

    status, listener = run(place, heir_part("a", heir=lambda: heir("a1"), ready="a1.ready"), admit=restart)

    assert (0, []) == (status, listener.troubles)
    assert ["a up", "a1 up", "a1 down", "a down"] == order(place)


def test_a_part_that_dies_when_it_is_restarted_is_started_again_like_any_that_dies(place: Places) -> None:
    """Whoever asked hears that it did not come back at once."""
    refused: list[str] = []
    dies_once = f'[ -e asked ] && [ ! -e died ] && {{ : >died; exit 3; }}; {_STAYS}'

    async def ask(subject: Supervisor) -> None:
        await until(lambda: subject._phase == state.RUNNING)
        Path("asked").touch()
        try:
            await subject.restart("a")
        except Trouble as trouble:
            refused.extend(trouble.lines())
        await until(lambda: ["a up", "a down", "a up"] == order(place) and Path("a.ready").exists())
        subject.request_stop()

    asking: list[asyncio.Task[None]] = []

    async def admit(subject: Supervisor) -> None:
        asking.append(asyncio.create_task(ask(subject)))

    status, listener = run(place, part("a", dies_once), admit=admit, restarts_max=1)

    assert 0 == status
    assert "did not come back at once" in refused[0]
    assert "a died with exit status 3" in listener.troubles[0][0]
