# SPDX-License-Identifier: Apache-2.0
"""
Ask the ledger whether it holds: each invariant is one query that finds what breaks it.

Days whose rows were retired are judged by their sums and hashes only.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Final

import psycopg
from psycopg.pq import TransactionStatus
from psycopg.rows import tuple_row

from metering.adapters.periods import changes, closed_periods

#: Broken things named per invariant; all of them are counted.
EXAMPLES_MAX: Final = 3

_KEPT: Final = "not exists (select from usage_retired r where r.day = (started_at at time zone 'UTC')::date)"

#: What must hold, and a query for what does not: one text per violation.
_INVARIANTS: Final = (
    (
        "no exchange is both open and ended",
        "select o.request_id from open_exchange o join usage_event u using (started_at, request_id)",
    ),
    (
        "a request has one row over all days",
        "select request_id from usage_event group by request_id having count(*) > 1",
    ),
    (
        "hourly sums equal the sums of the rows",
        f"""
        with counted as (
            select date_trunc('hour', started_at, 'UTC') as hour, tenant_id, project_id, key_id, model,
                   coalesce(currency, '') as currency, coalesce(meter, '') as meter, count(*)::numeric as requests,
                   sum(input_tokens) as input, sum(output_tokens) as output, sum(cached_tokens) as cached,
                   sum(reasoning_tokens) as reasoning, sum(quantity) as quantity, coalesce(sum(amount_nano), 0) as amount
            from usage_event where {_KEPT} group by 1, 2, 3, 4, 5, 6, 7
        ), kept as (
            select hour, tenant_id, project_id, key_id, model, currency, meter, request_count::numeric, input_tokens::numeric,
                   output_tokens::numeric, cached_tokens::numeric, reasoning_tokens::numeric, quantity::numeric,
                   amount_nano::numeric
            from usage_hour h
            where not exists (select from usage_retired r where r.day = (h.hour at time zone 'UTC')::date)
        ), differing as ((table counted except table kept) union all (table kept except table counted))
        select distinct concat_ws(' ', hour, tenant_id, model) from differing
        """,
    ),
    (
        "lines of closed months and their later adjustments equal the hourly sums",
        """
        with charged as (
            select period, tenant_id, project_id, model, currency, meter, request_count, input_tokens, output_tokens, quantity,
                   amount_nano
            from invoice_line
            union all
            select of_period, tenant_id, project_id, model, currency, meter, 1, input_tokens, output_tokens, quantity, amount_nano
            from adjustment
            union all
            select date_trunc('month', hour at time zone 'UTC')::date, tenant_id, project_id, model, currency, meter,
                   -request_count, -input_tokens, -output_tokens, -quantity, -amount_nano
            from usage_hour
            where hour < (select max(period) + interval '1 month' from billing_period) at time zone 'UTC'
        )
        select concat_ws(' ', period, tenant_id, project_id, model) from charged
        group by period, tenant_id, project_id, model, currency, meter
        having (sum(request_count), sum(input_tokens), sum(output_tokens), sum(quantity), sum(amount_nano))
               is distinct from (0, 0, 0, 0, 0)
        """,
    ),
    (
        "an adjustment says what its row says, of a month that was closed before",
        f"""
        select a.request_id from adjustment a left join usage_event u using (request_id)
        where (a.tenant_id, a.project_id, a.model, a.currency, a.amount_nano, a.input_tokens, a.output_tokens, a.meter,
               a.quantity, a.started_at)
              is distinct from (u.tenant_id, u.project_id, u.model, coalesce(u.currency, ''), coalesce(u.amount_nano, 0),
                                u.input_tokens, u.output_tokens, coalesce(u.meter, ''), u.quantity, u.started_at)
          and {_KEPT.replace("started_at", "a.started_at")}
        """,
    ),
    (
        "what the second witness saw is in the ledger with its tenant and tokens, or is an exception",
        """
        with excepted as (
            select date_trunc('hour', started_at, 'UTC') as hour, count(*) as n from reconciliation_exception
            where kind <> 'conflict' group by 1
        )
        select to_char(coalesce(w.hour, e.hour) at time zone 'UTC', 'YYYY-MM-DD HH24:MI') || ' UTC'
        from witness_hour w full join excepted e using (hour)
        where coalesce(w.disagreed_count, 0) <> coalesce(e.n, 0)
        """,
    ),
    (
        "a record that contradicts a row is an exception",
        """
        select c.request_id from usage_conflict c
        where not exists (select from reconciliation_exception e where e.request_id = c.request_id and e.kind = 'conflict')
        """,
    ),
    (
        "cached tokens are part of the input, reasoning tokens of the output, and none means none",
        """
        select request_id from usage_event
        where cached_tokens > input_tokens or reasoning_tokens > output_tokens
           or (basis = 'none' and input_tokens + output_tokens + quantity > 0)
        """,
    ),
    (
        "an amount has a currency and a rate card, or there is none of the three",
        """
        select request_id from usage_event
        where num_nulls(currency, amount_nano, rate_card_id) not in (0, 3)
        """,
    ),
    (
        "each amount is what its rate card says, and the card held at admission",
        """
        select u.request_id from usage_event u left join rate_card c using (rate_card_id)
            left join lateral rate_tier(c.tiers, u.input_tokens) as t (tier) on c.tiers <> '[]'
        where u.rate_card_id is not null and not coalesce(
            c.model = u.model and coalesce(c.tenant_id, u.tenant_id) = u.tenant_id and c.currency = u.currency
            and c.effective @> u.started_at
            and u.amount_nano = case when u.input_tokens + u.output_tokens + u.quantity = 0 then 0 else greatest(c.minimum_nano,
                case when u.meter = c.meter then u.quantity * c.each_nano else 0 end + div(
                2 * (  (u.input_tokens - u.cached_tokens)::numeric * coalesce((t.tier ->> 'input_nano')::bigint, c.input_nano)
                     + u.cached_tokens::numeric * coalesce((t.tier ->> 'cached_nano')::bigint, c.cached_nano)
                     + (u.output_tokens - u.reasoning_tokens)::numeric * coalesce((t.tier ->> 'output_nano')::bigint, c.output_nano)
                     + u.reasoning_tokens::numeric * coalesce((t.tier ->> 'reasoning_nano')::bigint, c.reasoning_nano)
                    ) + 1000000, 2000000)) end
            and u.tier_above_tokens is not distinct from (t.tier ->> 'above_tokens')::bigint, false)
        """,
    ),
    (
        "the entries of each credit transaction sum to 0, and so do all together",
        """
        select 'transaction ' || t.transaction_id from credit_transaction t left join credit_entry e using (transaction_id)
        group by t.transaction_id having count(e) < 2 or sum(e.amount_nano) <> 0
        union all
        select 'all' from credit_entry having sum(amount_nano) <> 0
        """,
    ),
    (
        "no grant of credits is overdrawn, and what was granted is its first entry",
        """
        select g.grant_id from credit_grant g left join credit_account a using (grant_id) left join credit_entry e using (account_id)
            left join credit_transaction t using (transaction_id)
        group by g.grant_id
        having coalesce(sum(e.amount_nano), -1) < 0
            or sum(e.amount_nano) filter (where t.kind = 'grant') is distinct from g.amount_nano
        """,
    ),
    (
        "a re-rating's lines are the sums of its rows, and each row goes on from the amount before it",
        """
        (select concat_ws(' ', 'rerating', rerating_id) from
            (select rerating_id, tenant_id, count(*) as rows, sum(after_nano - coalesce(before_nano, 0)) as amount
             from rerated_row group by 1, 2) r
            full join (select rerating_id, tenant_id, sum(request_count) as rows, sum(amount_nano) as amount
                       from rerating_line group by 1, 2) l using (rerating_id, tenant_id)
         where (r.rows, r.amount) is distinct from (l.rows, l.amount))
        union all
        (select request_id from (
            select request_id, before_nano, lag(after_nano) over same as previous, row_number() over same as number
            from rerated_row window same as (partition by request_id order by rerating_id)
         ) chained where number > 1 and before_nano is distinct from previous)
        union all
        (select r.request_id from (select distinct on (request_id) * from rerated_row order by request_id, rerating_id) r
            join usage_event u using (started_at, request_id)
         where r.before_nano is distinct from u.amount_nano)
        """,
    ),
)

#: Nothing is broken by these, and a person should know of them.
_NOTES: Final = {
    "journal_defects": "select count(*) from journal_defect",
    "usage_conflicts": "select count(*) from usage_conflict",
    "exceptions_open": "select count(*) from reconciliation_exception where state = 'open'",
    # The witness may miss any number; all of them, hour after hour, is a witness that is not there. It sees nothing of
    # what was posted from outside.
    "requests_not_witnessed": (
        "select coalesce(sum(greatest(h.requests - coalesce(e.requests, 0) - coalesce(w.agreed_count + w.disagreed_count, 0), 0)), 0)::bigint "
        "from (select hour, sum(request_count) as requests from usage_hour group by 1) h left join witness_hour w using (hour) "
        "left join (select date_trunc('hour', started_at, 'UTC') as hour, count(*) as requests from usage_event "
        "where dialect = 'external' group by 1) e using (hour)"
    ),
    "open_exchanges": "select count(*) from open_exchange",
    "engine_drifts": (
        "select count(*) from conservation_check where state = 'compared' "
        "and (engine_input_tokens, engine_output_tokens) <> (ledger_input_tokens, ledger_output_tokens)"
    ),
    "requests_without_price": "select count(*) from usage_event where amount_nano is null and input_tokens + output_tokens + quantity > 0",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether one invariant holds."""

    invariant: str
    violations: int
    examples: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """All verdicts, and what a person should know besides."""

    verdicts: list[Verdict]
    notes: dict[str, int]
    #: SHA-256 over the hourly sums: equal in two ledgers if and only if the sums are.
    sums_digest: str

    @property
    def holds(self) -> bool:
        """Whether every invariant holds."""
        return not any(verdict.violations for verdict in self.verdicts)


def verify(connection: psycopg.Connection[Any]) -> Verification:
    """Look at the whole ledger, in one snapshot; within a transaction of the caller's, in its own."""
    is_ours = connection.info.transaction_status is TransactionStatus.IDLE
    with connection.transaction(), connection.cursor(row_factory=tuple_row) as cursor:
        if is_ours:
            # The collector goes on meanwhile.
            cursor.execute("set transaction isolation level repeatable read, read only")
        verdicts = []
        for invariant, query in _INVARIANTS:
            broken = [str(row[0]) for row in cursor.execute(query).fetchall()]
            verdicts.append(_verdict(invariant, broken))
        changed = [text for closed in closed_periods(connection) for text in changes(connection, closed)]
        verdicts.append(_verdict("closed months are what they were", changed))
        notes = {}
        for name, query in _NOTES.items():
            [(notes[name],)] = cursor.execute(query).fetchall()
        return Verification(verdicts=verdicts, notes=notes, sums_digest=sums_digest(connection))


def sums_digest(connection: psycopg.Connection[Any]) -> str:
    """SHA-256 over the hourly sums in their one order."""
    digest = hashlib.sha256()
    with connection.cursor(row_factory=tuple_row) as cursor:
        cursor.execute(
            "select extract(epoch from hour)::bigint, tenant_id, project_id, key_id, model, currency, request_count, "
            "input_tokens, output_tokens, cached_tokens, reasoning_tokens, amount_nano, meter, quantity from usage_hour "
            'order by hour, tenant_id collate "C", project_id collate "C", key_id collate "C", model collate "C", '
            'currency collate "C", meter collate "C"'
        )
        for row in cursor:
            digest.update(("\t".join(map(str, row)) + "\n").encode())
    return digest.hexdigest()


def _verdict(invariant: str, broken: list[str]) -> Verdict:
    return Verdict(invariant=invariant, violations=len(broken), examples=broken[:EXAMPLES_MAX])
