-- SPDX-License-Identifier: Apache-2.0
-- A stream can be ended by the gateway itself, where its budget ends. Not checked against the rows there are:
-- the new list only adds a word to the old one.
alter table usage_event drop constraint usage_event_outcome_check;
alter table usage_event add constraint usage_event_outcome_check check (outcome in
    ('ok', 'client_closed', 'upstream_error', 'gateway_error', 'refused_by_engine', 'lost', 'budget_exhausted')) not valid;
