# SPDX-License-Identifier: Apache-2.0
"""
Compare what a second witness saw of an exchange with the ledger's row of it.

The witness is heard of exchanges that ended. It may have missed any number of them; of one that it saw,
the ledger must say the same.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Final, NamedTuple

from chassis import contract as c
from metering.core.journal import Malformed, is_request_id, metered, moment, whole

_COUNTED: Final = frozenset({"final", "running"})
_WORDS: Final = 9
#: What Envoy writes for metadata that is not there.
_NOTHING: Final = "-"
#: Nothing of an answer that ended so need be charged by its meter, whatever of it was seen.
_BROKEN_OFF: Final = frozenset({"upstream_error", "gateway_error", "refused_by_engine"})


# A named tuple, as the journal's records are: one is made for each request.
class Sighting(NamedTuple):
    """What the witness saw of one exchange."""

    request_id: str
    started_at: datetime
    tenant_id: str
    #: None: it saw no usage, or one that is no count.
    input_tokens: int | None
    output_tokens: int | None
    #: Of what else the dialect is metered by. None: it saw none of it, or what is no count.
    quantity: int | None
    #: When it was heard, by the clock of whoever heard it.
    heard_at: datetime


class Row(NamedTuple):
    """What the ledger says of the same exchange."""

    tenant_id: str
    input_tokens: int
    output_tokens: int
    quantity: int
    outcome: str


class Kind(StrEnum):
    """How the two differ."""

    ROW_MISSING = "row_missing"
    TENANT_DIFFERS = "tenant_differs"
    USAGE_DIFFERS = "usage_differs"


def sighting(line: str, *, heard_at: datetime) -> Sighting:
    """
    Read what `envoy/envoy.yaml` has Envoy say of an exchange; raises `Malformed` for what is no exchange of ours.

    Id, start, how usage was seen, input, output, what else was delivered; the dialect and how much it was asked for of that;
    tenant: nine words, of which `-` says that there is nothing to say.

    >>> seen = sighting("0000002a-0000-4000-8000-000000000000 1763000000.000001 final 3 5 - openai.chat - acme", heard_at=datetime.max)
    >>> seen.tenant_id, seen.input_tokens, seen.output_tokens
    ('acme', 3, 5)
    """
    try:
        request_id, started_at, seen, input_, output, delivered, dialect, asked, tenant_id = line.split(" ", _WORDS - 1)
        if not is_request_id(request_id) or tenant_id == _NOTHING:
            raise ValueError(c.J_REQUEST_ID)
        counted = seen in _COUNTED
        return Sighting(
            request_id=request_id, started_at=moment(started_at), tenant_id=tenant_id,
            input_tokens=_count(input_) if counted else None, output_tokens=_count(output) if counted else None,
            quantity=None if delivered == _NOTHING else _metered(dialect, asked, delivered),
            heard_at=heard_at,
        )
    except (ValueError, OverflowError, OSError) as exc:
        raise Malformed(f"{type(exc).__name__} in an access log line of {len(line)} characters") from exc


def _count(word: str) -> int | None:
    """A count of tokens, of which metadata without one has zero; None for what cannot be one."""
    if word == _NOTHING:
        return 0
    try:
        return whole(float(word))
    except ValueError:
        return None


def _metered(dialect: str, asked: str, delivered: str) -> int | None:
    """What the ledger charges of it; None for what is no count."""
    said = _count(delivered)
    request = {c.REQ_DIALECT: dialect, c.REQ_QUANTITY: None if asked == _NOTHING else asked}
    return None if said is None else metered(request, {c.USE_QUANTITY: said})[0]


def compare(seen: Sighting, row: Row | None) -> Kind | None:
    """How the ledger's *row* differs from what was *seen*; None if it does not."""
    if row is None:
        return Kind.ROW_MISSING
    if row.tenant_id != seen.tenant_id:
        return Kind.TENANT_DIFFERS
    for said, booked in ((seen.input_tokens, row.input_tokens), (seen.output_tokens, row.output_tokens)):
        if said is not None and said != booked:
            return Kind.USAGE_DIFFERS
    is_waived = row.outcome in _BROKEN_OFF and row.quantity == 0
    if seen.quantity is not None and seen.quantity != row.quantity and not is_waived:
        return Kind.USAGE_DIFFERS
    return None
