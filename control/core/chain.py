# SPDX-License-Identifier: Apache-2.0
"""
The audit log's chain: each entry's hash covers the entry and the hash before it.

Whoever changes, removes, adds or reorders an entry must compute every later hash again; the last
one, kept somewhere else, then still gives it away.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

HASH_BYTES: Final = 32
#: What the first entry follows.
GENESIS: Final = bytes(HASH_BYTES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One thing that was done. `detail` holds JSON values: no floats, which two libraries may write differently."""

    sequence: int
    at: datetime
    actor: str
    tenant_id: str | None
    action: str
    object: str
    request_id: str
    detail: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """An entry as it is stored."""

    entry: Entry
    previous_hash: bytes
    hash: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """A place in the chain: how many entries up to here, and the hash that stands for them all."""

    sequence: int
    hash: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a walk along the chain found; `fault` is None if every link holds."""

    end: End
    fault: str | None


def canonical(entry: Entry) -> bytes:
    """
    Write *entry* in the one way that is hashed: JSON, names sorted, no spaces, ASCII, UTC with microseconds.

    >>> canonical(Entry(sequence=1, at=datetime(2026, 1, 2, tzinfo=UTC), actor="op_x", tenant_id=None, action="a.b",
    ...     object="o", request_id="r", detail={"n": 1}))
    b'{"action":"a.b","actor":"op_x","at":"2026-01-02T00:00:00.000000+00:00","detail":{"n":1},"object":"o","request_id":"r","sequence":1,"tenant":null}'
    """
    document = {
        "sequence": entry.sequence, "at": entry.at.astimezone(UTC).isoformat(timespec="microseconds"),
        "actor": entry.actor, "tenant": entry.tenant_id, "action": entry.action, "object": entry.object,
        "request_id": entry.request_id, "detail": entry.detail,
    }
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def link(previous_hash: bytes, entry: Entry) -> bytes:
    """Compute the hash of *entry* at its place: SHA-256 of the hash before it and its canonical form."""
    return hashlib.sha256(previous_hash + canonical(entry)).digest()


def verify(links: Iterable[Link], *, head: End, anchor: End | None = None) -> Verdict:
    """
    Walk the whole chain in the order given and stop at the first link that does not hold.

    *head* is where the chain is said to end; *anchor* is a place that somebody wrote down earlier,
    which shows a chain that was computed again from some entry on.
    """
    end = End(sequence=0, hash=GENESIS)
    is_anchored = anchor is None or anchor == end
    for one in links:
        entry = one.entry
        if entry.sequence != end.sequence + 1:
            return Verdict(end=end, fault=f"Entry {end.sequence + 1} is missing; entry {entry.sequence} is in its place.")
        if one.previous_hash != end.hash:
            return Verdict(end=end, fault=f"Entry {entry.sequence} does not follow the one before it.")
        if one.hash != link(end.hash, entry):
            return Verdict(end=end, fault=f"Entry {entry.sequence} was changed.")
        end = End(sequence=entry.sequence, hash=one.hash)
        is_anchored = is_anchored or anchor == end
    if end != head:
        return Verdict(end=end, fault=f"The log ends at entry {end.sequence}; it once ended at entry {head.sequence}.")
    if anchor is not None and not is_anchored:
        return Verdict(end=end, fault=f"Entry {anchor.sequence} is not the one that was written down.")
    return Verdict(end=end, fault=None)
