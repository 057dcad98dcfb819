# SPDX-License-Identifier: Apache-2.0
"""
Compare what a second witness saw of an exchange with the ledger's row of it.

The witness is heard of exchanges that ended. It may have missed any number of them; of one that it saw,
the ledger must say the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from chassis import contract as c
from metering.core.journal import Malformed, is_request_id, metered, moment, whole

_COUNTED = ("final", "running")
#: Nothing of an answer that ended so need be charged by its meter, whatever of it was seen.
_BROKEN_OFF = frozenset({"upstream_error", "gateway_error", "refused_by_engine"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Sighting:
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
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


def sighting(
    request_id: str, *, identity: Mapping[str, Any], request: Mapping[str, Any], usage: Mapping[str, Any], heard_at: datetime
) -> Sighting:
    """What three namespaces of metadata say of an exchange; raises `Malformed` for what is no exchange of ours."""
    try:
        if not is_request_id(request_id):
            raise ValueError(c.J_REQUEST_ID)
        counted = usage.get(c.USE_SEEN) in _COUNTED
        said = whole(usage.get(c.USE_QUANTITY))
        return Sighting(
            request_id=request_id, started_at=moment(request[c.REQ_STARTED_AT]), tenant_id=str(identity[c.ID_TENANT]),
            input_tokens=whole(usage.get(c.USE_INPUT, 0)) if counted else None,
            output_tokens=whole(usage.get(c.USE_OUTPUT, 0)) if counted else None,
            quantity=None if said is None else metered(request, usage)[0],
            heard_at=heard_at,
        )
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError, OSError) as exc:
        raise Malformed(f"{type(exc).__name__} in an access log entry") from exc


def compare(seen: Sighting, row: Row | None) -> Kind | None:
    """How the ledger's *row* differs from what was *seen*; None if it does not."""
    if row is None:
        return Kind.ROW_MISSING
    if row.tenant_id != seen.tenant_id:
        return Kind.TENANT_DIFFERS
    pairs = ((seen.input_tokens, row.input_tokens), (seen.output_tokens, row.output_tokens))
    if any(said is not None and said != booked for said, booked in pairs):
        return Kind.USAGE_DIFFERS
    is_waived = row.outcome in _BROKEN_OFF and row.quantity == 0
    if seen.quantity is not None and seen.quantity != row.quantity and not is_waived:
        return Kind.USAGE_DIFFERS
    return None
