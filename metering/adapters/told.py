# SPDX-License-Identifier: Apache-2.0
"""
Tell of exchanges whose end was read, as spans: those that failed although they are not sampled, and the reading itself.

Which requests end badly is known at their end, and who samples at the door does not know it. Nothing of it is for bills,
and a record without a trace says nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from datetime import datetime
from typing import Final

from chassis import contract as c
from chassis.telemetry import traces
from metering.core.journal import Entry, UsageEvent

#: What nobody has to look into: it went well, its caller left, its budget ended, or its engine said what was wrong with it.
_NO_FAILURES: Final = frozenset({"ok", "client_closed", "budget_exhausted", "refused_by_engine"})


def recorded(rows: Collection[tuple[UsageEvent, Entry]], *, journal: str, began: datetime, ended: datetime) -> None:
    """Tell of *rows*, which are new in the ledger since *ended*; their batch was read and written from *began* on."""
    if not traces.is_on():
        return
    for event, entry in rows:
        if event.outcome not in _NO_FAILURES:
            _failed(event, _trace(entry))
    traces.worked(
        "collect", _traces(entry for _, entry in rows), began=began, ended=ended,
        attributes={"peaje.journal": journal, "peaje.rows": len(rows)},
    )  # fmt: skip


def _failed(event: UsageEvent, trace: str) -> None:
    operation = traces.OPERATIONS.get(event.dialect, event.dialect)
    traces.failed(
        f"{operation} {event.model}", trace, began=event.started_at, ended=event.ended_at,
        attributes={
            "gen_ai.operation.name": operation, "gen_ai.request.model": event.model, "gen_ai.usage.input_tokens": event.input_tokens,
            "gen_ai.usage.output_tokens": event.output_tokens, "http.response.status_code": event.status, "error.type": event.outcome,
            "peaje.tenant": event.tenant_id, "guid:x-request-id": event.request_id,
        },
    )  # fmt: skip


def _traces(entries: Iterable[Entry]) -> Iterable[str]:
    return filter(None, map(_trace, entries))


def _trace(entry: Entry) -> str:
    return str(entry.fields.get(c.J_TRACE, ""))
