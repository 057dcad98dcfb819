# SPDX-License-Identifier: Apache-2.0
"""What processes have cost so far, from /proc."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import Final

_TICKS: Final = os.sysconf("SC_CLK_TCK")


def descendants(pid: int) -> list[int]:
    """All living processes below one, itself left out."""
    found, waiting = [], [pid]
    while waiting:
        try:
            tasks = list(Path(f"/proc/{waiting.pop()}/task").iterdir())
            children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
        except (OSError, ValueError):
            continue
        found += children
        waiting += children
    return found


def cpu_seconds(pid: int) -> float:
    """CPU time of a process and all its living descendants."""
    return sum(max(_ticked(one), _scheduled(one)) for one in (pid, *descendants(pid)))


def _ticked(pid: int) -> float:
    """With the threads that have ended, and to a tick of mostly ten milliseconds."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _TICKS


def _scheduled(pid: int) -> float:
    """To the nanosecond, of the threads that there are; nothing where the kernel does not say."""
    try:
        return sum(int((task / "schedstat").read_text().split()[0]) for task in Path(f"/proc/{pid}/task").iterdir()) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0


def resident_mib(pid: int) -> float:
    """Memory of one process; 0 if it is gone."""
    return _status_mib(pid, "VmRSS")


def anonymous_mib(pid: int) -> float:
    """The same without files and what it shares with others: what it has allocated."""
    return _status_mib(pid, "RssAnon")


def _status_mib(pid: int, what: str) -> float:
    try:
        found = re.search(rf"{what}:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0.0
    return int(found[1]) / 1024 if found else 0.0


def cpu_nanoseconds(pid: int) -> int:
    """CPU time of the living threads of a process and of all its living descendants, as the scheduler counts it: finer than a tick."""
    total = 0
    for one in (pid, *descendants(pid)):
        try:
            tasks = list(Path(f"/proc/{one}/task").iterdir())
        except OSError:
            continue
        for task in tasks:
            with contextlib.suppress(OSError):
                total += int((task / "schedstat").read_text().split()[0])
    return total
