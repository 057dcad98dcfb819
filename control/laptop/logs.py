# SPDX-License-Identifier: Apache-2.0
"""The parts' log files: one each, bounded, the one before kept; their ends are shown when a part dies."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

#: A part that writes more than this between two `up`s has its file cut (and the old text kept once).
LOG_BYTES_MAX = 32 * 1024 * 1024
TAIL_LINES = 20
_TAIL_BYTES = 16 * 1024
_LINE_CHARACTERS_MAX = 400


def rotate(path: Path) -> None:
    """Put the file of the last time aside, as `<name>.1`, and forget the one before."""
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_size:
            os.replace(path, old_name(path))


def open_for_appending(path: Path) -> int:
    """A descriptor for a part's output. Appending, so that `bound` may cut the file under it."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)


def bound(path: Path) -> bool:
    """Cut *path* if it has grown too large; its text is kept once. True if it was cut."""
    try:
        if path.stat().st_size <= LOG_BYTES_MAX:
            return False
        # The part holds the file open: copied and emptied, not renamed.
        shutil.copyfile(path, old_name(path))
        os.chmod(old_name(path), 0o600)
        os.truncate(path, 0)
    except OSError:
        return False
    return True


def tail(path: Path, *, since: int, hide: Iterable[str]) -> list[str]:
    """The last lines that were written after offset *since*; each of the secrets in *hide* is blotted out."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            start = max(min(since, size), size - _TAIL_BYTES)
            file.seek(start)
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    if start > since:
        # In the middle of a line, and perhaps of a secret, which would then not be known for one.
        text = text.partition("\n")[2]
    for secret in hide:
        text = text.replace(secret, "***")
    return [line[:_LINE_CHARACTERS_MAX] for line in text.splitlines()[-TAIL_LINES:]]


def old_name(path: Path) -> Path:
    """Where the file of the last time is kept."""
    return path.with_name(path.name + ".1")
