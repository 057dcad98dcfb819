-- SPDX-License-Identifier: Apache-2.0
-- Credits: what a tenant has paid in advance. One currency each; the tenant's prepaid budget follows the book.
create table credit_book (
    tenant_id     text primary key references tenant,
    currency      text not null check (currency ~ '^[A-Z]{3}$'),
    -- What the ledger had charged when the first credit came: that was not paid by credits.
    baseline_nano bigint not null,
    opened_at     timestamptz not null
);

create table credit_grant (
    grant_id    text primary key check (grant_id ~ '^cg_[0-9A-Za-z]{12}$'),
    tenant_id   text not null references credit_book,
    amount_nano bigint not null check (amount_nano > 0),
    expires_at  timestamptz,
    reason      text not null check (length(reason) between 1 and 500),
    -- Of the payer's own: a second grant with it is the first one again.
    reference   text check (length(reference) between 1 and 200),
    created_by  text not null,
    created_at  timestamptz not null,
    unique (tenant_id, reference)
);
create index credit_grant_by_tenant on credit_grant (tenant_id, created_at);

-- Where money is: in a grant, or at one of the three places that it comes from and goes to.
create table credit_account (
    account_id bigint generated always as identity primary key,
    tenant_id  text not null references credit_book,
    kind       text not null check (kind in ('issued', 'grant', 'used', 'expired')),
    grant_id   text references credit_grant,
    check ((kind = 'grant') = (grant_id is not null)),
    unique nulls not distinct (tenant_id, kind, grant_id)
);

create table credit_transaction (
    transaction_id bigint generated always as identity primary key,
    tenant_id      text not null references credit_book,
    kind           text not null check (kind in ('grant', 'consume', 'return', 'expire')),
    at             timestamptz not null,
    actor          text not null,
    reason         text not null
);
create index credit_transaction_by_tenant on credit_transaction (tenant_id, transaction_id);

create table credit_entry (
    transaction_id bigint not null references credit_transaction,
    account_id     bigint not null references credit_account,
    amount_nano    bigint not null check (amount_nano <> 0),
    primary key (transaction_id, account_id)
);
create index credit_entry_by_account on credit_entry (account_id);

-- At the end of each transaction: its entries sum to nothing, on accounts of one tenant, and no grant is overdrawn.
create function check_credit_transaction() returns trigger language plpgsql as $$
begin
    if (select count(*) < 2 or sum(e.amount_nano) <> 0 or bool_or(a.tenant_id <> new.tenant_id)
        from credit_entry e join credit_account a using (account_id) where e.transaction_id = new.transaction_id) then
        raise exception 'the entries of credit_transaction % do not balance', new.transaction_id using errcode = 'check_violation';
    end if;
    return null;
end $$;
create constraint trigger credit_transaction_balances after insert on credit_transaction deferrable initially deferred
    for each row execute function check_credit_transaction();
create function check_credit_entry() returns trigger language plpgsql as $$
begin
    if (select sum(amount_nano) <> 0 from credit_entry where transaction_id = new.transaction_id) then
        raise exception 'the entries of credit_transaction % do not balance', new.transaction_id using errcode = 'check_violation';
    end if;
    if (select sum(e.amount_nano) < 0 from credit_entry e join credit_account a using (account_id)
        where e.account_id = new.account_id and a.kind = 'grant') then
        raise exception 'credit_account % is overdrawn', new.account_id using errcode = 'check_violation';
    end if;
    return null;
end $$;
create constraint trigger credit_entry_balances after insert on credit_entry deferrable initially deferred
    for each row execute function check_credit_entry();

do $$
declare
    name text;
begin
    foreach name in array array['credit_book', 'credit_grant', 'credit_account', 'credit_transaction', 'credit_entry'] loop
        execute format('create trigger %I before update or delete on %I for each row execute function refuse_row_change()',
                       name || '_append_only', name);
    end loop;
end $$;

-- A price that was wrong: what each request of a month would have cost by the right one. Rows never change;
-- the differences are lines of the month, or of the first open one if it is closed.
create table rerating (
    rerating_id    bigint generated always as identity primary key,
    model          text not null,
    -- Null: every tenant that was charged by the general price.
    tenant_id      text,
    starts_at      timestamptz not null,
    ends_at        timestamptz not null check (ends_at > starts_at),
    currency       text not null check (currency ~ '^[A-Z]{3}$'),
    input_nano     bigint not null,
    output_nano    bigint not null,
    cached_nano    bigint not null,
    reasoning_nano bigint not null,
    minimum_nano   bigint not null,
    reason         text not null,
    applied_by     text not null,
    applied_at     timestamptz not null
);
create table rerated_row (
    rerating_id bigint not null references rerating,
    request_id  text not null,
    started_at  timestamptz not null,
    tenant_id   text not null,
    -- Null: it had no price.
    before_nano bigint,
    after_nano  bigint not null,
    primary key (request_id, rerating_id)
);
create table rerating_line (
    rerating_id   bigint not null references rerating,
    period        date not null check (extract(day from period) = 1),
    of_period     date not null check (of_period <= period),
    tenant_id     text not null,
    project_id    text not null,
    model         text not null,
    currency      text not null,
    request_count bigint not null,
    -- Requests among them that had no price before.
    unpriced_count bigint not null,
    -- The difference, of either sign.
    amount_nano   bigint not null,
    primary key (rerating_id, tenant_id, project_id)
);
create index rerating_line_by_period on rerating_line (period, tenant_id);
create trigger rerating_append_only before update or delete on rerating for each row execute function refuse_row_change();
create trigger rerated_row_append_only before update or delete on rerated_row for each row execute function refuse_row_change();
create trigger rerating_line_append_only before update or delete on rerating_line for each row execute function refuse_row_change();

-- Usage that did not pass by Envoy, under the id that its poster gave it.
create table external_usage (
    request_id  text primary key,
    tenant_id   text not null references tenant,
    external_id text not null check (length(external_id) between 1 and 200),
    posted_by   text not null,
    posted_at   timestamptz not null,
    unique (tenant_id, external_id)
);
create index external_usage_by_age on external_usage (posted_at);

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
    union all
    -- Only the difference of the amount: the tokens are in the lines above.
    select period, tenant_id, project_id, model, 'rerating', currency, sum(request_count), 0, 0, 0, 0, sum(amount_nano)
    from rerating_line
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
    execute 'create or replace view billing_invoice_v1 as ' || body;
    execute 'create or replace view control_invoice with (security_invoker = true) as ' || body;
end $$;

create view billing_reratings_v1 as
select rerating_id, l.period, l.of_period, l.tenant_id as tenant, l.project_id as project, l.model, l.currency, l.request_count,
       l.unpriced_count, l.amount_nano, r.reason, r.applied_by, r.applied_at
from rerating_line l join rerating r using (rerating_id);

create view billing_credits_v1 as
select g.grant_id, g.tenant_id as tenant, b.currency, g.amount_nano as granted_nano, coalesce(sum(e.amount_nano), 0)::bigint as remaining_nano,
       g.expires_at, g.reason, g.reference, g.created_by, g.created_at
from credit_grant g join credit_book b using (tenant_id)
    left join credit_account a on a.grant_id = g.grant_id left join credit_entry e using (account_id)
group by g.grant_id, b.currency;

create view billing_credit_entries_v1 as
select t.transaction_id, t.tenant_id as tenant, t.kind, a.kind as account, a.grant_id, b.currency, e.amount_nano, t.at, t.actor, t.reason
from credit_entry e join credit_transaction t using (transaction_id) join credit_account a using (account_id)
    join credit_book b on b.tenant_id = t.tenant_id;

create view billing_external_usage_v1 as
select request_id, tenant_id as tenant, external_id, posted_by, posted_at from external_usage;

grant select on billing_reratings_v1, billing_credits_v1, billing_credit_entries_v1, billing_external_usage_v1 to peaje_billing;

grant select, insert on credit_book, credit_grant, credit_account, credit_transaction, credit_entry, rerating, rerated_row,
    rerating_line, external_usage to peaje_control;
-- Usage from outside is written by the control plane; each row still goes in once, and none is ever changed.
grant insert on usage_event, adjustment, outbox to peaje_control;
grant insert, update on usage_hour to peaje_control;
do $$
declare
    name text;
begin
    foreach name in array array['credit_book', 'credit_grant', 'credit_account', 'credit_transaction', 'rerated_row', 'rerating_line',
                                'external_usage'] loop
        execute format('alter table %I enable row level security', name);
        execute format('create policy of_tenant on %I to peaje_control using (peaje_may_see(tenant_id))', name);
    end loop;
    alter table credit_entry enable row level security;
    create policy of_transaction on credit_entry to peaje_control
        using (exists (select from credit_transaction t where t.transaction_id = credit_entry.transaction_id));
    alter table rerating enable row level security;
    create policy of_tenant on rerating to peaje_control using (peaje_may_see(coalesce(tenant_id, '*')));
end $$;
