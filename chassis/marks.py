# SPDX-License-Identifier: Apache-2.0
"""
Say which version of a document a process serves, so that whoever changed it can wait for all who read it.

A mark is a small file that its process keeps locked. The kernel lets go of the lock when the process ends, however it
ends: what nobody holds is nobody's word.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
from pathlib import Path
from typing import Final

#: Characters of a digest; enough that no two edits of one document share it.
_DIGEST_LENGTH: Final = 32


def digest(content: bytes) -> str:
    """Name a version of a document by what is in it."""
    return hashlib.sha256(content).hexdigest()[:_DIGEST_LENGTH]


class Mark:
    """What this process says of one document, in *directory*, under its own name; raises `OSError` where it cannot."""

    def __init__(self, directory: Path, *, process: str) -> None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        # The dot hides it until it is locked.
        self._descriptor, temporary = tempfile.mkstemp(dir=directory, prefix=f".{process}-{os.getpid()}-")
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        self.say(" " * _DIGEST_LENGTH)  # takes the room that it needs: a disk that is full now does not stop it later
        Path(temporary).rename(directory / Path(temporary).name.removeprefix("."))

    def say(self, version: str) -> None:
        """From now on this process serves *version*, a `digest`."""
        os.pwrite(self._descriptor, version.encode(), 0)


def lagging(directory: Path, version: str) -> list[str]:
    """Who lives and does not serve *version*, by name, sorted; marks of the dead are removed."""
    found = []
    for path in sorted(directory.glob("[!.]*")) if directory.is_dir() else []:
        try:
            with path.open("rb") as file:
                if _is_held(file.fileno()):
                    if file.read(_DIGEST_LENGTH) != version.encode():
                        found.append(path.name.rpartition("-")[0])
                else:
                    path.unlink()
        except FileNotFoundError:
            continue  # somebody else has removed it
    return found


def _is_held(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False
