-- SPDX-License-Identifier: Apache-2.0
-- People name a tenant by its id or by its name.
create index tenant_by_name on tenant (name);

-- Projects carry labels that policies read.
alter table project
    add column name   text check (length(name) between 1 and 100),
    add column labels jsonb not null default '{}' check (jsonb_typeof(labels) = 'object');

-- Service accounts: machines of a project. They sign in with client credentials and get short-lived tokens.
create table service_account (
    service_account_id text primary key check (service_account_id ~ '^sa_[0-9A-Za-z]{12}$'),
    tenant_id          text not null,
    project_id         text not null,
    name               text not null check (length(name) between 1 and 100),
    state              text not null default 'active' check (state in ('active', 'suspended')),
    scopes             text[],
    models             text[],
    denied_models      text[] not null default '{}',
    secret_hash        bytea not null check (length(secret_hash) = 32),
    pepper_version     integer not null,
    -- The secret before the last rotation, while both work.
    previous_secret_hash       bytea check (length(previous_secret_hash) = 32),
    previous_pepper_version    integer,
    previous_secret_expires_at timestamptz,
    created_at         timestamptz not null,
    foreign key (tenant_id, project_id) references project
);
create index service_account_by_tenant on service_account (tenant_id, created_at);

-- What a key may do. Null means every; an empty list means none. Model names may hold `*`.
alter table api_key
    add column state              text not null default 'active' check (state in ('active', 'disabled')),
    add column scopes             text[],
    add column denied_models      text[] not null default '{}',
    add column allowed_cidrs      cidr[],
    add column service_account_id text references service_account,
    add column rotated_to         text references api_key,
    add column last_used_at       timestamptz,
    add column uses_after_rotation bigint not null default 0;

-- Operators: people and programs that use the control API. A role on one tenant, or on all (tenant_id null).
create table operator (
    operator_id    text primary key check (operator_id ~ '^op_[0-9A-Za-z]{12}$'),
    name           text not null check (length(name) between 1 and 100),
    role           text not null check (role in ('platform-admin', 'tenant-admin', 'developer', 'billing-reader', 'auditor')),
    tenant_id      text references tenant,
    token_hash     bytea not null check (length(token_hash) = 32),
    pepper_version integer not null,
    created_at     timestamptz not null,
    expires_at     timestamptz,
    revoked_at     timestamptz,
    check (tenant_id is null or role <> 'platform-admin'),
    check (tenant_id is not null or role in ('platform-admin', 'billing-reader', 'auditor'))
);

-- A bootstrap token makes the first operator, once. Only its hash is here.
create table bootstrap (
    token_hash bytea primary key check (length(token_hash) = 32),
    expires_at timestamptz not null,
    used_at    timestamptz
);

-- Append-only and chained: each entry's hash covers the one before, so a change or a gap shows.
create table audit_event (
    sequence      bigint primary key,
    at            timestamptz not null,
    actor         text not null,
    tenant_id     text,
    action        text not null,
    object        text not null,
    request_id    text not null,
    detail        jsonb not null,
    previous_hash bytea not null check (length(previous_hash) = 32),
    hash          bytea not null check (length(hash) = 32)
);
create index audit_event_by_tenant on audit_event (tenant_id, sequence);
create function refuse_change() returns trigger language plpgsql as $$
begin
    raise exception 'audit_event is append-only';
end $$;
create trigger audit_event_append_only before update or delete or truncate on audit_event
    for each statement execute function refuse_change();

-- The end of the chain. Without it, entries cut off at the end would not show.
create table audit_head (
    is_only  boolean primary key default true check (is_only),
    sequence bigint not null,
    hash     bytea not null check (length(hash) = 32)
);
insert into audit_head (sequence, hash) values (0, decode(repeat('00', 32), 'hex'));

-- Who appends waits here for the one before. As the owner: an entry of any tenant may be the last.
create function lock_audit_head() returns audit_head language sql security definer
    set search_path = pg_catalog, public, pg_temp as $$
    select * from audit_head for update;
$$;
create function advance_audit_head() returns trigger language plpgsql security definer
    set search_path = pg_catalog, public, pg_temp as $$
begin
    update audit_head set sequence = new.sequence, hash = new.hash
    where sequence = new.sequence - 1 and hash = new.previous_hash;
    if not found then
        raise exception 'audit_event % does not follow the one before', new.sequence;
    end if;
    return null;
end $$;
create trigger audit_event_follows after insert on audit_event
    for each row execute function advance_audit_head();

-- What secret-scanning partners have found of ours, so that a second delivery changes nothing.
create table secret_alert (
    alert_hash  bytea primary key check (length(alert_hash) = 32),
    key_id      text,
    source      text not null,
    received_at timestamptz not null
);

create trigger service_account_changed after insert or update or delete on service_account
    for each row execute function notify_change();

-- A key's use is written often and changes no decision: the NOTIFY of 0001 must not fire for it.
drop trigger api_key_changed on api_key;
create trigger api_key_changed after insert or delete on api_key
    for each row execute function notify_change();
create trigger api_key_altered after update on api_key
    for each row
    when ((to_jsonb(old) - 'last_used_at' - 'uses_after_rotation' - 'key_hash' - 'pepper_version')
          is distinct from (to_jsonb(new) - 'last_used_at' - 'uses_after_rotation' - 'key_hash' - 'pepper_version'))
    execute function notify_change();

-- Row-level security: the control plane works as this role, with the tenant it acts for in
-- `peaje.tenant` ("*" for all). A query that forgets its `where` then finds nothing of another tenant,
-- and one that forgets to say for whom finds nothing at all.
do $$
begin
    if not exists (select from pg_roles where rolname = 'peaje_control') then
        create role peaje_control nologin;
    end if;
exception when duplicate_object or unique_violation then null;
end $$;
-- Whoever runs this is, most often, who the control plane signs in as.
do $$
begin
    if not (select rolsuper from pg_roles where rolname = current_user) then
        execute format('grant peaje_control to %I', current_user);
    end if;
exception when insufficient_privilege then null;  -- then the operator grants it, as the control plane will say
end $$;
grant usage on schema public to peaje_control;
grant select, insert, update on tenant, project, api_key, rate_limit, service_account, operator, bootstrap to peaje_control;
grant delete on rate_limit to peaje_control;
grant select, insert on secret_alert to peaje_control;
-- The tables, not the billing views: a view reads as its owner, past the policies below.
grant select on usage_event, usage_hour, usage_conflict, open_exchange, refusal to peaje_control;
grant select, insert on audit_event to peaje_control;
grant select on audit_head to peaje_control;
revoke execute on function lock_audit_head() from public;
grant execute on function lock_audit_head() to peaje_control;

-- Not in SQL, which the planner would look into: it takes `x = '*'` for rare, and so sorts a whole table
-- to show its first page.
create function peaje_may_see(owner text) returns boolean stable parallel safe cost 1 language plpgsql as $$
begin
    return current_setting('peaje.tenant', true) = '*' or owner = current_setting('peaje.tenant', true);
end $$;
do $$
declare
    name text;
begin
    foreach name in array array['tenant', 'project', 'api_key', 'rate_limit', 'service_account', 'usage_event',
                                'usage_hour', 'refusal'] loop
        execute format('alter table %I enable row level security', name);
        execute format('create policy of_tenant on %I to peaje_control using (peaje_may_see(tenant_id))', name);
    end loop;
    foreach name in array array['operator', 'audit_event'] loop
        execute format('alter table %I enable row level security', name);
        execute format('create policy of_tenant on %I to peaje_control using (peaje_may_see(coalesce(tenant_id, ''*'')))', name);
    end loop;
    foreach name in array array['open_exchange', 'usage_conflict'] loop
        execute format('alter table %I enable row level security', name);
        execute format('create policy of_tenant on %I to peaje_control using (peaje_may_see(entry -> ''identity'' ->> ''tenant''))', name);
    end loop;
end $$;
