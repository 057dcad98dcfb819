# SPDX-License-Identifier: Apache-2.0
"""
Read complete lines of the journal's files, old files before the live one, from remembered places.

A file is known by its first line, which holds an id minted once: not by its name, which rotation
changes, nor by its inode, which the next file may get. A place moves only when the caller has
committed what it read.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from chassis.contract import STARTS_PATH

#: One batch: large enough for COPY to pay, small enough to hold in memory many times over.
BATCH_BYTES_MAX = 1 << 22
#: Start records are taken in smaller pieces, so that they are hardly ever ahead of the ends that they are read with.
STARTS_BYTES_MAX = 1 << 18
#: A record has a few hundred bytes; a longer run without a newline is corruption.
LINE_BYTES_MAX = 1 << 16
#: Old files by our own rotation, and by a rotation of somebody else's that appends a number or a date.
_OLD_SUFFIX = r"(?:-(?P<number>[0-9]{1,12})\.jsonl|\.jsonl[.-][0-9]+)"


@dataclass(frozen=True, slots=True)
class Place:
    """How far a file of the journal has been read."""

    file_id: str
    name: str
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """Something is wrong with a whole file, not with a line; a person must look."""

    reason: str
    #: Where reading stood.
    place: Place


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Unread whole lines of one file."""

    start: int
    data: bytes
    #: Behind *data*.
    place: Place
    alarm: Alarm | None = None
    #: No line end in more than a line's length: *data* is no lines, however it ends.
    endless: bool = False
    #: When it was read, no whole line followed it, in its file or a newer one.
    is_last: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalFile:
    """One file of a journal as it is now."""

    path: Path
    file_id: str
    size: int


def starts_of(live: Path) -> Path:
    """The live file of start records that belongs to the journal at *live*."""
    return live.with_name(Path(STARTS_PATH).name)


def list_files(live: Path) -> list[Path]:
    """The files of the journal whose newest is at *live*: oldest first, *live* last; live may be missing."""
    pattern = re.compile(re.escape(live.stem) + _OLD_SUFFIX)
    old = []
    try:
        names = [path.name for path in live.parent.iterdir()]
    except FileNotFoundError:
        return []
    for name in names:
        matched = pattern.fullmatch(name)
        if matched is not None:
            old.append((int(matched["number"] or 0), _modified(live.parent / name), name))
    return [*(live.parent / name for _, _, name in sorted(old)), *([live] if _is_there(live) else [])]


def look(live: Path) -> list[JournalFile]:
    """The journal's files that hold at least one whole line, in reading order: start records first."""
    paths = [*list_files(starts_of(live)), *list_files(live)]
    return [found for found in map(_identified, paths) if found is not None]


def next_piece(live: Path, places: Mapping[str, Place], *, bytes_max: int = BATCH_BYTES_MAX) -> Piece | None:
    """
    The next unread lines, from the oldest of the files whose newest is at *live*; None if there are none.

    A torn last line stays for later. A file that is shorter than its place, or no longer has a
    line end before it, was changed under us: it is read again from its start, with an alarm.
    """
    paths = list_files(live)
    for path in paths:
        file = _open(path)
        if file is None:
            continue
        with file:
            piece = _piece(file, path, places, bytes_max)
        if piece is not None:
            return replace(piece, is_last=piece.is_last and path == paths[-1])
    return None


def vanished(live: Path, places: Mapping[str, Place]) -> list[Place]:
    """Places in files that are no longer there, although nobody has said that they were done with."""
    present = {found.file_id for found in look(live)}
    return [place for file_id, place in places.items() if file_id not in present]


def torn_tail(file: JournalFile, place: Place) -> Piece | None:
    """What follows *place* in a file that nobody writes to any more: a line that will never end."""
    if place.offset >= file.size:
        return None
    with file.path.open("rb") as opened:
        opened.seek(place.offset)
        data = opened.read(LINE_BYTES_MAX)
    return Piece(start=place.offset, data=data, place=Place(file.file_id, file.path.name, file.size), endless=True)


def _piece(file: BinaryIO, path: Path, places: Mapping[str, Place], bytes_max: int) -> Piece | None:
    file_id = _identity(file)
    if file_id is None:
        return None
    place = places.get(file_id)
    offset, alarm = place.offset if place else 0, None
    if place and place.offset > os.fstat(file.fileno()).st_size:
        offset, alarm = 0, Alarm(reason="the file was truncated", place=place)
    elif place and offset and os.pread(file.fileno(), 1, offset - 1) != b"\n":
        offset, alarm = 0, Alarm(reason="the file was rewritten", place=place)
    data, fault = _read(file, offset, bytes_max)
    last = data.rfind(b"\n")
    if last >= 0:
        behind, is_last = Place(file_id, path.name, offset + last + 1), fault is None and len(data) < bytes_max
        return Piece(start=offset, data=data[:last], place=behind, alarm=alarm, is_last=is_last)
    if fault is not None:
        raise fault
    if len(data) > LINE_BYTES_MAX:
        end = _line_end(file, offset + len(data))
        if end is not None:
            return Piece(start=offset, data=data, place=Place(file_id, path.name, end + 1), alarm=alarm, endless=True)
    return None


def _read(file: BinaryIO, offset: int, bytes_max: int) -> tuple[bytes, OSError | None]:
    """The bytes from *offset* on, and what the disk said where they end if that is neither the bound nor the file's end."""
    data = b""
    while len(data) < bytes_max:
        try:
            more = os.pread(file.fileno(), bytes_max - len(data), offset + len(data))
        except OSError as exc:
            return data, exc
        if not more:
            break
        data = data + more if data else more
    return data, None


def _line_end(file: BinaryIO, offset: int) -> int | None:
    """Where the line that goes on at *offset* ends, None if it does not."""
    file.seek(offset)
    while data := file.read(BATCH_BYTES_MAX):
        found = data.find(b"\n")
        if found >= 0:
            return offset + found
        offset += len(data)
    return None


def _identity(file: BinaryIO) -> str | None:
    """Name a file by its first line; None while that is not complete."""
    first = os.pread(file.fileno(), LINE_BYTES_MAX, 0)
    line, end, _ = first.partition(b"\n")
    if not end and len(first) < LINE_BYTES_MAX:
        return None
    return hashlib.sha256(line).hexdigest()[:32]


def _identified(path: Path) -> JournalFile | None:
    file = _open(path)
    if file is None:
        return None
    with file:
        file_id = _identity(file)
        size = os.fstat(file.fileno()).st_size
    return None if file_id is None else JournalFile(path=path, file_id=file_id, size=size)


def _open(path: Path) -> BinaryIO | None:
    """A file that may be renamed or removed at this very moment; None if it just was, or is no regular file."""
    try:
        return path.open("rb") if stat.S_ISREG(path.stat().st_mode) else None
    except FileNotFoundError:
        return None


def _is_there(path: Path) -> bool:
    # Unlike `Path.exists`, which of some versions of Python takes a disk that fails for a file that is gone.
    try:
        path.stat()
    except FileNotFoundError:
        return False
    return True


def _modified(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0
