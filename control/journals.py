# SPDX-License-Identifier: Apache-2.0
"""Journals that the ledger waits for: which there are, and the retirement of one that is gone for good."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Final

from chassis.errors import Invalid
from control import audit
from control.act import Act
from control.store import Store
from metering.adapters.retiring import Files, retire

REASON_LENGTH_MAX: Final = 500

_JOURNALS: Final = """
select journal, read_until,
       (select count(*) from open_exchange o where o.journal = s.journal) as open_exchanges,
       (select coalesce(jsonb_agg(jsonb_build_object('file_id', file_id, 'file', file_name, 'offset', byte_offset) order by file_name), '[]')
        from journal_position p where p.journal = s.journal) as files
from journal_state s order by read_until, journal
"""
_RETIRED: Final = """
select journal, retired_at, retired_by, reason, read_until, closed_count, files from retired_journal order by retired_at, journal
"""


def journals(store: Store, act: Act) -> dict[str, Any]:
    """Those that months and comparisons wait for, the slowest first, with how far each file was read; and those that were retired."""
    with store.transaction(act.scope) as connection:
        return {
            "journals": connection.execute(_JOURNALS).fetchall(),
            "retired": connection.execute(_RETIRED).fetchall(),
        }


def retire_journal(store: Store, act: Act, journal: str, *, files: Files, reason: str) -> dict[str, Any]:
    """Let nothing wait for *journal* any more; audited. Raises `NotFound` or `Conflict`."""
    reason = reason.strip()
    if not 1 <= len(reason) <= REASON_LENGTH_MAX or not reason.isprintable():
        raise Invalid(f"A retirement says why, in 1 to {REASON_LENGTH_MAX} printable characters.")
    with store.transaction(act.scope) as connection:
        done = asdict(retire(connection, journal, files=files, reason=reason, by=act.actor, now=act.now))
        audit.append(connection, act, "journal.retired", journal, tenant_id=None, after=done | {"reason": reason})
    return done
