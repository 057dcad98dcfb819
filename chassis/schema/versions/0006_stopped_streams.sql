-- SPDX-License-Identifier: Apache-2.0
-- A stream can be ended by the gateway itself, where its budget ends. Not checked against the rows there are:
-- the new list only adds a word to the old one.
alter table usage_event drop constraint usage_event_outcome_check;
alter table usage_event add constraint usage_event_outcome_check check (outcome in
    ('ok', 'client_closed', 'upstream_error', 'gateway_error', 'refused_by_engine', 'lost', 'budget_exhausted')) not valid;

-- Which journal a life of Envoy writes: whoever waits for what that Envoy has to say waits for this journal alone.
create table journal_life (
    epoch    text primary key,
    journal  text not null,
    seen_at  timestamptz not null
);
