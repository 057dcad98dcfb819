-- SPDX-License-Identifier: Apache-2.0
-- The capacity of the pool behind a served model: requests under way, tokens a second. Once it is full,
-- tenants have it in parts by weight. A model that is not here is shared by whoever comes first.
create table pool_capacity (
    model              text primary key check (length(model) between 1 and 200),
    slots              integer check (slots between 1 and 1000000),
    tokens_per_second  bigint check (tokens_per_second between 1 and 1000000000),
    updated_at         timestamptz not null,
    check (slots is not null or tokens_per_second is not null)
);
-- A tenant that is not here has 1.
create table tenant_weight (
    tenant_id   text primary key references tenant,
    weight      integer not null check (weight between 1 and 1000),
    updated_at  timestamptz not null
);

-- Heard by whoever hears limits. A pool is everybody's: nobody is named.
create function notify_fair_share() returns trigger language plpgsql as $$
begin
    perform pg_notify('peaje_rate_limit', coalesce(to_jsonb(coalesce(new, old)) ->> 'tenant_id', ''));
    return null;
end $$;
create trigger pool_capacity_changed after insert or update or delete on pool_capacity
    for each row execute function notify_fair_share();
create trigger tenant_weight_changed after insert or update or delete on tenant_weight
    for each row execute function notify_fair_share();

grant select, insert, update, delete on pool_capacity, tenant_weight to peaje_control;
alter table tenant_weight enable row level security;
create policy of_tenant on tenant_weight to peaje_control using (peaje_may_see(tenant_id));
-- What a pool can take is told to all, and set by the platform.
alter table pool_capacity enable row level security;
create policy read on pool_capacity for select to peaje_control using (true);
create policy write on pool_capacity to peaje_control using (peaje_may_see('*'));
