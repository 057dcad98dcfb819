# SPDX-License-Identifier: Apache-2.0
"""Make of a piece of the journal what the ledger must change."""

from __future__ import annotations

from metering.adapters.tail import Piece
from metering.core import lines
from metering.core.fold import Batch, fold


def read(piece: Piece) -> Batch:
    """What the ledger must change for *piece*, and its defects."""
    if piece.endless:
        found = lines.defect(piece.data, offset=piece.start, reason="no line end in more than a line's length")
        return Batch(defects=[found])
    entries, defects = lines.read(piece.data, offset=piece.start)
    batch = fold(entries)
    batch.defects = defects
    return batch
