# SPDX-License-Identifier: Apache-2.0
"""What two sources of usage say differently: list it, explain it, or sign for it."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from chassis.errors import Conflict, Invalid, NotFound
from control import audit
from control.act import Act
from control.store import Store

#: Most that one answer has; the oldest come first.
LIST_MAX = 500
_NOTE_LENGTH_MAX = 500
#: The largest that the table's ids can be.
_ID_MAX = 2**63 - 1

_COLUMNS = """
select exception_id, kind, request_id, started_at, tenant_id as tenant, state, input_tokens, output_tokens,
       ledger_tenant_id as ledger_tenant, ledger_input_tokens, ledger_output_tokens, quantity, ledger_quantity, found_at, note, actor, decided_at
from reconciliation_exception
"""


class State(StrEnum):
    """Where an exception stands."""

    OPEN = "open"
    #: The cause is known.
    EXPLAINED = "explained"
    #: It is not, and somebody answers for that.
    SIGNED = "signed"


def exceptions(store: Store, act: Act, state: State | None) -> dict[str, Any]:
    """The oldest exceptions, in one state or all, and how many there are of each state."""
    with store.transaction(act.scope) as connection:
        found = connection.execute(
            f"{_COLUMNS} where %(state)s::text is null or state = %(state)s order by exception_id limit %(limit)s",
            {"state": state and state.value, "limit": LIST_MAX},
        ).fetchall()
        counts = connection.execute("select state, count(*) as n from reconciliation_exception group by 1").fetchall()
        seen = connection.execute(
            "select coalesce(sum(agreed_count), 0)::bigint as agreed, coalesce(sum(disagreed_count), 0)::bigint as disagreed "
            "from witness_hour"
        ).fetchone()
    of_state = {row["state"]: row["n"] for row in counts}
    return {
        "exceptions": found, "counts": {it.value: of_state.get(it.value, 0) for it in State}, "witness": seen,
    }


def decide(store: Store, act: Act, exception_id: int, state: State, note: str) -> dict[str, Any]:
    """Explain or sign an open exception, for good; raises `NotFound` or `Conflict`."""
    note = note.strip()
    if not 1 <= len(note) <= _NOTE_LENGTH_MAX or not note.isprintable():
        raise Invalid(f"A note says why, in 1 to {_NOTE_LENGTH_MAX} printable characters.")
    if not 0 < exception_id <= _ID_MAX:
        raise NotFound("There is no such exception.")
    with store.transaction(act.scope) as connection:
        found = connection.execute(f"{_COLUMNS} where exception_id = %s for update", (exception_id,)).fetchone()
        if found is None:
            raise NotFound("There is no such exception.", mend="See `peaje reconcile list`.")
        if found["state"] != State.OPEN:
            raise Conflict(f"The exception is {found['state']} already.")
        connection.execute(
            "update reconciliation_exception set state = %s, note = %s, actor = %s, decided_at = %s where exception_id = %s",
            (state.value, note, act.actor, act.now, exception_id),
        )
        audit.append(
            connection, act, f"reconciliation.{state.value}", str(exception_id), tenant_id=found["tenant"] or None,
            after={"state": state.value, "note": note, "request_id": found["request_id"], "kind": found["kind"]},
        )
    return found | {"state": state.value, "note": note, "actor": act.actor, "decided_at": act.now}
