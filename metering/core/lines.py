# SPDX-License-Identifier: Apache-2.0
"""
Read whole lines of the journal into entries, and name what is no entry.

Nothing of an exchange is skipped in silence: each run of bytes that is no record becomes a `Defect` with its
place and digest, and the rest goes on. Must not know files, Postgres or the time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from metering.core.journal import Entry, Malformed, Nameless, parse

#: Records that may be looked for behind a torn one in the same line; each look reads the line again.
_SALVAGE_TRIES_MAX = 64

#: How journal.lua begins a start record; the request's id follows.
_START = b'{"type":"Start","request_id":"'
_REQUEST_ID_LENGTH = 36

#: Bytes. Half a record that is kept to be put together with its other half.
TORN_BYTES_MAX = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Defect:
    """Bytes of a journal that are no record. Their content is kept nowhere, only its digest."""

    #: Of the first byte, from the start of the file.
    offset: int
    byte_count: int
    #: SHA-256 of the bytes; empty when they are not there to be digested.
    digest: str
    reason: str


def defect(data: bytes, *, offset: int, reason: str) -> Defect:
    """Describe *data*, found at *offset*."""
    return Defect(offset=offset, byte_count=len(data), digest=hashlib.sha256(data).hexdigest(), reason=reason)


def read(
    data: bytes, *, offset: int, torn: bytes = b"", is_over: Callable[[str], bool] | None = None
) -> tuple[list[Entry], list[Defect], bytes]:
    r"""
    Entries and defects of *data*, and what to give as *torn* with the lines that follow.

    *data* is whole lines that begin at *offset* of their file.

    A writer that died within a record leaves a piece without a line end, and the next writer's record
    follows in the same line: the piece is a defect, the record counts. Envoy writes its buffer in
    slices; in a journal of one file, from before the starts had their own, a start record may also
    stand within one of Envoy's, whose other half then is a line of its own: the halves are put together.

    >>> entries, [found], _ = read(b'{"type":"Sta\n\n', offset=100)
    >>> entries, found.offset, found.byte_count
    ([], 100, 12)
    """
    entries: list[Entry] = []
    defects: list[Defect] = []
    rows = data.split(b"\n")
    life = None
    for number, line in enumerate(rows):
        if line:
            if is_over is not None and number + 1 < len(rows) and _is_dull(line, life, is_over):
                offset += len(line) + 1
                continue
            try:
                entries.append(parse(line))
                life = entries[-1].epoch.encode()
            except Nameless:
                pass  # Envoy's own counters have them.
            except Malformed as exc:
                whole = _joined(torn, line)
                if whole is not None:
                    entries.append(whole)
                    # The first half may have been told of with an earlier batch.
                    if defects and defects[-1].digest == hashlib.sha256(torn).hexdigest():
                        defects.pop()
                    torn = b""
                else:
                    entry, size = _salvage(line)
                    defects.append(defect(line[:size], offset=offset, reason=str(exc)))
                    torn = line[:size] if entry is not None and size <= TORN_BYTES_MAX else torn
                    if entry is not None:
                        entries.append(entry)
        offset += len(line) + 1
    return entries, defects, torn


def _is_dull(line: bytes, life: bytes | None, is_over: Callable[[str], bool]) -> bool:
    """Whether *line* is a whole start record of the same *life* as the one before, of a request that is over."""
    if life is None or not line.startswith(_START) or not line.endswith(b"}"):
        return False
    id_end = len(_START) + _REQUEST_ID_LENGTH
    return b'"epoch":"%b"' % life in line and is_over(line[len(_START) : id_end].decode("ascii", "replace"))


def _joined(torn: bytes, line: bytes) -> Entry | None:
    """The record whose first half is *torn* and whose second is *line*, if they are that."""
    if not torn:
        return None
    try:
        return parse(torn + line)
    except Malformed:
        return None


def _salvage(line: bytes) -> tuple[Entry | None, int]:
    """The record at the end of a malformed line, and how many bytes before it are none."""
    start = line.find(b"{", 1)
    for _ in range(_SALVAGE_TRIES_MAX):
        if start < 0:
            break
        try:
            return parse(line[start:]), start
        except Malformed:
            start = line.find(b"{", start + 1)
    return None, len(line)
