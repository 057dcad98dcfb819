-- SPDX-License-Identifier: Apache-2.0
-- Whoever closes months, sets prices and adds webhooks for the platform, without keys or tenants.
alter table operator
    drop constraint operator_role_check,
    drop constraint operator_check,
    drop constraint operator_check1,
    add constraint operator_role_check check (role in
        ('platform-admin', 'tenant-admin', 'developer', 'billing-reader', 'billing-admin', 'auditor')),
    add constraint operator_check check (tenant_id is null or role not in ('platform-admin', 'billing-admin')),
    add constraint operator_check1 check
        (tenant_id is not null or role in ('platform-admin', 'billing-reader', 'billing-admin', 'auditor'));

-- Who hears of what. `position` is the last place of the outbox that this webhook is done with.
create table webhook (
    webhook_id     text primary key check (webhook_id ~ '^wh_[0-9A-Za-z]{12}$'),
    -- Null: what happens to any tenant, and to the platform.
    tenant_id      text references tenant,
    name           text not null check (length(name) between 1 and 100),
    url            text not null check (length(url) between 1 and 2000),
    format         text not null check (format in ('standard', 'cloudevents', 'cloudevents-batch', 'lago', 'stripe')),
    kinds          text[] not null check (cardinality(kinds) > 0),
    -- Sealed (chassis/sealing.py), not hashed: whoever signs needs the secret itself.
    secret         bytea,
    previous_secret            bytea,
    previous_secret_expires_at timestamptz,
    -- What the receiver knows us by: its own API key, sent as a bearer token.
    credential     bytea,
    -- failed: paused by us after a long time without a success.
    state          text not null default 'active' check (state in ('active', 'paused', 'failed')),
    position       bigint not null,
    failing_since  timestamptz,
    failure_count  integer not null default 0,
    next_attempt_at timestamptz,
    last_success_at timestamptz,
    -- Events that it wanted and that were trimmed or skipped before it had them.
    missed_count   bigint not null default 0,
    created_at     timestamptz not null,
    check ((previous_secret is null) = (previous_secret_expires_at is null))
);
create index webhook_by_tenant on webhook (tenant_id, created_at);

-- What a receiver calls a tenant, where that is not our id.
create table webhook_customer (
    webhook_id text not null references webhook on delete cascade,
    tenant_id  text not null references tenant,
    customer   text not null check (length(customer) between 1 and 200),
    primary key (webhook_id, tenant_id)
);

-- What happened, written in the transaction that did it. Whoever writes holds OUTBOX_LOCK from before the
-- number is drawn until the commit, so positions become visible in their order and a reader that remembers
-- one number misses nothing.
create table outbox (
    position   bigint generated always as identity primary key,
    event_id   uuid not null default gen_random_uuid(),
    kind       text not null,
    -- Null: the platform's own; webhooks of one tenant never see it.
    tenant_id  text,
    -- Set: for this webhook alone.
    webhook_id text,
    at         timestamptz not null,
    recorded_at timestamptz not null default now(),
    data       jsonb not null
);

-- The latest attempts of each webhook, for people. Never what was sent or answered.
create table webhook_attempt (
    attempt_id   bigint generated always as identity primary key,
    webhook_id   text not null references webhook on delete cascade,
    attempted_at timestamptz not null,
    event_id     uuid not null,
    kind         text not null,
    event_count  integer not null,
    outcome      text not null,
    status       integer,
    duration_ms  integer not null
);
create index webhook_attempt_by_webhook on webhook_attempt (webhook_id, attempt_id);

-- Facts that are told once: a threshold of a window, a key that is about to expire.
create table event_told (
    subject text primary key,
    told_at timestamptz not null
);

-- What was told of each hour; a later change is told as the difference.
create table usage_hour_told (
    hour             timestamptz not null,
    tenant_id        text not null,
    project_id       text not null,
    key_id           text not null,
    model            text not null,
    currency         text not null,
    request_count    bigint not null,
    input_tokens     bigint not null,
    output_tokens    bigint not null,
    cached_tokens    bigint not null,
    reasoning_tokens bigint not null,
    amount_nano      bigint not null,
    primary key (hour, tenant_id, project_id, key_id, model, currency)
);

-- A budget is looked at by its tenant; the primary key begins with the hour.
create index usage_hour_by_tenant on usage_hour (tenant_id, hour);

-- Tell of something, in the caller's transaction, if anybody wants to know. As the owner: one tenant's
-- transaction cannot see the webhooks of all tenants.
create function tell(kind_ text, tenant_ text, at_ timestamptz, data_ jsonb, webhook_ text default null) returns void
    language plpgsql security definer set search_path = pg_catalog, public, pg_temp as $$
begin
    if webhook_ is null and not exists (
        select from webhook w where kind_ = any(w.kinds) and (w.tenant_id is null or w.tenant_id = tenant_)
    ) then
        return;
    end if;
    perform pg_advisory_xact_lock(8098986614484631556);
    insert into outbox (kind, tenant_id, webhook_id, at, data) values (kind_, tenant_, webhook_, at_, data_);
end $$;

-- Where a webhook that is made now begins to listen.
create function outbox_end() returns bigint language sql stable security definer
    set search_path = pg_catalog, public, pg_temp as $$
    select coalesce(max(position), 0) from outbox;
$$;

-- What still waits for a webhook, for whoever wants to skip some of it.
create function outbox_of(webhook_ text) returns setof bigint language sql stable security definer
    set search_path = pg_catalog, public, pg_temp as $$
    select o.position from outbox o, webhook w
    where w.webhook_id = webhook_ and o.position > w.position
      and (o.webhook_id = w.webhook_id or (o.webhook_id is null and o.kind = any(w.kinds)
                                           and (w.tenant_id is null or o.tenant_id = w.tenant_id)));
$$;
revoke execute on function tell(text, text, timestamptz, jsonb, text), outbox_end(), outbox_of(text) from public;
grant execute on function tell(text, text, timestamptz, jsonb, text), outbox_end(), outbox_of(text) to peaje_control;

grant select, insert, update, delete on webhook, webhook_customer to peaje_control;
grant select on webhook_attempt to peaje_control;
alter table webhook enable row level security;
create policy of_tenant on webhook to peaje_control using (peaje_may_see(coalesce(tenant_id, '*')));
alter table webhook_customer enable row level security;
create policy of_webhook on webhook_customer to peaje_control
    using (exists (select from webhook w where w.webhook_id = webhook_customer.webhook_id));
alter table webhook_attempt enable row level security;
create policy of_webhook on webhook_attempt to peaje_control
    using (exists (select from webhook w where w.webhook_id = webhook_attempt.webhook_id));
