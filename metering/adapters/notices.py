# SPDX-License-Identifier: Apache-2.0
"""
Notice what no transaction says by itself: a budget nearly used, a key about to expire, an hour that is over.

Each is told in the transaction that remembers having told it. What there is to tell is found first, without the
outbox's lock: whoever changes a key must not wait for a sum over a month.

Only where a webhook wants to know: without one, each of these is a look at an empty table.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any, Final

import psycopg

from metering.adapters.ledger import OUTBOX_LOCK

#: Percent of a budget or quota that are told.
THRESHOLDS: Final = (50, 80, 100)
EXPIRING_WITHIN: Final = timedelta(days=7)
#: After the end of an hour: streams end and journals are read; what is later still comes as a difference.
HOUR_GRACE: Final = timedelta(minutes=5)
#: How far back differences are looked for, often and seldom.
RECENT_HOURS: Final = timedelta(hours=48)
ALL_HOURS: Final = timedelta(days=45)
#: Hours of one look, told under the lock in a fraction of a second; the rest comes with the next.
HOURS_PER_LOOK: Final = 5000

_WANTED: Final = "select exists (select from webhook where %(kind)s = any(kinds))"

_CROSSED: Final = """
create temp table noticed on commit drop as
with budget as (
    select l.*, case l.period when 'calendar_day' then date_trunc('day', %(now)s, 'UTC')
                              when 'calendar_month' then date_trunc('month', %(now)s, 'UTC')
                              else '1970-01-01Z'::timestamptz end as starts_at
    from rate_limit l
    where l.period in ('calendar_day', 'calendar_month', 'ever') and l.amount > 0 and l.effect <> 'shadow'
      and exists (select from webhook w
                  where 'budget.threshold' = any(w.kinds) and (w.tenant_id is null or w.tenant_id = l.tenant_id))
), used as (
    select b.limit_id, coalesce(sum(case b.unit when 'requests' then h.request_count
                                                when 'tokens' then h.input_tokens + h.output_tokens
                                                when 'input_tokens' then h.input_tokens
                                                when 'output_tokens' then h.output_tokens
                                                when 'cached_tokens' then h.cached_tokens
                                                when 'money' then h.amount_nano end), 0)::bigint as used
    from budget b join usage_hour h on h.tenant_id = b.tenant_id and h.hour >= b.starts_at
        and (b.project_id is null or h.project_id = b.project_id) and (b.key_id is null or h.key_id = b.key_id)
        and (b.model is null or h.model = b.model) and (b.currency is null or h.currency = b.currency)
    group by 1
), crossed as (
    select b.*, u.used, percent, concat_ws(' ', 'budget', b.limit_id, to_char(b.starts_at at time zone 'UTC', 'YYYY-MM-DD'), b.amount, percent) as subject
    from budget b join used u using (limit_id) cross join unnest(%(percents)s::int[]) as percent
    where u.used::numeric * 100 >= b.amount::numeric * percent
)
select subject, tenant_id, limit_id as first, percent as second, jsonb_build_object(
    'percent', percent, 'limit_id', limit_id, 'unit', unit, 'period', period, 'amount', amount, 'used', used,
    'currency', currency, 'project', project_id, 'key_id', key_id, 'model', model, 'effect', effect,
    'window_starts_at', to_char(starts_at at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"')) as data
from crossed
where not exists (select from event_told t where t.subject = crossed.subject)
"""

_EXPIRING: Final = """
create temp table noticed on commit drop as
with expiring as (
    select key_id, tenant_id, project_id, name, expires_at, 'expiring ' || key_id || ' ' || extract(epoch from expires_at) as subject
    from api_key
    where expires_at > %(now)s and expires_at <= %(until)s and revoked_at is null and rotated_to is null
)
select subject, tenant_id, extract(epoch from expires_at) as first, 0 as second, jsonb_build_object(
    'key_id', key_id, 'project', project_id, 'name', name,
    'expires_at', to_char(expires_at at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"')) as data
from expiring
where not exists (select from event_told t where t.subject = expiring.subject)
"""

#: Once each, whoever else looks at the same moment.
_TELL_NOTICED: Final = """
with fresh as (
    insert into event_told (subject, told_at) select subject, %(now)s from noticed on conflict do nothing returning subject
)
insert into outbox (kind, tenant_id, at, data)
select %(kind)s, tenant_id, %(now)s, data from noticed join fresh using (subject) order by first, second
"""

_CHANGED_HOURS: Final = """
create temp table noticed on commit drop as
select h.hour, h.tenant_id, h.project_id, h.key_id, h.model, h.currency, h.meter
from usage_hour h left join usage_hour_told t using (hour, tenant_id, project_id, key_id, model, currency, meter)
where h.hour >= %(since)s and h.hour <= %(over)s::timestamptz - interval '1 hour'
  -- The hour in which somebody began to listen is the first that is told, whole.
  and h.hour >= (select date_trunc('hour', min(created_at), 'UTC') from webhook where 'usage.hour' = any(kinds))
  -- An hour whose journals are not read past its end has more to come.
  and not exists (select from journal_state where read_until < h.hour + interval '1 hour')
  and h.request_count is distinct from t.request_count
order by h.hour
limit %(most)s
"""

_TELL_HOURS: Final = """
with changed as (
    select h.hour, h.tenant_id, h.project_id, h.key_id, h.model, h.currency, h.meter, t.hour is not null as is_correction,
           h.request_count - coalesce(t.request_count, 0) as request_count, h.input_tokens - coalesce(t.input_tokens, 0) as input_tokens,
           h.output_tokens - coalesce(t.output_tokens, 0) as output_tokens, h.cached_tokens - coalesce(t.cached_tokens, 0) as cached_tokens,
           h.reasoning_tokens - coalesce(t.reasoning_tokens, 0) as reasoning_tokens, h.amount_nano - coalesce(t.amount_nano, 0) as amount_nano,
           h.quantity - coalesce(t.quantity, 0) as quantity
    from noticed join usage_hour h using (hour, tenant_id, project_id, key_id, model, currency, meter)
        left join usage_hour_told t using (hour, tenant_id, project_id, key_id, model, currency, meter)
    where h.request_count is distinct from t.request_count
), remembered as (
    insert into usage_hour_told as t (hour, tenant_id, project_id, key_id, model, currency, meter, request_count, input_tokens,
                                      output_tokens, cached_tokens, reasoning_tokens, amount_nano, quantity)
    select hour, tenant_id, project_id, key_id, model, currency, meter, request_count, input_tokens, output_tokens, cached_tokens,
           reasoning_tokens, amount_nano, quantity
    from changed
    on conflict (hour, tenant_id, project_id, key_id, model, currency, meter) do update set
        request_count = t.request_count + excluded.request_count, input_tokens = t.input_tokens + excluded.input_tokens,
        output_tokens = t.output_tokens + excluded.output_tokens, cached_tokens = t.cached_tokens + excluded.cached_tokens,
        reasoning_tokens = t.reasoning_tokens + excluded.reasoning_tokens, amount_nano = t.amount_nano + excluded.amount_nano,
        quantity = t.quantity + excluded.quantity
)
insert into outbox (kind, tenant_id, at, data)
select 'usage.hour', tenant_id, hour, jsonb_build_object(
    'hour', to_char(hour at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"'), 'tenant', tenant_id, 'project', project_id,
    'key_id', key_id, 'model', model, 'request_count', request_count, 'input_tokens', input_tokens, 'output_tokens', output_tokens,
    'cached_tokens', cached_tokens, 'reasoning_tokens', reasoning_tokens, 'meter', nullif(meter, ''),
    'quantity', quantity, 'currency', nullif(currency, ''), 'amount_nano', case when currency <> '' then amount_nano end, 'is_correction', is_correction)
from changed
order by hour, tenant_id, project_id, key_id, model, currency, meter
"""


def tell_thresholds(connection: psycopg.Connection[Any], now: datetime) -> int:
    """Tell of each threshold of each window once; a changed amount is another budget. How many."""
    return _tell(connection, "budget.threshold", _CROSSED, _TELL_NOTICED, {"now": now, "percents": list(THRESHOLDS)})


def tell_expiring(connection: psycopg.Connection[Any], now: datetime) -> int:
    """Tell of keys that end within a week and have no successor, each once. How many."""
    return _tell(connection, "key.expiring", _EXPIRING, _TELL_NOTICED, {"now": now, "until": now + EXPIRING_WITHIN})


def tell_hours(connection: psycopg.Connection[Any], now: datetime, *, back: timedelta, most: int = HOURS_PER_LOOK) -> int:
    """
    Tell the sums of hours that are over, and what came to hours of the last *back* since they were told.

    How many; if that is *most*, there may be more.
    """
    words = {"since": now - back, "over": now - HOUR_GRACE, "most": most}
    return _tell(connection, "usage.hour", _CHANGED_HOURS, _TELL_HOURS, words)


def _tell(connection: psycopg.Connection[Any], kind: str, find: str, tell: str, words: dict[str, Any]) -> int:
    with connection.transaction():
        if connection.execute(_WANTED, {"kind": kind}).fetchone() != (True,):
            return 0
        connection.execute(find, words)
        if connection.execute("select exists (select from noticed)").fetchone() != (True,):
            return 0
        connection.execute("select pg_advisory_xact_lock(%s)", (OUTBOX_LOCK,))
        return connection.execute(tell, {**words, "kind": kind}).rowcount
