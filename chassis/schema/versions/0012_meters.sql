-- SPDX-License-Identifier: Apache-2.0
-- What a request is metered by besides tokens, or instead of them: images, characters, searches. Whole numbers.
-- A row of one meter is never added to one of another: the meter is part of each sum's key.
alter table usage_event
    add column meter    text check (meter in ('images', 'characters', 'searches')),
    add column quantity bigint not null default 0 check (quantity >= 0),
    add check ((meter is null) = (quantity = 0));

alter table usage_hour
    drop constraint usage_hour_pkey,
    add column meter    text not null default '',
    add column quantity bigint not null default 0,
    add primary key (hour, tenant_id, project_id, key_id, model, currency, meter);
alter table usage_hour_told
    drop constraint usage_hour_told_pkey,
    add column meter    text not null default '',
    add column quantity bigint not null default 0,
    add primary key (hour, tenant_id, project_id, key_id, model, currency, meter);
alter table invoice_line
    drop constraint invoice_line_pkey,
    add column meter    text not null default '',
    add column quantity bigint not null default 0,
    add primary key (period, tenant_id, project_id, model, currency, meter);
alter table adjustment
    add column meter    text not null default '',
    add column quantity bigint not null default 0;

-- A card may have a price for one meter: nano-currency for each.
alter table rate_card
    add column meter     text not null default '' check (meter in ('', 'images', 'characters', 'searches')),
    add column each_nano bigint not null default 0 check (each_nano between 0 and 1000000000000000),
    add check (meter <> '' or each_nano = 0);
alter table rerating
    add column meter     text not null default '',
    add column each_nano bigint not null default 0;

-- Each view as it was, with its new columns at the end.
create or replace view billing_usage_v1 as
select request_id, tenant_id as tenant, project_id as project, key_id, model, dialect, started_at, ended_at,
       status, outcome, input_tokens, output_tokens, cached_tokens, reasoning_tokens, basis,
       currency, amount_nano, rate_card_id, meter, quantity
from usage_event;

create or replace view billing_usage_hourly_v1 as
select hour, tenant_id as tenant, project_id as project, key_id, model, request_count,
       input_tokens, output_tokens, cached_tokens, reasoning_tokens,
       nullif(currency, '') as currency, case when currency <> '' then amount_nano end as amount_nano,
       nullif(meter, '') as meter, quantity
from usage_hour;

create or replace view billing_usage_daily_v1 as
select (hour at time zone 'UTC')::date as day, tenant_id as tenant, project_id as project, key_id, model,
       sum(request_count)::bigint as request_count, sum(input_tokens)::bigint as input_tokens,
       sum(output_tokens)::bigint as output_tokens, sum(cached_tokens)::bigint as cached_tokens,
       sum(reasoning_tokens)::bigint as reasoning_tokens,
       nullif(currency, '') as currency, case when currency <> '' then sum(amount_nano) end::bigint as amount_nano,
       nullif(meter, '') as meter, sum(quantity)::bigint as quantity
from usage_hour
group by 1, tenant_id, project_id, key_id, model, usage_hour.currency, usage_hour.meter;

create or replace view billing_adjustments_v1 as
select period, of_period, request_id, started_at, tenant_id as tenant, project_id as project, model,
       input_tokens, output_tokens, cached_tokens, reasoning_tokens, reason, created_at,
       nullif(currency, '') as currency, case when currency <> '' then amount_nano end as amount_nano,
       nullif(meter, '') as meter, quantity
from adjustment;

do $$
declare
    body constant text := $body$
with line as (
    select period, tenant_id, project_id, model, 'usage' as kind, currency, meter, request_count, input_tokens, output_tokens,
           cached_tokens, reasoning_tokens, quantity, amount_nano
    from invoice_line
    union all
    select date_trunc('month', hour at time zone 'UTC')::date, tenant_id, project_id, model, 'usage', currency, meter,
           sum(request_count), sum(input_tokens), sum(output_tokens), sum(cached_tokens), sum(reasoning_tokens),
           sum(quantity), sum(amount_nano)
    from usage_hour
    -- Months up to the newest closed one are the lines above.
    where hour >= coalesce((select max(period) + interval '1 month' from billing_period) at time zone 'UTC', '-infinity')
    group by 1, 2, 3, 4, currency, meter
    union all
    select period, tenant_id, project_id, model, 'adjustment', currency, meter, count(*), sum(input_tokens), sum(output_tokens),
           sum(cached_tokens), sum(reasoning_tokens), sum(quantity), sum(amount_nano)
    from adjustment
    group by 1, 2, 3, 4, currency, meter
    union all
    -- Only the difference of the amount: what was used is in the lines above.
    select period, tenant_id, project_id, model, 'rerating', currency, '', sum(request_count), 0, 0, 0, 0, 0, sum(amount_nano)
    from rerating_line
    group by 1, 2, 3, 4, currency
)
select period, tenant_id as tenant, project_id as project, model, kind, request_count::bigint as request_count,
       input_tokens::bigint as input_tokens, output_tokens::bigint as output_tokens,
       cached_tokens::bigint as cached_tokens, reasoning_tokens::bigint as reasoning_tokens,
       nullif(currency, '') as currency, case when currency <> '' then amount_nano end::bigint as amount_nano,
       case when exists (select from billing_period p where p.period >= line.period) then 'closed' else 'open' end as state,
       nullif(meter, '') as meter, quantity::bigint as quantity
from line
$body$;
begin
    execute 'create or replace view billing_invoice_v1 as ' || body;
    execute 'create or replace view control_invoice with (security_invoker = true) as ' || body;
end $$;

create or replace view billing_prices_v1 as
select rate_card_id, tenant_id as tenant, model, currency, input_nano, output_nano, cached_nano, reasoning_nano,
       minimum_nano, lower(effective) as effective_from, upper(effective) as effective_until,
       nullif(meter, '') as meter, each_nano
from rate_card;

-- Journals whose Envoy is gone for good: nothing waits for them any more. One that is read again after all is simply
-- there again, and what comes with it is late.
create table retired_journal (
    journal      text not null,
    retired_at   timestamptz not null,
    retired_by   text not null,
    reason       text not null check (length(reason) between 1 and 500),
    -- Up to when it had been read to its end.
    read_until   timestamptz not null,
    -- Exchanges of it that had no end, and were closed with what was last heard of them.
    closed_count bigint not null,
    -- Whether somebody has looked through its files, or they are gone with their disk.
    files        text not null check (files in ('read', 'gone')),
    primary key (journal, retired_at)
);
create trigger retired_journal_append_only before update or delete on retired_journal
    for each row execute function refuse_row_change();

grant select on journal_state, journal_position to peaje_control;
grant delete on journal_state, open_exchange to peaje_control;
grant select, insert on retired_journal to peaje_control;
