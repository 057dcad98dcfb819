-- SPDX-License-Identifier: Apache-2.0
-- Whose record was the last one read, per stream of a journal. Lives of one Envoy follow each other
-- within a stream; between two streams nothing follows.
create table journal_stream (
    journal text not null,
    stream  text not null,
    epoch   text not null,
    primary key (journal, stream)
);

-- Lives of Envoy that are over: their open exchanges are closed.
create table ended_life (
    journal  text not null,
    epoch    text not null,
    ended_at timestamptz not null,
    primary key (journal, epoch)
);

-- What the second witness (Envoy's log over gRPC) has said and was compared with the ledger, per hour of
-- the exchanges' starts. agreed_count + disagreed_count is all of it: each disagreement is an exception below.
create table witness_hour (
    hour            timestamptz primary key,
    agreed_count    bigint not null,
    disagreed_count bigint not null
);

-- Everything that two sources say differently, until a person or a later fact says why.
create table reconciliation_exception (
    exception_id  bigint generated always as identity primary key,
    -- row_missing, tenant_differs, usage_differs: the second witness and the ledger.
    -- conflict: two records of the journal (see usage_conflict).
    kind          text not null check (kind in ('row_missing', 'tenant_differs', 'usage_differs', 'conflict')),
    request_id    text not null,
    started_at    timestamptz not null,
    tenant_id     text not null,
    -- What the other source says; null if it says nothing of it.
    input_tokens  bigint,
    output_tokens bigint,
    ledger_tenant_id     text,
    ledger_input_tokens  bigint,
    ledger_output_tokens bigint,
    found_at      timestamptz not null,
    -- explained: the cause is known. signed: it is not, and somebody answers for that.
    state         text not null default 'open' check (state in ('open', 'explained', 'signed')),
    note          text check (length(note) between 1 and 500),
    actor         text,
    decided_at    timestamptz,
    unique (request_id, kind),
    check ((state = 'open') = (note is null)),
    check (num_nulls(note, actor, decided_at) in (0, 3))
);
create index reconciliation_exception_open on reconciliation_exception (started_at) where state = 'open';
create index reconciliation_exception_by_tenant on reconciliation_exception (tenant_id, started_at);

create function refuse_second_decision() returns trigger language plpgsql as $$
declare
    decision constant text[] := array['state', 'note', 'actor', 'decided_at'];
begin
    if tg_op = 'DELETE' or old.state <> 'open' or to_jsonb(new) - decision <> to_jsonb(old) - decision then
        raise exception 'a reconciliation exception is decided once and never removed';
    end if;
    return new;
end $$;
create trigger reconciliation_exception_decided_once before update or delete on reconciliation_exception
    for each row execute function refuse_second_decision();

-- Conflicts that were there before.
insert into reconciliation_exception (kind, request_id, started_at, tenant_id, found_at)
select distinct on (request_id) 'conflict', request_id, started_at, coalesce(entry -> 'identity' ->> 'tenant', ''), recorded_at
from usage_conflict order by request_id, recorded_at;

create view billing_reconciliation_v1 as
select exception_id, kind, request_id, started_at, tenant_id as tenant, state, input_tokens, output_tokens,
       ledger_tenant_id as ledger_tenant, ledger_input_tokens, ledger_output_tokens, found_at, note, actor, decided_at
from reconciliation_exception;

grant select on billing_reconciliation_v1 to peaje_billing;
grant select on witness_hour, reconciliation_exception to peaje_control;
grant update (state, note, actor, decided_at) on reconciliation_exception to peaje_control;
alter table reconciliation_exception enable row level security;
create policy of_tenant on reconciliation_exception to peaje_control using (peaje_may_see(tenant_id));
