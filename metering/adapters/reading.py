# SPDX-License-Identifier: Apache-2.0
"""
Make of the next pieces of the journal what the ledger must change.

A journal has two streams: Envoy's own records, and the start records, which the workers write to a
file of their own. Both are read from where they were left, Envoy's first and the starts behind it:
a start is written before whatever follows of its exchange, so no end is judged before its start was
looked for. Far behind, when neither ends within a piece, they are read at the same pace by their
times; an end whose start comes later all the same has its row, and the start changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from chassis.contract import JOURNAL_END, STARTS_PATH
from metering.adapters.tail import BATCH_BYTES_MAX, STARTS_BYTES_MAX, Piece, Place, next_piece, starts_of
from metering.core import lines
from metering.core.fold import Batch, fold
from metering.core.journal import Entry
from metering.core.lines import Defect


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """Pieces that are written in one transaction, and what they say."""

    pieces: Sequence[Piece]
    batch: Batch
    #: Whatever was written before this was read is in it or in an earlier one.
    is_last: bool


class Reader:
    """Reads pieces in order; remembers what one of them says about the next."""

    def __init__(self) -> None:
        #: Half a record by file: in a journal of one file a start could stand within one of Envoy's records.
        self._torn: dict[str, bytes] = {}
        #: When the last start that was read was written.
        self._starts_until: datetime | None = None

    def next(self, live: Path, places: Mapping[str, Place]) -> Reading:
        """What follows *places* in the journal at *live*; at its end a reading without pieces."""
        ends = next_piece(live, places)
        entries, defects = ([], {}) if ends is None else self._entries(ends)
        behind = ends is not None and not ends.is_last
        starts, pieces, is_last = self._starts(
            live, places, defects, until=entries[-1].seen_at if behind and entries else None,
            over=frozenset(entry.request_id for entry in entries if entry.type == JOURNAL_END),
        )
        batch = fold(entries, starts=starts)
        batch.defects = defects
        return Reading(
            pieces=pieces if ends is None else [*pieces, ends], batch=batch, is_last=is_last and not behind
        )

    def read(self, piece: Piece) -> Batch:
        """What the ledger must change for *piece* alone, and its defects."""
        entries, defects = self._entries(piece)
        batch = fold([], starts=entries) if _is_of_starts(piece) else fold(entries)
        batch.defects = defects
        return batch

    def _starts(
        self, live: Path, places: Mapping[str, Place], defects: dict[str, list[Defect]], *, until: datetime | None,
        over: frozenset[str],
    ) -> tuple[list[Entry], list[Piece], bool]:
        """Start records up to the moment *until*, or all, but few of those whose exchange is *over*; and whether nothing is left."""
        entries: list[Entry] = []
        pieces: list[Piece] = []
        ahead, size = dict(places), 0
        while size < BATCH_BYTES_MAX:
            if until is not None and self._starts_until is not None and self._starts_until >= until:
                return entries, pieces, False
            piece = next_piece(starts_of(live), ahead, bytes_max=STARTS_BYTES_MAX)
            if piece is None:
                return entries, pieces, True
            found, wrong = self._entries(piece, over)
            entries += found
            for file_id, those in wrong.items():
                defects.setdefault(file_id, []).extend(those)
            pieces.append(piece)
            ahead[piece.place.file_id] = piece.place
            size += len(piece.data)
            self._starts_until = found[-1].started_at if found else self._starts_until
            if piece.is_last:
                return entries, pieces, True
        return entries, pieces, False

    def _entries(self, piece: Piece, over: frozenset[str] = frozenset()) -> tuple[list[Entry], dict[str, list[Defect]]]:
        file_id = piece.place.file_id
        if piece.endless:
            found = lines.defect(piece.data, offset=piece.start, reason="no line end in more than a line's length")
            return [], {file_id: [found]}
        entries, defects, torn = lines.read(
            piece.data, offset=piece.start, torn=self._torn.pop(file_id, b""), is_over=over.__contains__ if over else None
        )
        if not _is_of_starts(piece):
            self._torn = {file_id: torn} if torn else {}
        return entries, {file_id: defects} if defects else {}


def _is_of_starts(piece: Piece) -> bool:
    return piece.place.name.startswith(Path(STARTS_PATH).stem)


def read(piece: Piece) -> Batch:
    """What the ledger must change for *piece*, if nothing is known of the pieces before it."""
    return Reader().read(piece)
