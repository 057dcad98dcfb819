-- SPDX-License-Identifier: Apache-2.0
-- Tenants: who pays. The id is a slug, immutable, safe in a Redis hash tag and a metric label.
create table tenant (
    tenant_id   text primary key check (tenant_id ~ '^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$'),
    name        text not null check (length(name) between 1 and 100),
    state       text not null default 'active' check (state in ('active', 'suspended')),
    created_at  timestamptz not null
);

-- Projects: what a tenant divides its keys by. Every tenant starts with one called default.
create table project (
    tenant_id   text not null references tenant,
    project_id  text not null check (project_id ~ '^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$'),
    state       text not null default 'active' check (state in ('active', 'suspended')),
    created_at  timestamptz not null,
    primary key (tenant_id, project_id)
);

-- API keys: a keyed hash, never the key. `models` null means every model.
create table api_key (
    key_id         text primary key check (key_id ~ '^[0-9A-Za-z]{12}$'),
    tenant_id      text not null,
    project_id     text not null,
    name           text not null check (length(name) between 1 and 100),
    environment    text not null check (environment in ('live', 'test')),
    key_hash       bytea not null check (length(key_hash) = 32),
    pepper_version integer not null,
    last_four      text not null check (length(last_four) = 4),
    models         text[],
    created_at     timestamptz not null,
    expires_at     timestamptz,
    revoked_at     timestamptz,
    foreign key (tenant_id, project_id) references project
);
create index api_key_by_tenant on api_key (tenant_id, created_at);

-- Limits: null means any. The most specific do not replace the general ones: all that match must allow.
create table rate_limit (
    limit_id             bigint generated always as identity primary key,
    tenant_id            text not null references tenant,
    key_id               text references api_key,
    model                text,
    requests_per_minute  bigint check (requests_per_minute between 0 and 1000000000),
    tokens_per_minute    bigint check (tokens_per_minute between 0 and 1000000000000),
    updated_at           timestamptz not null,
    check (requests_per_minute is not null or tokens_per_minute is not null),
    unique nulls not distinct (tenant_id, key_id, model)
);

-- One payload per change so that every process evicts just what changed.
create function notify_change() returns trigger language plpgsql as $$
declare
    changed jsonb := to_jsonb(coalesce(new, old));
begin
    perform pg_notify('peaje_' || tg_table_name, coalesce(changed ->> 'key_id', changed ->> 'tenant_id'));
    return null;
end $$;
create trigger tenant_changed after insert or update or delete on tenant
    for each row execute function notify_change();
create trigger project_changed after insert or update or delete on project
    for each row execute function notify_change();
create trigger api_key_changed after insert or update or delete on api_key
    for each row execute function notify_change();
create trigger rate_limit_changed after insert or update or delete on rate_limit
    for each row execute function notify_change();

-- How far the collector has read each journal. Advances in the transaction that writes the rows.
create table journal_position (
    journal      text primary key,
    file_id      text not null,
    byte_offset  bigint not null check (byte_offset >= 0),
    updated_at   timestamptz not null
);

-- Exchanges that have started and not ended: the last that their Envoy told us.
create table open_exchange (
    request_id  text primary key,
    started_at  timestamptz not null,
    seen_at     timestamptz not null,
    journal     text not null,
    epoch       text not null,
    entry       jsonb not null
);

-- One row per admitted request, for ever. started_at comes from the journal's first record and is
-- equal in every record of a stream, so the key dedupes across midnight.
create table usage_event (
    request_id       text not null,
    tenant_id        text not null,
    project_id       text not null,
    key_id           text not null,
    model            text not null,
    dialect          text not null,
    started_at       timestamptz not null,
    ended_at         timestamptz not null,
    status           integer not null,
    outcome          text not null check (outcome in
        ('ok', 'client_closed', 'upstream_error', 'gateway_error', 'refused_by_engine', 'lost')),
    input_tokens     bigint not null check (input_tokens >= 0),
    output_tokens    bigint not null check (output_tokens >= 0),
    cached_tokens    bigint not null check (cached_tokens >= 0),
    reasoning_tokens bigint not null check (reasoning_tokens >= 0),
    basis            text not null check (basis in
        ('reported', 'running', 'counted', 'checkpoint', 'estimated', 'none')),
    anomaly          text,
    streamed         boolean not null,
    upstream         text,
    currency         text,
    amount_nano      bigint,
    rate_card_id     bigint,
    recorded_at      timestamptz not null,
    primary key (started_at, request_id)
) partition by range (started_at);
create index usage_event_by_tenant on usage_event (tenant_id, started_at);
create index usage_event_by_request on usage_event (request_id);

-- A second, different payload for a request that already has its row: kept, never applied in silence.
create table usage_conflict (
    request_id   text not null,
    started_at   timestamptz not null,
    recorded_at  timestamptz not null,
    entry        jsonb not null
);

-- Refusals of authenticated callers, for `peaje explain`. Bounded by the collector in rate and age.
create table refusal (
    request_id  text primary key,
    started_at  timestamptz not null,
    tenant_id   text not null,
    key_id      text not null,
    model       text not null,
    status      integer not null,
    details     text not null
);
create index refusal_by_age on refusal (started_at);

-- Hourly sums, kept by the collector in the same transaction as the rows.
create table usage_hour (
    hour             timestamptz not null,
    tenant_id        text not null,
    project_id       text not null,
    key_id           text not null,
    model            text not null,
    request_count    bigint not null,
    input_tokens     bigint not null,
    output_tokens    bigint not null,
    cached_tokens    bigint not null,
    reasoning_tokens bigint not null,
    primary key (hour, tenant_id, project_id, key_id, model)
);

create view billing_usage_v1 as
select request_id, tenant_id as tenant, project_id as project, key_id, model, dialect, started_at, ended_at,
       status, outcome, input_tokens, output_tokens, cached_tokens, reasoning_tokens, basis,
       currency, amount_nano, rate_card_id
from usage_event;

create view billing_usage_hourly_v1 as
select hour, tenant_id as tenant, project_id as project, key_id, model, request_count,
       input_tokens, output_tokens, cached_tokens, reasoning_tokens
from usage_hour;

-- The billing team reads views and nothing else. Creating a role may be forbidden on a managed
-- Postgres; then the operator creates it first and this only grants.
do $$
begin
    -- Asked first: without the right to create roles, even an existing one is refused as a right, not as a duplicate.
    if not exists (select from pg_roles where rolname = 'peaje_billing') then
        create role peaje_billing nologin;
    end if;
-- Roles are shared by all databases of a server: another one's migration may be just ahead.
exception when duplicate_object or unique_violation then null;
end $$;
grant usage on schema public to peaje_billing;
grant select on billing_usage_v1, billing_usage_hourly_v1 to peaje_billing;
