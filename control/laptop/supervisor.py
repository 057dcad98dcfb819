# SPDX-License-Identifier: Apache-2.0
"""
Start parts in order, watch them, start them again when they die, stop them in reverse order.

Knows nothing of what the parts are. One thread, one event loop: Linux sends a part's
parent-death signal when the *thread* that started it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from control.laptop import logs, reporter, state
from control.laptop.errors import Trouble
from control.laptop.parts import Heir, Kind, Part
from control.laptop.places import Places
from control.laptop.processes import ProcessId, identify

#: A part may die and be started again this often…
RESTARTS_MAX_DEFAULT = 3
#: …within this time.
RESTARTS_WINDOW_SECONDS = 60.0

_PROBE_EVERY_SECONDS = 0.05
_LOGS_LOOKED_AT_EVERY_SECONDS = 30.0
_LAUNCHER = Path(__file__).with_name("launch.py")


class LifeState(enum.StrEnum):
    """Where a part is in its life, as `status` shows it."""

    WAITING = "waiting"
    STARTING = "starting"
    READY = "ready"
    DONE = "done"
    DIED = "died"
    STOPPING = "stopping"
    STOPPED = "stopped"


@dataclass(slots=True)
class Life:
    """A part and its present process."""

    part: Part
    log: Path
    state: LifeState = LifeState.WAITING
    process: asyncio.subprocess.Process | None = None
    identity: ProcessId | None = None
    since: float = field(default_factory=time.time)
    started: float = 0.0
    log_offset: int = 0
    restarts: int = 0
    deaths: deque[float] = field(default_factory=deque)
    last_answer: str = "it was never asked"
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    restarting: asyncio.Task[None] | None = None
    #: The process that the present one took over from, while it serves what it has.
    forerunner: asyncio.subprocess.Process | None = None
    #: The last restart that somebody asked for: its id, and how it went once it is over.
    asked: Mapping[str, str] | None = None

    @property
    def runs(self) -> bool:
        """Whether there is a process that has not ended."""
        return self.process is not None and self.process.returncode is None


@dataclass(frozen=True, slots=True, kw_only=True)
class Death:
    """A part has ended without being asked to."""

    life: Life
    status: int


class StopRequested(Exception):
    """Somebody asked us to stop."""


class Supervisor:
    """Runs one installation's parts from start to stop."""

    def __init__(
        self,
        parts: Sequence[Part],
        places: Places,
        out: reporter.Reporter,
        *,
        restarts_max: int = RESTARTS_MAX_DEFAULT,
        facts: Mapping[str, Any] | None = None,
        hide: Sequence[str] = (),
    ) -> None:
        self._lives = {part.name: Life(part=part, log=places.log / f"{part.name}.log") for part in parts}
        self._places = places
        self._out = out
        self._restarts_max = restarts_max
        self._facts = dict(facts or {})
        self._hide = tuple(hide)
        self._events: asyncio.Queue[Death | Trouble | StopRequested] = asyncio.Queue()
        self._force = asyncio.Event()
        self._stop_asked = False
        self._asking: list[asyncio.Task[None]] = []
        self._phase = state.STARTING
        self._since = time.time()

    async def run(self, admit: Callable[[], Awaitable[None]]) -> int:
        """
        Start everything, call *admit*, watch until asked to stop or until a part is given up.

        Whatever happens, everything is stopped before this returns the exit status: 0 if asked to
        stop, 1 if something failed.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self.request_stop)
        loop.add_signal_handler(signal.SIGUSR1, self._hear_asked)
        housekeeping = asyncio.create_task(self._keep_logs_bounded())
        try:
            await self._unless_something_happens(self._start_all())
            await self._unless_something_happens(admit())
            self._phase = state.RUNNING
            self._write_state()
            await self._watch()
        except StopRequested:
            return 0
        except Trouble as trouble:
            self._out.tell({"kind": reporter.TROUBLE, "lines": trouble.lines()})
            return 1
        finally:
            housekeeping.cancel()
            await self._stop_all()
        return 0

    def request_stop(self) -> None:
        """Stop in order; asked a second time, at once."""
        if self._stop_asked:
            self._force.set()
        self._stop_asked = True
        self._events.put_nowait(StopRequested())

    # --- Restarting, as somebody asked ------------------------------------------------------

    def _hear_asked(self) -> None:
        asked = state.take_asked(self._places)
        life = self._lives.get(asked.get("part", ""))
        self._asking = [task for task in self._asking if not task.done()]
        if life is not None:
            self._asking.append(asyncio.create_task(self._answer(life, asked)))

    async def _answer(self, life: Life, asked: Mapping[str, str]) -> None:
        """Restart a part and say in the state how it went: whoever asked reads it there."""
        try:
            await self.restart(life.part.name)
        except Trouble as trouble:
            life.asked = {**asked, "outcome": "failed", "says": "\n".join(trouble.lines())}
        else:
            life.asked = {**asked, "outcome": "done", "says": ""}
        self._write_state()

    async def restart(self, name: str) -> None:
        """Give a part a new life: one that takes over where the part can have it, else after the old one has ended. Raises `Trouble`."""
        life = self._lives[name]
        if life.part.kind is Kind.TASK or life.state is not LifeState.READY or self._phase != state.RUNNING:
            raise Trouble(f"{name} cannot be restarted: it is {life.state}.", mend="./peaje status shows all parts.")
        if life.part.heir is not None:
            await self._hand_over(life)
            return
        life.settled.clear()
        await self._stop(life)
        self._end_group(life)
        # From here on it is as if it had died: what goes wrong is answered as a death is.
        life.restarting = asyncio.create_task(self._restart(life))
        await asyncio.wait({life.restarting})
        if life.state is not LifeState.READY:
            raise Trouble(f"{name} did not come back at once: it is {life.state}.", mend="./peaje status shows what becomes of it.")

    async def _hand_over(self, life: Life) -> None:
        part, old = life.part, life.process
        assert part.heir is not None
        assert old is not None
        if life.forerunner is not None and life.forerunner.returncode is None:
            raise Trouble(
                f"The {part.name} before this one still serves what it has (pid {life.forerunner.pid}).",
                mend="It ends in its time; ./peaje down and up wait for nobody.",
            )
        heir = await asyncio.to_thread(part.heir)
        life.forerunner = old
        await self._spawn(life, heir)
        new = life.process
        assert new is not None
        ended = asyncio.create_task(new.wait())
        ready = asyncio.create_task(self._until_ready(life))
        await asyncio.wait({ended, ready}, timeout=part.ready_within_seconds, return_when=asyncio.FIRST_COMPLETED)
        is_ready = ready.done() and not ready.cancelled() and ready.exception() is None and new.returncode is None
        for task in (ended, ready):
            task.cancel()
        await asyncio.gather(ended, ready, return_exceptions=True)
        if not is_ready:
            self._take_back(life, old, new)
            raise Trouble(
                f"The new {part.name} did not come to serve: {life.last_answer}. The old one serves on.",
                mend=f"The end of {life.log}:", details=self._tail(life),
            )  # fmt: skip
        self._set_state(life, LifeState.READY)
        self._tell_part(life, "restarted", seconds=time.monotonic() - life.started)
        self._asking.append(asyncio.create_task(self._see_off(life, old)))

    def _take_back(self, life: Life, old: asyncio.subprocess.Process, new: asyncio.subprocess.Process) -> None:
        life.process, life.identity, life.forerunner = old, identify(old.pid), None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(new.pid, signal.SIGKILL)
        if life.part.heir_lost is not None:
            life.part.heir_lost()
        self._set_state(life, LifeState.READY)

    async def _see_off(self, life: Life, old: asyncio.subprocess.Process) -> None:
        """Wait for the end of a life that was taken over from, which its heir brings about."""
        await old.wait()
        self._tell_part(life, "handed over", seconds=time.monotonic() - life.started)
        if life.forerunner is old:
            life.forerunner = None

    async def _end_forerunner(self, life: Life) -> None:
        old = life.forerunner
        if old is None:
            return
        with contextlib.suppress(ProcessLookupError):
            old.send_signal(life.part.stop_signal)
        await _within(old.wait(), life.part.stop_grace_seconds)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(old.pid, signal.SIGKILL)
        await old.wait()
        if life.forerunner is old:
            life.forerunner = None

    # --- Starting ------------------------------------------------------------------------

    async def _start_all(self) -> None:
        for life in self._lives.values():
            logs.rotate(life.log)
        tasks = [asyncio.create_task(self._start_in_turn(life)) for life in self._lives.values()]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _start_in_turn(self, life: Life) -> None:
        for name in life.part.needs:
            await self._lives[name].settled.wait()
        await self._start(life)
        life.settled.set()

    async def _start(self, life: Life) -> None:
        part = life.part
        await self._spawn(life)
        try:
            async with asyncio.timeout(part.ready_within_seconds):
                await self._until_ready(life)
                if part.after_ready is not None:
                    await part.after_ready()
        except TimeoutError as exc:
            raise Trouble(
                f"{part.name} was not ready after {part.ready_within_seconds:.0f} s: {life.last_answer}.",
                mend=f"The end of {life.log}:",
                details=self._tail(life),
            ) from exc
        done = part.kind is Kind.TASK
        self._set_state(life, LifeState.DONE if done else LifeState.READY)
        self._tell_part(life, "done" if done else "ready", seconds=time.monotonic() - life.started)

    async def _spawn(self, life: Life, heir: Heir | None = None) -> None:
        part = life.part
        if heir is None:
            heir = Heir(argv=part.argv, env={**part.env, **(part.before_start() if part.before_start is not None else {})})
        account = "-" if part.account is None else f"{part.account.uid}:{part.account.gid}"
        log = logs.open_for_appending(life.log)
        try:
            life.log_offset = os.fstat(log).st_size
            life.started = time.monotonic()
            life.process = await asyncio.create_subprocess_exec(
                sys.executable, "-I", "-S", str(_LAUNCHER),
                str(int(part.stop_signal)), str(os.getpid()), account, *heir.argv,
                env=heir.env,
                cwd=self._places.home,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # a terminal's Ctrl-C is for us, who stop the parts in order
            )
        except OSError as exc:
            raise Trouble(f"{part.name} cannot be started: {exc}.") from exc
        finally:
            os.close(log)
        life.identity = identify(life.process.pid)
        self._set_state(life, LifeState.STARTING)
        asyncio.create_task(self._await_end(life, life.process))  # noqa: RUF006 - ends with the process

    async def _await_end(self, life: Life, process: asyncio.subprocess.Process) -> None:
        status = await process.wait()
        if life.process is not process or life.state in (LifeState.STOPPING, LifeState.STOPPED):
            return
        if life.state is LifeState.STARTING and life.forerunner is not None and life.forerunner.returncode is None:
            return  # the one before it serves on; whoever waits for this one says so
        if life.part.kind is Kind.TASK and status == 0:
            return
        life.settled.clear()
        self._set_state(life, LifeState.DIED)
        self._events.put_nowait(Death(life=life, status=status))

    async def _until_ready(self, life: Life) -> None:
        process, probe = life.process, life.part.ready
        assert process is not None
        if life.part.kind is Kind.TASK or probe is None:
            life.last_answer = "it has not ended"
            if await process.wait() != 0:
                await asyncio.Event().wait()  # reported as a death, which ends this
            return
        while True:
            answer = await probe()
            if answer is None and life.runs:
                return
            life.last_answer = answer or "it has ended"
            await asyncio.sleep(_PROBE_EVERY_SECONDS)

    # --- Watching --------------------------------------------------------------------------

    async def _unless_something_happens(self, work: Awaitable[None]) -> None:
        """Do *work*; a death, a failure or a request to stop meanwhile ends it and is raised."""
        task = asyncio.ensure_future(work)
        getter = asyncio.ensure_future(self._events.get())
        try:
            await asyncio.wait({task, getter}, return_when=asyncio.FIRST_COMPLETED)
            if not getter.done():
                await task
                return
            match getter.result():
                case Death() as death:
                    raise self._obituary(death, "while starting")
                case exception:
                    raise exception
        finally:
            for pending in (task, getter):
                pending.cancel()
            await asyncio.gather(task, getter, return_exceptions=True)

    async def _watch(self) -> None:
        while True:
            match await self._events.get():
                case Death() as death:
                    self._start_again(death)
                case exception:
                    raise exception

    def _start_again(self, death: Death) -> None:
        life = death.life
        if life.restarting is not None:
            life.restarting.cancel()
        now = time.monotonic()
        while life.deaths and now - life.deaths[0] > RESTARTS_WINDOW_SECONDS:
            life.deaths.popleft()
        if len(life.deaths) >= self._restarts_max:
            raise self._obituary(
                death,
                "and is not started again"
                if not self._restarts_max
                else f"and had been started again {len(life.deaths)} times within a minute",
            )
        life.deaths.append(now)
        life.restarts += 1
        report = self._obituary(death, f"and is started again ({len(life.deaths)} of {self._restarts_max})")
        self._out.tell({"kind": reporter.TROUBLE, "lines": report.lines()})
        life.restarting = asyncio.create_task(self._restart(life))

    async def _restart(self, life: Life) -> None:
        try:
            await self._start(life)
            life.settled.set()
        except Trouble as trouble:
            self._events.put_nowait(trouble)

    def _obituary(self, death: Death, circumstances: str) -> Trouble:
        life, status = death.life, death.status
        how = f"with exit status {status}" if status >= 0 else f"by signal {_signal_name(-status)}"
        age = time.monotonic() - life.started
        return Trouble(
            f"{life.part.name} died {how} after {age:.1f} s {circumstances}; the end of {life.log}:",
            details=self._tail(life) or ["(empty)"],
        )

    def _tail(self, life: Life) -> list[str]:
        return logs.tail(life.log, since=life.log_offset, hide=self._hide)

    # --- Stopping --------------------------------------------------------------------------

    async def _stop_all(self) -> None:
        self._phase = state.STOPPING
        for task in self._asking:
            task.cancel()
        await asyncio.gather(*self._asking, return_exceptions=True)
        for life in self._lives.values():
            if life.restarting is not None:
                life.restarting.cancel()
                await asyncio.gather(life.restarting, return_exceptions=True)
        for life in reversed(self._lives.values()):
            if life.runs:
                self._out.tell({"kind": reporter.WAITING, "names": [f"stopping {life.part.name}"]})
                await self._stop(life)
            elif life.state not in (LifeState.WAITING, LifeState.DONE):
                self._set_state(life, LifeState.STOPPED)
            await self._end_forerunner(life)
            self._end_group(life)
        self._phase = state.STOPPED
        self._write_state()

    async def _stop(self, life: Life) -> None:
        part, process = life.part, life.process
        assert process is not None
        was_ready = life.state is LifeState.READY
        self._set_state(life, LifeState.STOPPING)
        began = time.monotonic()
        if part.before_stop is not None and was_ready:
            await self._unless_forced(part.before_stop())
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(part.stop_signal)
        await self._unless_forced(_within(process.wait(), part.stop_grace_seconds))
        what = "stopped"
        if process.returncode is None:
            what = "killed"
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        self._set_state(life, LifeState.STOPPED)
        self._tell_part(life, what, seconds=time.monotonic() - began)

    async def _unless_forced(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.create_task(work)
        force = asyncio.create_task(self._force.wait())
        await asyncio.wait({task, force}, return_when=asyncio.FIRST_COMPLETED)
        for pending in (task, force):
            pending.cancel()
        await asyncio.gather(task, force, return_exceptions=True)

    def _end_group(self, life: Life) -> None:
        """End what the part itself had started and left: each part leads a process group of its own."""
        if life.process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(life.process.pid, signal.SIGKILL)

    # --- Telling ---------------------------------------------------------------------------

    def _tell_part(self, life: Life, what: str, *, seconds: float) -> None:
        self._out.tell({"kind": reporter.PART, "name": life.part.name, "what": what, "seconds": seconds})
        if self._phase == state.STARTING:
            starting = [
                name for name, other in self._lives.items() if other.state is LifeState.STARTING
            ]
            self._out.tell({"kind": reporter.WAITING, "names": starting})

    def _set_state(self, life: Life, new: LifeState) -> None:
        life.state = new
        life.since = time.time()
        self._write_state()

    def _write_state(self) -> None:
        state.write(
            self._places,
            {
                **self._facts,
                "home": str(self._places.home),
                "phase": self._phase,
                "since": self._since,
                "supervisor": state.process_document(identify(os.getpid())),
                "parts": [
                    {
                        "name": life.part.name,
                        "state": life.state,
                        "since": life.since,
                        "restarts": life.restarts,
                        "ports": dict(life.part.ports),
                        "process": state.process_document(life.identity if life.runs else None),
                        "log": str(life.log),
                        "asked": life.asked,
                    }
                    for life in self._lives.values()
                ],
            },
        )

    async def _keep_logs_bounded(self) -> None:
        while True:
            await asyncio.sleep(_LOGS_LOOKED_AT_EVERY_SECONDS)
            for life in self._lives.values():
                if logs.bound(life.log):
                    life.log_offset = 0


async def _within(work: Awaitable[Any], seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await work


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)
