-- SPDX-License-Identifier: Apache-2.0
-- A journal is several files once it is rotated: a place in each.
alter table journal_position
    drop constraint journal_position_pkey,
    add column file_name text not null default '',
    add primary key (journal, file_id);

-- Up to when a journal was read to its end: a period closes only behind the slowest of them.
create table journal_state (
    journal    text primary key,
    read_until timestamptz not null
);

-- Bytes of a journal that were no record, and files that were changed under the collector. Never their content.
create table journal_defect (
    journal     text not null,
    file_id     text not null,
    file_name   text not null,
    byte_offset bigint not null,
    byte_count  bigint not null,
    digest      text not null,
    reason      text not null,
    recorded_at timestamptz not null,
    primary key (journal, file_id, byte_offset, digest, reason)
);

-- Silence is measured by the collector's steady clock: it marks what it last heard, waits, and looks again.
alter table open_exchange add column marked_at timestamptz;

-- Read twice, a contradiction is still one.
alter table usage_conflict add column digest text not null generated always as (md5(entry::text)) stored;
create unique index usage_conflict_once on usage_conflict (request_id, digest);

-- Rate cards: integers in nano-currency per million tokens. tenant_id null: for every tenant without its own.
-- A range over text lets an ordinary GiST index compare scopes: `btree_gist`, which managed servers may
-- refuse to install, is not needed.
create type text_span as range (subtype = text, collation = "C");
create table rate_card (
    rate_card_id   bigint generated always as identity primary key,
    tenant_id      text,
    model          text not null check (model <> ''),
    currency       text not null check (currency ~ '^[A-Z]{3}$'),
    input_nano     bigint not null check (input_nano between 0 and 1000000000000000),
    output_nano    bigint not null check (output_nano between 0 and 1000000000000000),
    cached_nano    bigint not null check (cached_nano between 0 and 1000000000000000),
    reasoning_nano bigint not null check (reasoning_nano between 0 and 1000000000000000),
    minimum_nano   bigint not null default 0 check (minimum_nano between 0 and 1000000000000000),
    effective      tstzrange not null check (not isempty(effective) and lower_inc(effective) and not upper_inc(effective)
                                             and lower(effective) is not null),
    created_at     timestamptz not null,
    scope          text not null generated always as (coalesce(tenant_id, '') || '/' || model) stored,
    constraint rate_card_no_overlap exclude using gist (text_span(scope, scope, '[]') with &&, effective with &&)
);

-- A price that was charged never changes; only the end of its time may still be set.
create function refuse_price_change() returns trigger language plpgsql as $$
begin
    -- A generated column is not there yet before the row is written.
    if tg_op = 'DELETE' or to_jsonb(new) - 'effective' - 'scope' <> to_jsonb(old) - 'effective' - 'scope'
        or lower(new.effective) <> lower(old.effective) then
        raise exception 'rate_card is append-only';
    end if;
    return new;
end $$;
create trigger rate_card_append_only before update or delete on rate_card
    for each row execute function refuse_price_change();

create function refuse_row_change() returns trigger language plpgsql as $$
begin
    raise exception '% is append-only', tg_table_name;
end $$;
create trigger usage_event_append_only before update on usage_event
    for each row execute function refuse_row_change();

-- Sums with money. Rows without a rate card are summed apart: currency ''.
alter table usage_hour
    drop constraint usage_hour_pkey,
    add column currency    text not null default '',
    add column amount_nano bigint not null default 0,
    add primary key (hour, tenant_id, project_id, key_id, model, currency);

-- Closed months, in order: a month that is not after the newest of these never changes any more.
create table billing_period (
    period     date primary key check (extract(day from period) = 1),
    closed_at  timestamptz not null,
    closed_by  text not null,
    -- Why it was closed although something was unexplained; null if nothing was.
    exception  text,
    row_count  bigint not null,
    root_hash  bytea not null check (length(root_hash) = 32)
);
create trigger billing_period_append_only before update or delete on billing_period
    for each row execute function refuse_row_change();

-- What the root hash is made of.
create table billing_period_hour (
    period    date not null,
    hour      timestamptz primary key,
    row_count bigint not null,
    hash      bytea not null check (length(hash) = 32)
);
create trigger billing_period_hour_append_only before update or delete on billing_period_hour
    for each row execute function refuse_row_change();
create table invoice_line (
    period           date not null,
    tenant_id        text not null,
    project_id       text not null,
    model            text not null,
    currency         text not null,
    request_count    bigint not null,
    input_tokens     bigint not null,
    output_tokens    bigint not null,
    cached_tokens    bigint not null,
    reasoning_tokens bigint not null,
    amount_nano      bigint not null,
    primary key (period, tenant_id, project_id, model, currency)
);
create trigger invoice_line_append_only before update or delete on invoice_line
    for each row execute function refuse_row_change();

-- Facts that came after their period was closed, charged in the first open one.
create table adjustment (
    request_id       text primary key,
    period           date not null,
    of_period        date not null check (of_period < period),
    started_at       timestamptz not null,
    tenant_id        text not null,
    project_id       text not null,
    model            text not null,
    currency         text not null,
    input_tokens     bigint not null,
    output_tokens    bigint not null,
    cached_tokens    bigint not null,
    reasoning_tokens bigint not null,
    amount_nano      bigint not null,
    reason           text not null check (reason in ('late_usage')),
    created_at       timestamptz not null
);
create index adjustment_by_period on adjustment (period, tenant_id);
create trigger adjustment_append_only before update or delete on adjustment
    for each row execute function refuse_row_change();

-- Days whose rows were removed after their retention; their sums, hashes and invoice lines stay.
create table usage_retired (
    day        date primary key,
    row_count  bigint not null,
    retired_at timestamptz not null
);

-- What the engines of a pool counted between two quiet moments, and what the ledger has of it.
create table conservation_check (
    model                text not null,
    started_at           timestamptz not null,
    ended_at             timestamptz not null,
    -- busy: the pool was never quiet; reset: an engine was restarted. Neither can be compared.
    state                text not null check (state in ('compared', 'busy', 'reset')),
    engine_input_tokens  bigint not null,
    engine_output_tokens bigint not null,
    ledger_input_tokens  bigint not null,
    ledger_output_tokens bigint not null,
    request_count        bigint not null,
    -- Requests that were cut: the engine may have generated more than anybody received.
    cut_count            bigint not null,
    primary key (model, ended_at)
);

drop view billing_usage_hourly_v1;
create view billing_usage_hourly_v1 as
select hour, tenant_id as tenant, project_id as project, key_id, model, request_count,
       input_tokens, output_tokens, cached_tokens, reasoning_tokens,
       nullif(currency, '') as currency, case when currency <> '' then amount_nano end as amount_nano
from usage_hour;

create view billing_usage_daily_v1 as
select (hour at time zone 'UTC')::date as day, tenant_id as tenant, project_id as project, key_id, model,
       sum(request_count)::bigint as request_count, sum(input_tokens)::bigint as input_tokens,
       sum(output_tokens)::bigint as output_tokens, sum(cached_tokens)::bigint as cached_tokens,
       sum(reasoning_tokens)::bigint as reasoning_tokens,
       nullif(currency, '') as currency, case when currency <> '' then sum(amount_nano) end::bigint as amount_nano
from usage_hour
group by 1, tenant_id, project_id, key_id, model, usage_hour.currency;

create view billing_adjustments_v1 as
select period, of_period, request_id, started_at, tenant_id as tenant, project_id as project, model,
       input_tokens, output_tokens, cached_tokens, reasoning_tokens, reason, created_at,
       nullif(currency, '') as currency, case when currency <> '' then amount_nano end as amount_nano
from adjustment;

-- Twice the same: once for the billing role, which may read views only, and once for the control
-- plane, which reads as itself, so that row-level security holds.
do $$
declare
    body constant text := $body$
with line as (
    select period, tenant_id, project_id, model, 'usage' as kind, currency, request_count, input_tokens, output_tokens,
           cached_tokens, reasoning_tokens, amount_nano
    from invoice_line
    union all
    select date_trunc('month', hour at time zone 'UTC')::date, tenant_id, project_id, model, 'usage', currency,
           sum(request_count), sum(input_tokens), sum(output_tokens), sum(cached_tokens), sum(reasoning_tokens),
           sum(amount_nano)
    from usage_hour
    -- Months up to the newest closed one are the lines above.
    where hour >= coalesce((select max(period) + interval '1 month' from billing_period) at time zone 'UTC', '-infinity')
    group by 1, 2, 3, 4, currency
    union all
    select period, tenant_id, project_id, model, 'adjustment', currency, count(*), sum(input_tokens), sum(output_tokens),
           sum(cached_tokens), sum(reasoning_tokens), sum(amount_nano)
    from adjustment
    group by 1, 2, 3, 4, currency
)
select period, tenant_id as tenant, project_id as project, model, kind, request_count::bigint as request_count,
       input_tokens::bigint as input_tokens, output_tokens::bigint as output_tokens,
       cached_tokens::bigint as cached_tokens, reasoning_tokens::bigint as reasoning_tokens,
       nullif(currency, '') as currency, case when currency <> '' then amount_nano end::bigint as amount_nano,
       case when exists (select from billing_period p where p.period >= line.period) then 'closed' else 'open' end as state
from line
$body$;
begin
    execute 'create view billing_invoice_v1 as ' || body;
    execute 'create view control_invoice with (security_invoker = true) as ' || body;
end $$;

create view billing_prices_v1 as
select rate_card_id, tenant_id as tenant, model, currency, input_nano, output_nano, cached_nano, reasoning_nano,
       minimum_nano, lower(effective) as effective_from, upper(effective) as effective_until
from rate_card;

grant select on billing_usage_hourly_v1, billing_usage_daily_v1, billing_adjustments_v1, billing_invoice_v1,
    billing_prices_v1 to peaje_billing;

grant select, insert, update on rate_card to peaje_control;
grant select, insert on billing_period, billing_period_hour, invoice_line to peaje_control;
grant select on adjustment, control_invoice, journal_position, journal_state, journal_defect, usage_retired,
    conservation_check to peaje_control;
do $$
declare
    name text;
begin
    foreach name in array array['adjustment', 'invoice_line'] loop
        execute format('alter table %I enable row level security', name);
        execute format('create policy of_tenant on %I to peaje_control using (peaje_may_see(tenant_id))', name);
    end loop;
    -- A price for everybody may be read by everybody.
    alter table rate_card enable row level security;
    create policy of_tenant on rate_card to peaje_control
        using (tenant_id is null or peaje_may_see(tenant_id)) with check (peaje_may_see(coalesce(tenant_id, '*')));
end $$;
