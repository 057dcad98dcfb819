# SPDX-License-Identifier: Apache-2.0
"""
The audit log: what was done, by whom, in the transaction that did it.

An entry holds rows as the API shows them, so no secret and no hash of one can be among them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any, Final

from psycopg.types.json import Jsonb

from chassis.errors import Invalid
from control.act import Act
from control.core import chain
from control.store import PAGE_ROWS_MAX, Connection, Store

_INSERT: Final = """
insert into audit_event (sequence, at, actor, tenant_id, action, object, request_id, detail, previous_hash, hash)
values (%(sequence)s, %(at)s, %(actor)s, %(tenant_id)s, %(action)s, %(object)s, %(request_id)s, %(detail)s,
        %(previous_hash)s, %(hash)s)
"""
_COLUMNS: Final = "sequence, at, actor, tenant_id, action, object, request_id, detail"
#: Rows fetched at a time while verifying: memory stays flat however long the log is.
_VERIFY_ROWS: Final = 1000


def append(
    connection: Connection,
    act: Act,
    action: str,
    object_: str,
    *,
    tenant_id: str | None,
    before: Mapping[str, Any] | None = None,
    after: Mapping[str, Any] | None = None,
) -> None:
    """
    Add an entry; it stays only if the transaction of *connection* does.

    *tenant_id* is whose log it belongs to, None for the platform's. Waits for another transaction
    that has appended and not ended: so append last.
    """
    head = connection.execute("select sequence, hash from lock_audit_head()").fetchone()
    assert head is not None
    detail = {"before": _plain(before), "after": _plain(after)}
    entry = chain.Entry(
        sequence=head["sequence"] + 1, at=act.now, actor=act.actor, tenant_id=tenant_id, action=action,
        object=object_, request_id=act.request_id, detail={name: it for name, it in detail.items() if it is not None},
    )
    connection.execute(
        _INSERT,
        {
            "sequence": entry.sequence, "at": entry.at, "actor": entry.actor, "tenant_id": entry.tenant_id,
            "action": entry.action, "object": entry.object, "request_id": entry.request_id,
            "detail": Jsonb(entry.detail), "previous_hash": head["hash"],
            "hash": chain.link(bytes(head["hash"]), entry),
        },
    )


def list_entries(store: Store, act: Act, *, after: int, limit: int) -> dict[str, Any]:
    """Entries after sequence number *after*, oldest first; `next` goes on. Reading them is itself an entry."""
    limit = min(limit, PAGE_ROWS_MAX)
    with store.transaction(act.scope) as connection:
        rows = connection.execute(
            f"select {_COLUMNS}, hash from audit_event where sequence > %s order by sequence limit %s", (after, limit)
        ).fetchall()
        append(
            connection, act, "audit.read", "audit", tenant_id=act.tenant_id,
            after={"after": after, "entries": len(rows)},
        )
    entries = [row | {"hash": row["hash"].hex()} for row in rows]
    return {"entries": entries, "next": rows[-1]["sequence"] if len(rows) == limit else None}


def verify(store: Store, act: Act, *, anchor: str | None) -> dict[str, Any]:
    """
    Walk the whole chain. *anchor*, "SEQUENCE:HASH" as an earlier verification answered it, must lie on it.

    The scope must be all tenants: one tenant's entries alone are no chain.
    """
    expected = _anchor(anchor)
    # Entries that are appended meanwhile do not count: one moment for the head and for the walk.
    with store.snapshot(act.scope) as connection:
        head = connection.execute("select sequence, hash from audit_head").fetchone()
        assert head is not None
        verdict = chain.verify(
            _links(connection), head=chain.End(sequence=head["sequence"], hash=bytes(head["hash"])), anchor=expected
        )
    return {
        "intact": verdict.fault is None, "fault": verdict.fault, "entries": verdict.end.sequence,
        "anchor": f"{verdict.end.sequence}:{verdict.end.hash.hex()}",
    }


def _links(connection: Connection) -> Iterator[chain.Link]:
    with connection.cursor("audit_verify") as cursor:
        cursor.itersize = _VERIFY_ROWS
        # In the order of the table's own numbers; a number that was changed breaks its hash.
        cursor.execute(f"select {_COLUMNS}, previous_hash, hash from audit_event order by sequence")
        for row in cursor:
            entry = chain.Entry(
                sequence=row["sequence"], at=row["at"], actor=row["actor"], tenant_id=row["tenant_id"],
                action=row["action"], object=row["object"], request_id=row["request_id"], detail=row["detail"],
            )
            yield chain.Link(entry=entry, previous_hash=bytes(row["previous_hash"]), hash=bytes(row["hash"]))


def _anchor(text: str | None) -> chain.End | None:
    if text is None:
        return None
    sequence, _, digest = text.partition(":")
    try:
        end = chain.End(sequence=int(sequence), hash=bytes.fromhex(digest))
    except ValueError as exc:
        raise Invalid("The anchor is not SEQUENCE:HASH.", mend="Give it as an earlier verification answered it.") from exc
    if len(end.hash) != chain.HASH_BYTES:
        raise Invalid("The anchor is not SEQUENCE:HASH.", mend="Give it as an earlier verification answered it.")
    return end


def _plain(row: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return None if row is None else {name: _value(value) for name, value in row.items()}


def _value(value: Any) -> Any:
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Mapping):
        return _plain(value)
    if isinstance(value, list | tuple | set | frozenset):
        return [_value(one) for one in value]
    return str(value)
