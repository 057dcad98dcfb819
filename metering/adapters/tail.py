# SPDX-License-Identifier: Apache-2.0
"""
Read complete lines from a growing file, from a remembered place.

The place is (file id, byte offset); it moves only when the caller has committed what it read.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

#: One batch: large enough for COPY to pay, small enough to hold in memory many times over.
BATCH_BYTES_MAX = 1 << 20
#: A record has a few hundred bytes; a longer run without a newline is corruption.
LINE_BYTES_MAX = 1 << 16


@dataclass(frozen=True, slots=True)
class Place:
    """How far a journal has been read."""

    file_id: str
    offset: int


class Corrupt(Exception):
    """The journal holds something that is no line; a person must look."""


def read_batch(path: Path, place: Place | None) -> tuple[list[bytes], Place | None]:
    """
    Complete lines after *place* and the place behind them; nothing and the same place at the end.

    A torn last line stays for later. Another file at *path* (another id, or shorter than the
    place) is read from its start.
    """
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            file_id = f"{status.st_dev}:{status.st_ino}"
            offset = place.offset if place and place.file_id == file_id and place.offset <= status.st_size else 0
            file.seek(offset)
            data = file.read(BATCH_BYTES_MAX)
    except FileNotFoundError:
        return [], place
    last = data.rfind(b"\n")
    if last < 0:
        if len(data) > LINE_BYTES_MAX:
            raise Corrupt(f"{path}: no line end in {len(data)} bytes from offset {offset}")
        return [], Place(file_id, offset)
    return data[:last].split(b"\n"), Place(file_id, offset + last + 1)
