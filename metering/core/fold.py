# SPDX-License-Identifier: Apache-2.0
"""
Fold a batch of journal records into what the ledger must change.

One exchange may have many records in a batch, or its start in one batch and its end in the
next; the fold keeps the last word of each and says which exchanges are over. Start records come
before all others of their batch, whenever they were written: they say the least.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from chassis import contract as c
from metering.core.journal import Entry, Refused, UsageEvent, refused, usage_event
from metering.core.lines import Defect


@dataclass(slots=True)
class Batch:
    """What one transaction writes."""

    #: Rows of exchanges that ended.
    events: dict[str, UsageEvent] = field(default_factory=dict)
    #: End records behind `events`, kept if a row turns out to exist with other numbers.
    ended: dict[str, Entry] = field(default_factory=dict)
    #: End records that contradict an earlier one of this batch: the first one stands.
    contradicting: list[Entry] = field(default_factory=list)
    #: The last record of each exchange that has not ended.
    open: dict[str, Entry] = field(default_factory=dict)
    refusals: list[Refused] = field(default_factory=list)
    #: What was no record, by the id of its file.
    defects: dict[str, list[Defect]] = field(default_factory=dict)
    #: Lives of Envoy in the order of their records, by stream.
    lives: dict[str, list[str]] = field(default_factory=dict)


def fold(entries: Iterable[Entry], *, starts: Iterable[Entry] = ()) -> Batch:
    """Fold *entries* of Envoy's own file and *starts* of the other, each in the order of its file."""
    batch = Batch()
    for stream, records in ((c.STARTS_PATH, starts), (c.JOURNAL_PATH, entries)):
        lives: list[str] = []
        for entry in records:
            if entry.epoch and entry.epoch != (lives[-1] if lives else ""):
                lives.append(entry.epoch)
            _add(batch, entry)
        batch.lives[stream] = lives
    return batch


def _add(batch: Batch, entry: Entry) -> None:
    if entry.type == c.JOURNAL_END:
        batch.open.pop(entry.request_id, None)
        if entry.admitted:
            _end(batch, entry)
        elif entry.tenant_id:
            batch.refusals.append(refused(entry))
    elif entry.admitted and entry.request_id not in batch.events:
        batch.open[entry.request_id] = entry


def _end(batch: Batch, entry: Entry) -> None:
    event = usage_event(entry)
    first = batch.events.setdefault(entry.request_id, event)
    if first is event:
        batch.ended[entry.request_id] = entry
    elif first != event:
        batch.contradicting.append(entry)
