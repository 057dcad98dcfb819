# SPDX-License-Identifier: Apache-2.0
"""Make of a piece of the journal what the ledger must change."""

from __future__ import annotations

from metering.adapters.tail import Piece
from metering.core import lines
from metering.core.fold import Batch, fold


class Reader:
    """Reads pieces in order; remembers half a record from one piece of a file to the next."""

    def __init__(self) -> None:
        self._torn: dict[str, bytes] = {}

    def read(self, piece: Piece) -> Batch:
        """What the ledger must change for *piece*, and its defects."""
        if piece.endless:
            found = lines.defect(piece.data, offset=piece.start, reason="no line end in more than a line's length")
            return Batch(defects=[found])
        file_id = piece.place.file_id
        entries, defects, torn = lines.read(piece.data, offset=piece.start, torn=self._torn.pop(file_id, b""))
        if torn:
            self._torn = {file_id: torn}
        batch = fold(entries)
        batch.defects = defects
        return batch


def read(piece: Piece) -> Batch:
    """What the ledger must change for *piece*, if nothing is known of the pieces before it."""
    return Reader().read(piece)
