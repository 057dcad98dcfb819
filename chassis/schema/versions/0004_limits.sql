-- SPDX-License-Identifier: Apache-2.0
-- One row per number: what is counted (unit), over what (period), how many (amount). Null in a
-- scope column means any. All that match must allow.
alter table rate_limit
    drop constraint rate_limit_tenant_id_key_id_model_key,
    drop constraint rate_limit_check,
    add column project_id     text,
    add column unit           text check (unit in
        ('requests', 'tokens', 'input_tokens', 'output_tokens', 'cached_tokens', 'money', 'concurrency')),
    add column period         text check (period in
        ('second', 'minute', 'hour', 'day', 'calendar_day', 'calendar_month', 'ever', 'now')),
    -- Money in nano-units. Beyond nine million of a currency a double, in which the counter store
    -- computes, is no longer exact.
    add column amount         bigint check (amount between 0 and 9000000000000000),
    add column burst          bigint check (burst between 0 and 1000000000000),
    add column effect         text not null default 'refuse' check (effect in ('refuse', 'count', 'shadow')),
    add column on_store_error text not null default 'local' check (on_store_error in ('local', 'allow', 'deny')),
    add column currency       text check (currency ~ '^[A-Z]{3}$'),
    add foreign key (tenant_id, project_id) references project;

insert into rate_limit (tenant_id, key_id, model, unit, period, amount, updated_at)
select tenant_id, key_id, model, 'requests', 'minute', requests_per_minute, updated_at
from rate_limit where requests_per_minute is not null
union all
select tenant_id, key_id, model, 'tokens', 'minute', tokens_per_minute, updated_at
from rate_limit where tokens_per_minute is not null;
delete from rate_limit where unit is null;

alter table rate_limit
    drop column requests_per_minute,
    drop column tokens_per_minute,
    alter column unit set not null,
    alter column period set not null,
    alter column amount set not null,
    add unique nulls not distinct (tenant_id, project_id, key_id, model, unit, period),
    add check ((unit = 'concurrency') = (period = 'now')),
    add check ((unit = 'money') = (currency is not null)),
    add check (unit <> 'money' or period in ('calendar_day', 'calendar_month', 'ever')),
    add check (burst is null or period in ('second', 'minute', 'hour', 'day'));

-- Budgets are admitted at the prices in force: a new one acts at once.
create trigger rate_card_changed after insert or update on rate_card
    for each row execute function notify_change();
