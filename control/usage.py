# SPDX-License-Identifier: Apache-2.0
"""Usage, summed: the billing team's views for people who want a table and not SQL."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final, Literal, LiteralString

from control import tenants
from control.store import Store

By = Literal["tenant", "model", "key", "hour"]

_GROUPS: Final[dict[str, LiteralString]] = {
    "tenant": "tenant",
    "model": "model",
    "key": "key_id",
    "hour": "date_trunc('hour', started_at at time zone 'UTC') at time zone 'UTC'",
}


def report(store: Store, *, tenant: str | None, since: datetime, by: By) -> list[dict[str, Any]]:
    """Requests and tokens since *since*, one entry per value of *by*."""
    tenant_id = tenants.find(store, tenant)["tenant_id"] if tenant is not None else None
    group = _GROUPS[by]
    name: LiteralString = {"tenant": "tenant", "model": "model", "key": "key_id", "hour": "hour"}[by]
    with store.transaction() as connection:
        return connection.execute(
            f"select {group} as {name}, count(*) as requests, "
            "sum(input_tokens)::bigint as input_tokens, sum(output_tokens)::bigint as output_tokens, "
            "sum(cached_tokens)::bigint as cached_tokens, sum(reasoning_tokens)::bigint as reasoning_tokens "
            "from billing_usage_v1 "
            "where started_at >= %(since)s and (%(it)s::text is null or tenant = %(it)s) "
            "group by 1 order by 1",
            {"since": since, "it": tenant_id},
        ).fetchall()
