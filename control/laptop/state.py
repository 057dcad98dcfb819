# SPDX-License-Identifier: Apache-2.0
"""
What the supervisor knows, on disk.

For `status` and `down`, and for the next `up`, which ends what a supervisor that was killed may have left.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chassis.secrets import write_private
from control.laptop.errors import Trouble
from control.laptop.places import Places
from control.laptop.processes import ProcessId, is_alive

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

#: Which part somebody wants restarted, below `run/`.
_ASKED = "asked.json"

#: Phases of the whole.
STARTING = "starting"
RUNNING = "running"
STOPPING = "stopping"
STOPPED = "stopped"

#: A supervisor that has just said goodbye still holds the lock for an instant.
_LOCK_PATIENCE_SECONDS = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The state file as it was read."""

    document: Mapping[str, Any]

    @property
    def supervisor(self) -> ProcessId | None:
        """The supervisor that wrote it, if it still runs."""
        process = read_process(self.document.get("supervisor"))
        return process if process is not None and is_alive(process) else None

    @property
    def phase(self) -> str:
        """What the supervisor was doing; `STOPPED` if it is gone."""
        return str(self.document.get("phase", STOPPED)) if self.supervisor else STOPPED

    @property
    def parts(self) -> list[Mapping[str, Any]]:
        """One mapping per part, in start order."""
        return list(self.document.get("parts", ()))

    def leftovers(self) -> dict[str, ProcessId]:
        """Parts that are alive although their supervisor is not, by name."""
        if self.supervisor is not None:
            return {}
        found = {str(part["name"]): read_process(part.get("process")) for part in self.parts}
        return {name: process for name, process in found.items() if process and is_alive(process)}


def read(places: Places) -> Snapshot:
    """The last state; an empty one if there is none or it cannot be read."""
    try:
        document = json.loads(places.state.read_text())
    except (OSError, ValueError):
        document = {}
    if not isinstance(document, dict) or document.get("boot") != _boot():
        document = {}  # start times count from the boot: an older one's name nobody
    return Snapshot(document=document)


def write(places: Places, document: Mapping[str, Any]) -> None:
    """Replace the state, whole."""
    write_private(places.state, json.dumps({"boot": _boot(), **document}, indent=1) + "\n")


def ask_restart(places: Places, asked: Mapping[str, str]) -> None:
    """Leave word for the supervisor, which reads it when it gets SIGUSR1."""
    write_private(places.run / _ASKED, json.dumps(asked))


def take_asked(places: Places) -> Mapping[str, str]:
    """What was asked last; nothing if that is no question."""
    path = places.run / _ASKED
    try:
        document = json.loads(path.read_text())
        path.unlink()
    except (OSError, ValueError):
        return {}
    return {str(key): str(value) for key, value in document.items()} if isinstance(document, dict) else {}


def process_document(process: ProcessId | None) -> Mapping[str, int] | None:
    """How a process is written down."""
    return None if process is None else {"pid": process.pid, "started_ticks": process.started_ticks}


@contextmanager
def hold_lock(places: Places) -> Iterator[None]:
    """Be the only supervisor of this state directory; raises `Trouble` if there is one."""
    descriptor = os.open(places.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + _LOCK_PATIENCE_SECONDS
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as exc:
                if time.monotonic() < deadline:
                    time.sleep(0.05)
                    continue
                pid = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
                raise Trouble(
                    f"Peaje is already running in {places.home} (pid {pid or 'unknown'}).",
                    mend="See `./peaje status`, stop it with `./peaje down`, or set PEAJE_HOME and the ports for a second one.",
                ) from exc
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _boot() -> str:
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


def read_process(document: object) -> ProcessId | None:
    """The reverse of `process_document`; None for what is not one."""
    if not isinstance(document, dict):
        return None
    try:
        return ProcessId(pid=int(document["pid"]), started_ticks=int(document["started_ticks"]))
    except (KeyError, TypeError, ValueError):
        return None
