-- SPDX-License-Identifier: Apache-2.0
-- What each lease of quotas was spent on: the sums of the rows of its requests, kept by the collector in the same
-- transaction as the rows, and dropped some time after the last of them.
create table lease_use (
    lease_id      text not null,
    -- Of the rows that have a price; the others are summed apart: ''.
    currency      text not null default '',
    tenant_id     text not null,
    request_count bigint not null,
    input_tokens  bigint not null,
    output_tokens bigint not null,
    cached_tokens bigint not null,
    amount_nano   bigint not null,
    -- When the last row was added.
    recorded_at   timestamptz not null,
    primary key (lease_id, currency)
);
create index lease_use_by_age on lease_use (recorded_at);

-- What under-way requests may still add to. A column, as an index over the entry itself would have each update of
-- an entry make new index entries. Whatever is no request id is no lease.
alter table open_exchange add column lease_id text generated always as (
    substring(entry -> 'admission' ->> 'lease' from '^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$')
) stored;
create index open_exchange_by_lease on open_exchange (lease_id) where lease_id is not null;

-- Who retires a journal closes its open exchanges.
grant select, insert, update on lease_use to peaje_control;
alter table lease_use enable row level security;
create policy of_tenant on lease_use to peaje_control using (peaje_may_see(tenant_id));
