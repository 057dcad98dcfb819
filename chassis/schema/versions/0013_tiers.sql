-- SPDX-License-Identifier: Apache-2.0
-- Prices of requests with more than so many input tokens, in place of their card's own for all of their tokens.
-- They are part of the card's one row, so that what keeps a card as it was charged keeps them too.
create function rate_tiers_are_sound(tiers jsonb) returns boolean language sql immutable as $$
    select case when jsonb_typeof(tiers) = 'array' then jsonb_array_length(tiers) <= 8 and coalesce((
        select bool_and(coalesce(
            above_tokens > coalesce(before, 0) and above_tokens <= 100000000
            and input_nano between 0 and 1000000000000000 and output_nano between 0 and 1000000000000000
            and cached_nano between 0 and 1000000000000000 and reasoning_nano between 0 and 1000000000000000, false))
        from (
            select tier.*, lag(above_tokens) over (order by number) as before
            from rows from (jsonb_to_recordset(tiers) as (
                above_tokens bigint, input_nano bigint, output_nano bigint, cached_nano bigint, reasoning_nano bigint
            )) with ordinality as tier (above_tokens, input_nano, output_nano, cached_nano, reasoning_nano, number)
        ) ordered), true) else false end
$$;

-- The tier that a request with so many input tokens falls into; null: the card's own prices.
create function rate_tier(tiers jsonb, input_tokens bigint) returns jsonb language sql immutable as $$
    select tier from jsonb_array_elements(tiers) tier
    where (tier ->> 'above_tokens')::bigint < input_tokens
    order by (tier ->> 'above_tokens')::bigint desc limit 1
$$;

alter table rate_card add column tiers jsonb not null default '[]' check (rate_tiers_are_sound(tiers));
alter table rerating add column tiers jsonb not null default '[]' check (rate_tiers_are_sound(tiers));

-- Which of its card's tiers a row was charged by; null: none of them. It follows from the row and its card, which
-- are both in a closed month's hash.
alter table usage_event add column tier_above_tokens bigint;

-- Each view as it was, with its new columns at the end.
create or replace view billing_usage_v1 as
select request_id, tenant_id as tenant, project_id as project, key_id, model, dialect, started_at, ended_at,
       status, outcome, input_tokens, output_tokens, cached_tokens, reasoning_tokens, basis,
       currency, amount_nano, rate_card_id, meter, quantity, tier_above_tokens
from usage_event;

-- One row for each price that a card has: its own, and those of its tiers.
create view billing_price_tiers_v1 as
select rate_card_id, tenant_id as tenant, model, currency, 0::bigint as above_tokens,
       input_nano, output_nano, cached_nano, reasoning_nano
from rate_card
union all
select c.rate_card_id, c.tenant_id, c.model, c.currency, t.above_tokens,
       t.input_nano, t.output_nano, t.cached_nano, t.reasoning_nano
from rate_card c, jsonb_to_recordset(c.tiers) as t (
    above_tokens bigint, input_nano bigint, output_nano bigint, cached_nano bigint, reasoning_nano bigint);

grant select on billing_price_tiers_v1 to peaje_billing;
