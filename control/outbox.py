# SPDX-License-Identifier: Apache-2.0
"""Tell webhooks of what a use case has done, in the transaction that did it; nothing is written if nobody listens."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from psycopg.types.json import Jsonb

from control.act import Act
from control.store import Connection


def tell(
    connection: Connection, act: Act, kind: str, *, tenant_id: str | None, data: Mapping[str, Any], webhook_id: str | None = None
) -> None:
    """
    Put an event into the outbox; *tenant_id* None is the platform's own, *webhook_id* is for that one alone.

    Waits for another transaction that has told and not ended: so tell last. Never give it a secret.
    """
    plain = {name: value.isoformat() if isinstance(value, datetime) else value for name, value in data.items()}
    connection.execute("select tell(%s, %s, %s, %s, %s)", (kind, tenant_id, act.now, Jsonb(plain), webhook_id))
