# SPDX-License-Identifier: Apache-2.0
"""
Read what tenants use right now: from the ledger's hourly sums, which grow with each row, and from Envoy.

No metrics port is needed, and nothing is asked of the services. What is shown is as old as the ledger's lag.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Final

import httpx
import psycopg

from control.core.rates import Sums

#: Hours whose sums are read: a stream counts in the hour in which it began.
_HOURS: Final = 3
_SECONDS: Final = 3.0

_SUMS: Final = """
select coalesce(t.name, s.tenant_id), s.requests, s.input_tokens, s.output_tokens, s.refused
from (
    select coalesce(u.tenant_id, r.tenant_id) as tenant_id, coalesce(u.requests, 0) as requests,
           coalesce(u.input_tokens, 0) as input_tokens, coalesce(u.output_tokens, 0) as output_tokens,
           coalesce(r.refused, 0) as refused
    from (
        select tenant_id, sum(request_count)::bigint as requests, sum(input_tokens)::bigint as input_tokens,
               sum(output_tokens)::bigint as output_tokens
        from usage_hour where hour > now() - %(hours)s * interval '1 hour' group by 1
    ) u
    full join (
        select tenant_id, count(*) as refused from refusal where status not between 200 and 399 and started_at > now() - %(hours)s * interval '1 hour' group by 1
    ) r using (tenant_id)
) s left join tenant t on t.tenant_id = s.tenant_id
"""
_STATE: Final = """
select (select max(extract(epoch from now() - read_until))::float8 from journal_state),
       (select count(*) from open_exchange),
       (select count(*) from reconciliation_exception where state = 'open')
"""
_ACTIVE: Final = "http.tenants.downstream_rq_active"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One look."""

    #: Seconds of a steady clock.
    at: float
    tenants: dict[str, Sums]
    #: Since the journal that is furthest behind was read to its end; None: nobody has read one.
    lag_seconds: float | None
    #: Exchanges that the ledger knows as under way.
    open_count: int
    exceptions_open: int
    #: Requests that Envoy has in hand; None while it does not answer.
    active: int | None


def look(connection: psycopg.Connection[tuple[Any, ...]], envoy_admin: str) -> Reading:
    """Look once; raises what psycopg raises."""
    rows = connection.execute(_SUMS, {"hours": _HOURS}).fetchall()
    [(lag, open_count, exceptions)] = connection.execute(_STATE).fetchall()
    return Reading(
        at=time.monotonic(),
        tenants={row[0]: Sums(requests=row[1], input_tokens=row[2], output_tokens=row[3], refused=row[4]) for row in rows},
        lag_seconds=lag, open_count=open_count, exceptions_open=exceptions, active=_active(envoy_admin),
    )


def _active(admin: str) -> int | None:
    try:
        answer = httpx.get(f"{admin}/stats", params={"filter": f"^{_ACTIVE}$", "format": "json"}, timeout=_SECONDS, trust_env=False)
        return int(answer.json()["stats"][0]["value"])
    except (httpx.HTTPError, ValueError, KeyError, IndexError):
        return None
