# SPDX-License-Identifier: Apache-2.0
"""Read a journal without collecting it: to see whether it is whole, or to make its ledger again from nothing."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import psycopg

from chassis.errors import Conflict, NotFound
from metering.adapters.invariants import sums_digest
from metering.adapters.ledger import Ledger
from metering.adapters.reading import Reader
from metering.adapters.tail import Piece, Place, look, next_piece, starts_of, torn_tail
from metering.core import lines
from metering.core.lives import Lives

#: The journal's name in a replayed ledger.
_JOURNAL = "replay"


@dataclass(slots=True, kw_only=True)
class Found:
    """What is in the files of a journal."""

    files: list[str] = field(default_factory=list)
    byte_count: int = 0
    records: Counter[str] = field(default_factory=Counter)
    #: File, offset and reason of each run of bytes that is no record.
    defects: list[tuple[str, int, str]] = field(default_factory=list)
    #: Bytes of each file after its last whole line: being written, or torn.
    unfinished: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """What a replay has made."""

    request_count: int
    lost_count: int
    open_count: int
    defect_count: int
    sums_digest: str


def examine(live: Path) -> Found:
    """Read every line of the journal; changes nothing."""
    found = Found()
    places: dict[str, Place] = {}
    for first in (starts_of(live), live):
        while (piece := next_piece(first, places)) is not None:
            places[piece.place.file_id] = piece.place
            _count(piece, found)
    for file in look(live):
        found.files.append(file.path.name)
        found.byte_count += file.size
        tail = torn_tail(file, places.get(file.file_id, Place(file.file_id, file.path.name, 0)))
        if tail is not None:
            found.unfinished[file.path.name] = file.size - tail.start
    if not found.files:
        raise NotFound(f"There is no journal at {live}.")
    return found


def replay(live: Path, into: str, *, prices_from: str | None, now: datetime) -> Replayed:
    """
    Write the whole journal into the migrated, empty ledger *into*, priced by the rate cards of *prices_from*.

    Exchanges of all but the last life of Envoy are closed; those of the last one stay open if they have
    no end record, as they would in a collector that has just read them.
    """
    with psycopg.connect(into, autocommit=True) as connection:
        if connection.execute("select exists (select from usage_event) or exists (select from open_exchange)").fetchone() != (False,):
            raise Conflict("The database to replay into has usage already.", mend="Name an empty one.")
        if prices_from is not None:
            _copy_rate_cards(prices_from, connection)
        ledger = Ledger(into, _JOURNAL)
        try:
            _write(live, ledger, now)
        finally:
            ledger.close()
        counts = connection.execute(
            "select count(*), count(*) filter (where outcome = 'lost'), (select count(*) from open_exchange), "
            "(select count(*) from journal_defect) from usage_event"
        ).fetchone()
        assert counts is not None
        return Replayed(
            request_count=counts[0], lost_count=counts[1], open_count=counts[2], defect_count=counts[3],
            sums_digest=sums_digest(connection),
        )


def _write(live: Path, ledger: Ledger, now: datetime) -> None:
    places: dict[str, Place] = {}
    reader, lives = Reader(), Lives()
    while (reading := reader.next(live, places)).pieces:
        ledger.write(reading.batch, reading.pieces, now)
        for piece in reading.pieces:
            places[piece.place.file_id] = piece.place
        for stream, epochs in reading.batch.lives.items():
            lives = lives.after(stream, epochs)
    while ledger.close_orphans(ended=lives.ended, silent=False, now=now):
        pass


def _copy_rate_cards(source: str, target: psycopg.Connection[tuple[object, ...]]) -> None:
    columns = (
        "rate_card_id, tenant_id, model, currency, input_nano, output_nano, cached_nano, reasoning_nano, minimum_nano, "
        "meter, each_nano, tiers, effective, created_at"
    )
    with (
        psycopg.connect(source) as connection,
        connection.cursor() as reading,
        target.cursor() as writing,
        reading.copy(f"copy rate_card ({columns}) to stdout") as outgoing,
        writing.copy(f"copy rate_card ({columns}) from stdin") as incoming,
    ):
        for data in outgoing:
            incoming.write(data)


def _count(piece: Piece, found: Found) -> None:
    if piece.alarm is None and not piece.endless:
        entries, defects, _ = lines.read(piece.data, offset=piece.start)
        found.records.update(entry.type for entry in entries)
    else:
        defects = Reader().read(piece).defects.get(piece.place.file_id, [])
    found.defects += [(piece.place.name, defect.offset, defect.reason) for defect in defects]
