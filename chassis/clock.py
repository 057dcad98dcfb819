# SPDX-License-Identifier: Apache-2.0
"""Tell the time, aware and in UTC. Cores take the time as an argument; only edges call this."""

from __future__ import annotations

from datetime import UTC, datetime


def utc_now() -> datetime:
    """Tell the current time, aware, in UTC."""
    return datetime.now(UTC)
