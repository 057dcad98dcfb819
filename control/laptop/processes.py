# SPDX-License-Identifier: Apache-2.0
"""
What Linux says about processes and ports: alive, since when, how much they used, who listens.

A pid alone names nobody: it may have been given to another process since. With the
start time that the kernel keeps, it names one process for good.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from control.laptop.errors import Trouble

PROC = Path("/proc")
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_TCP_LISTEN = "0A"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessId:
    """One process, for good: its pid and when it started (clock ticks since boot)."""

    pid: int
    started_ticks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a process and all its descendants have used."""

    cpu_seconds: float
    rss_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PortNeed:
    """A TCP port on loopback that must be free: its number, what for, which option changes it."""

    number: int
    purpose: str
    option: str


def identify(pid: int) -> ProcessId | None:
    """The process that has *pid* now; None if there is none or it is only waiting to be reaped."""
    fields = _stat_fields(pid)
    if fields is None or fields[0] in ("Z", "X"):
        return None
    return ProcessId(pid=pid, started_ticks=int(fields[19]))


def is_alive(process: ProcessId) -> bool:
    """Whether that very process still runs."""
    return identify(process.pid) == process


def read_usage(pids: Iterable[int]) -> dict[int, Usage]:
    """The usage of each of *pids* with its descendants, by one pass over /proc."""
    children: dict[int, list[int]] = {}
    own: dict[int, Usage] = {}
    for entry in PROC.iterdir():
        fields = _stat_fields(int(entry.name)) if entry.name.isdigit() else None
        if fields is None:
            continue
        pid = int(entry.name)
        children.setdefault(int(fields[1]), []).append(pid)
        own[pid] = Usage(
            cpu_seconds=(int(fields[11]) + int(fields[12])) / _TICKS_PER_SECOND,
            rss_bytes=int(fields[21]) * _PAGE_BYTES,
        )
    answer = {}
    for root in pids:
        family, todo = [], [root]
        while todo:
            pid = todo.pop()
            if pid in own:
                family.append(own[pid])
            todo.extend(children.get(pid, ()))
        answer[root] = Usage(
            cpu_seconds=sum(usage.cpu_seconds for usage in family),
            rss_bytes=sum(usage.rss_bytes for usage in family),
        )
    return answer


def end(processes: Iterable[ProcessId], *, grace_seconds: float) -> list[ProcessId]:
    """Ask each of *processes* to end, then make it; returns those that were alive."""
    alive = [process for process in processes if is_alive(process)]
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in alive:
            if is_alive(process):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(process.pid, number)
        wait_until(lambda: not any(map(is_alive, alive)), seconds=grace_seconds)
    return alive


def wait_until(condition: Callable[[], bool], *, seconds: float) -> bool:
    """Look every 50 ms until *condition* holds; False if it did not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_free(port: int) -> bool:
    """Whether *port* of loopback can be listened on; PermissionError if not by this user."""
    with socket.socket() as probe:
        # As the servers do: connections of an earlier run in TIME_WAIT do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
            probe.listen(1)
        except OSError as exc:
            if exc.errno == errno.EADDRINUSE:
                return False
            raise
    return True


def check_ports(needs: Iterable[PortNeed]) -> None:
    """Raise `Trouble` that names the first port that cannot be had, and who holds it."""
    wanted: dict[int, str] = {}
    for need in needs:
        if need.number in wanted:
            raise Trouble(
                f"Port {need.number} is wanted twice: for {wanted[need.number]} and for {need.purpose}.",
                mend=f"Choose another one with {need.option}.",
            )
        wanted[need.number] = need.purpose
        try:
            if is_free(need.number):
                continue
        except PermissionError as exc:
            raise Trouble(
                f"Port {need.number} ({need.purpose}) may only be used by root.",
                mend=f"Choose one above 1023 with {need.option}.",
            ) from exc
        holder = port_holder(need.number)
        raise Trouble(
            f"Port {need.number} ({need.purpose}) is taken{f' by {holder}' if holder else ''}.",
            mend=f"Stop that, or choose another port with {need.option}.",
        )


def port_holder(port: int) -> str | None:
    """`pid 123 (name)` of who listens on *port*, as far as this user may see it."""
    inodes = {f"socket:[{inode}]" for inode in _listening_inodes(port)}
    if not inodes:
        return None
    for entry in PROC.iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            for descriptor in (entry / "fd").iterdir():
                if os.readlink(descriptor) in inodes:
                    return f"pid {entry.name} ({(entry / 'comm').read_text().strip()})"
    return None


def _listening_inodes(port: int) -> set[str]:
    inodes = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in (PROC / "net" / table).read_text().splitlines()[1:]:
                columns = line.split()
                if columns[3] == _TCP_LISTEN and int(columns[1].rpartition(":")[2], 16) == port:
                    inodes.add(columns[9])
    return inodes


def _stat_fields(pid: int) -> list[str] | None:
    """The fields of /proc/<pid>/stat from the state on; the name before it may hold spaces and brackets."""
    try:
        text = (PROC / str(pid) / "stat").read_text()
    except OSError:
        return None
    return text.rpartition(")")[2].split()
