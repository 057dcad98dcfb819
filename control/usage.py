# SPDX-License-Identifier: Apache-2.0
"""
Usage, summed: for people who want a table and not SQL.

Read from the table and not from the billing view, which would read past row-level security.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final, Literal, LiteralString

from control import audit, tenants
from control.act import Act
from control.store import Store

By = Literal["tenant", "model", "key", "hour"]

_GROUPS: Final[dict[str, LiteralString]] = {
    "tenant": "tenant_id",
    "model": "model",
    "key": "key_id",
    "hour": "date_trunc('hour', started_at at time zone 'UTC') at time zone 'UTC'",
}

#: Each meter is summed by itself: images and characters are never added up.
_METERED: Final[LiteralString] = (
    "coalesce(sum(quantity) filter (where meter = 'images'), 0)::bigint as images, "
    "coalesce(sum(quantity) filter (where meter = 'characters'), 0)::bigint as characters, "
    "coalesce(sum(quantity) filter (where meter = 'searches'), 0)::bigint as searches"
)


def report(store: Store, act: Act, *, tenant: str | None, since: datetime, by: By) -> list[dict[str, Any]]:
    """Requests and tokens since *since*, one entry per value of *by*. Reading them is an entry of the audit log."""
    group = _GROUPS[by]
    name: LiteralString = {"tenant": "tenant", "model": "model", "key": "key_id", "hour": "hour"}[by]
    with store.transaction(act.scope) as connection:
        tenant_id = tenants.resolve_id(connection, tenant)
        rows = connection.execute(
            f"select {group} as {name}, count(*) as requests, "
            "sum(input_tokens)::bigint as input_tokens, sum(output_tokens)::bigint as output_tokens, "
            "sum(cached_tokens)::bigint as cached_tokens, sum(reasoning_tokens)::bigint as reasoning_tokens, "
            + _METERED
            + " "
            "from usage_event "
            "where started_at >= %(since)s and (%(it)s::text is null or tenant_id = %(it)s) "
            "group by 1 order by 1",
            {"since": since, "it": tenant_id},
        ).fetchall()
        audit.append(
            connection, act, "usage.read", "usage", tenant_id=tenant_id or act.tenant_id,
            after={"since": since, "by": by, "rows": len(rows)},
        )
    return rows
