# SPDX-License-Identifier: Apache-2.0
"""What becomes of a key's limits when the key is rotated."""

from __future__ import annotations

from datetime import datetime

from control.store import Connection


def copy(connection: Connection, *, old_key_id: str, new_key_id: str, now: datetime) -> None:
    """Make the limits of a key bind its successor too, from its first request."""
    connection.execute(
        """
        insert into rate_limit (tenant_id, project_id, key_id, model, unit, period, amount, burst, effect,
                                on_store_error, currency, updated_at)
        select tenant_id, project_id, %s, model, unit, period, amount, burst, effect, on_store_error, currency, %s
        from rate_limit where key_id = %s
        """,
        (new_key_id, now, old_key_id),
    )
