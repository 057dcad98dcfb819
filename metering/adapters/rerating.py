# SPDX-License-Identifier: Apache-2.0
"""
Charge what was charged by a wrong price again by the right one, without changing a row.

Each request's new amount is computed as it would have been, from the amount that stood before: the row's
own, or that of the re-rating before this one. The differences are lines of the month, or of the first
open one if it is closed. The same re-rating again finds nothing to do. Raises psycopg errors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime
from typing import Any, Final

import psycopg
from psycopg.rows import tuple_row
from psycopg.types.json import Jsonb

from metering.core.rating import Tier

#: The rounding is `metering.core.rating.amount_nano`'s: summed exactly, rounded once, half a nano up.
_CHANGED: Final = """
create temp table rerated on commit drop as
select * from (
    select u.request_id, u.started_at, u.tenant_id, u.project_id, coalesce(last.after_nano, u.amount_nano) as before_nano,
           coalesce(last.currency, u.currency) as currency,
           case when u.input_tokens + u.output_tokens + u.quantity = 0 then 0 else greatest(%(minimum_nano)s::bigint,
               case when u.meter = %(meter)s then u.quantity * %(each_nano)s::bigint else 0 end + div(
               2 * (  (u.input_tokens - u.cached_tokens)::numeric * coalesce((t.tier ->> 'input_nano')::bigint, %(input_nano)s)
                    + u.cached_tokens::numeric * coalesce((t.tier ->> 'cached_nano')::bigint, %(cached_nano)s)
                    + (u.output_tokens - u.reasoning_tokens)::numeric * coalesce((t.tier ->> 'output_nano')::bigint, %(output_nano)s)
                    + u.reasoning_tokens::numeric * coalesce((t.tier ->> 'reasoning_nano')::bigint, %(reasoning_nano)s)
                   ) + 1000000, 2000000)) end::bigint as after_nano
    from usage_event u
        left join rate_card c using (rate_card_id)
        left join lateral rate_tier(%(tiers)s, u.input_tokens) as t (tier) on true
        left join lateral (
            select r.after_nano, x.currency from rerated_row r join rerating x using (rerating_id)
            where r.request_id = u.request_id order by r.rerating_id desc limit 1
        ) last on true
    where u.started_at >= %(starts_at)s and u.started_at < %(ends_at)s and u.model = %(model)s
      -- A correction of the general price leaves tenants alone that were charged by their own.
      -- What only the meter can charge is left alone by a price that has none for it.
      and (u.quantity = 0 or u.input_tokens + u.output_tokens > 0 or u.meter = %(meter)s)
      and case when %(tenant_id)s::text is null then c.tenant_id is null else u.tenant_id = %(tenant_id)s end
) priced
where before_nano is distinct from after_nano or currency is distinct from %(currency)s
"""
_OTHER_CURRENCY: Final = "select currency, count(*) from rerated where currency <> %(currency)s group by 1 order by 1"
_RETIRED: Final = """
select count(*) from usage_retired where day >= (%(starts_at)s::timestamptz at time zone 'UTC')::date and day < %(ends_at)s::timestamptz at time zone 'UTC'
"""
_DIFFERENCES: Final = """
select tenant_id, count(*), count(*) filter (where before_nano is null), coalesce(sum(before_nano), 0)::bigint, sum(after_nano)::bigint
from rerated group by 1 order by 1
"""
_KEEP: Final = """
insert into rerating (model, tenant_id, starts_at, ends_at, currency, input_nano, output_nano, cached_nano, reasoning_nano,
                      minimum_nano, meter, each_nano, tiers, reason, applied_by, applied_at)
values (%(model)s, %(tenant_id)s, %(starts_at)s, %(ends_at)s, %(currency)s, %(input_nano)s, %(output_nano)s, %(cached_nano)s,
        %(reasoning_nano)s, %(minimum_nano)s, %(meter)s, %(each_nano)s, %(tiers)s, %(reason)s, %(by)s, %(now)s)
returning rerating_id
"""
_KEEP_ROWS: Final = """
insert into rerated_row (rerating_id, request_id, started_at, tenant_id, before_nano, after_nano)
select %(id)s, request_id, started_at, tenant_id, before_nano, after_nano from rerated
"""
_KEEP_LINES: Final = """
insert into rerating_line (rerating_id, period, of_period, tenant_id, project_id, model, currency, request_count, unpriced_count, amount_nano)
select %(id)s, greatest(%(period)s::date, (select (max(period) + interval '1 month')::date from billing_period)), %(period)s,
       tenant_id, project_id, %(model)s, %(currency)s, count(*), count(*) filter (where before_nano is null),
       sum(after_nano - coalesce(before_nano, 0))
from rerated group by tenant_id, project_id
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """The right price of a model for a while, within one month."""

    model: str
    #: None: whoever was charged by the general price, or by none.
    tenant_id: str | None
    starts_at: datetime
    ends_at: datetime
    currency: str
    input_nano: int
    output_nano: int
    cached_nano: int
    reasoning_nano: int
    minimum_nano: int
    #: Empty: nothing but tokens.
    meter: str
    each_nano: int
    tiers: tuple[Tier, ...] = ()

    @property
    def period(self) -> date:
        """The month."""
        first = self.starts_at.astimezone(UTC)
        return date(first.year, first.month, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """What a correction changes for one tenant."""

    tenant_id: str
    request_count: int
    #: Of those the ones that had no price.
    unpriced_count: int
    before_nano: int
    after_nano: int


def find(connection: psycopg.Connection[Any], correction: Correction) -> list[Difference]:
    """Compute the differences, for `apply` in the same transaction; once a transaction."""
    words = _words(correction)
    connection.execute(_CHANGED, words)
    return [
        Difference(tenant_id=row[0], request_count=row[1], unpriced_count=row[2], before_nano=row[3], after_nano=row[4])
        for row in _rows(connection, _DIFFERENCES, words)
    ]


def obstacles(connection: psycopg.Connection[Any], correction: Correction) -> list[str]:
    """Why what `find` found cannot be applied, each as a clause for a person."""
    words = _words(correction)
    found = [f"{count} of its requests were charged in {currency}" for currency, count in _rows(connection, _OTHER_CURRENCY, words)]
    [(retired,)] = _rows(connection, _RETIRED, words)
    return found + ([f"the rows of {retired} of its days are gone"] if retired else [])


def apply(connection: psycopg.Connection[Any], correction: Correction, *, reason: str, by: str, now: datetime) -> int:
    """Write down what `find` found; its number. The caller holds the charging lock, and looked for obstacles."""
    words: Mapping[str, Any] = _words(correction) | {"reason": reason, "by": by, "now": now, "period": correction.period}
    [(made,)] = _rows(connection, _KEEP, words)
    for query in (_KEEP_ROWS, _KEEP_LINES):
        connection.execute(query, {**words, "id": made})
    return int(made)


def _words(correction: Correction) -> dict[str, Any]:
    return asdict(correction) | {"tiers": Jsonb([asdict(tier) for tier in correction.tiers])}


def _rows(connection: psycopg.Connection[Any], query: str, words: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    with connection.cursor(row_factory=tuple_row) as cursor:
        return cursor.execute(query, words).fetchall()
