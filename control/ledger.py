# SPDX-License-Identifier: Apache-2.0
"""Whether the ledger holds, as a document."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import psycopg

from metering.adapters.invariants import verify


def verification(connection: psycopg.Connection[Any]) -> dict[str, Any]:
    """`ok`, each invariant with its violations, notes for a person, and the digest of the hourly sums."""
    found = verify(connection)
    return {
        "ok": found.holds,
        "invariants": [asdict(verdict) for verdict in found.verdicts],
        "notes": found.notes,
        "sums_digest": found.sums_digest,
    }
