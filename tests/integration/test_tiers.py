# SPDX-License-Identifier: Apache-2.0
"""Rate cards with tiers, on a real Postgres: from the use case to the bill, the replay and the correction."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.types.json import Jsonb

from chassis.errors import Invalid
from chassis.schema.migrate import migrate
from chassis.stores.postgres import ReadPool
from control import explain, invoices, prices, tenants
from control.store import Store
from metering.adapters.invariants import verify
from metering.adapters.replay import replay
from metering.core.rating import RateCard, amount_nano
from ratelimit.adapters.limits_source import LimitsSource
from ratelimit.core.usage import Price, Tier
from tests.integration.test_money import NEXT_MONTH, NOVEMBER, OCTOBER, THEN, act, close, set_price
from tests.integration.test_rerating import rerate, totals
from tests.journals import collect, end, request_id, rows, sums, write

#: Twice the price of all tokens above 200,000 input tokens, and cached ones at a price of their own.
LONG = prices.PriceTier(above_tokens=200_000, input="2", output="4", cached="0.2")


@pytest.fixture
def store(ledger_url: str) -> Iterator[Store]:
    """The control plane's way to a ledger with a tenant."""
    store = Store(ledger_url)
    tenants.create(store, act(THEN), "acme")
    yield store
    store.close()


@pytest.fixture
def live(tmp_path: Path) -> Path:
    """Where a journal's live file is."""
    return tmp_path / "journal" / "journal.jsonl"


def test_each_row_is_charged_by_its_own_length_whatever_else_there_is(store: Store, ledger_url: str, live: Path) -> None:
    """At the bound and beyond it; the row says by which tier, and the sums and the invoice are of the rows."""
    set_price(store, input="1", output="2", tiers=(LONG,))
    write(live, [
        end(1, at=THEN, input=200_000, output=10), end(2, at=THEN, input=200_001, output=10), end(3, at=THEN, input=200_001, cached=200_000, output=0),
        end(4, at=THEN, model="large", input=300_000),
    ])  # fmt: skip

    collect(ledger_url, live, now=THEN)

    amounts = [200_000 * 1000 + 10 * 2000, 200_001 * 2000 + 10 * 4000, 2000 + 200_000 * 200, None]
    assert list(zip(amounts, [None, 200_000, 200_000, None], strict=True)) == rows(
        ledger_url, "select amount_nano, tier_above_tokens from billing_usage_v1 order by request_id"
    )
    total = sum(amount or 0 for amount in amounts)
    assert [(total,)] == rows(ledger_url, "select sum(amount_nano)::bigint from billing_usage_hourly_v1")
    assert [total] == [it["amount_nano"] for it in invoices.invoice(store, act(THEN), "acme", OCTOBER)["totals"]]
    said = [explain.explain(store, act(THEN), request_id(n))["explanation"] for n in (1, 2)]
    assert ["prices of requests with more than 200000 input tokens" in it for it in said] == [False, True]


def test_tiers_are_told_as_they_were_set_and_read_by_the_billing_role(store: Store, ledger_url: str) -> None:
    """Decimal texts beside the integers, from the lowest; a view has a row for each price of a card."""
    higher = prices.PriceTier(above_tokens=1_000_000, input="3", output="5", reasoning="6")
    made = set_price(store, input="1", output="2", tiers=(higher, LONG))

    assert [made] == prices.list_all(store, act(NEXT_MONTH), tenant=None, at=None)
    assert [(200_000, "2.00", "0.20", 4_000_000_000), (1_000_000, "3.00", "3.00", 6_000_000_000)] == [
        (it["above_tokens"], it["input"], it["cached"], it["reasoning_nano"]) for it in made["tiers"]
    ]
    with psycopg.connect(ledger_url) as connection:
        connection.execute("set role peaje_billing")
        found = connection.execute("select above_tokens, input_nano, output_nano from billing_price_tiers_v1 order by 1").fetchall()
    nano = 1_000_000_000
    assert [(0, nano, 2 * nano), (200_000, 2 * nano, 4 * nano), (1_000_000, 3 * nano, 5 * nano)] == found


def test_the_limiter_reads_the_tiers_that_the_ledger_charges_by(store: Store, ledger_url: str) -> None:
    """With the card, as one."""
    del store
    with psycopg.connect(ledger_url, autocommit=True) as connection:
        # As the use case writes it, and in force by Postgres' own clock.
        connection.execute(
            "insert into rate_card (model, currency, input_nano, output_nano, cached_nano, reasoning_nano, tiers, effective, created_at) "
            "values ('tiny', 'USD', 1, 2, 1, 2, %s, tstzrange(now() - interval '1 day', null), now())",
            (Jsonb([stored(above_tokens=7, input_nano=3, output_nano=4, cached_nano=2)]),),
        )
    pool = ReadPool(ledger_url, name="test", connections=1)
    try:
        found = LimitsSource(pool).price(model="tiny", tenant_id="acme")
    finally:
        pool.close()

    tier = Tier(above_tokens=7, input_nano=3, output_nano=4, cached_nano=2, reasoning_nano=1)
    assert Price(currency="USD", input_nano=1, output_nano=2, cached_nano=1, reasoning_nano=2, tiers=(tier,)) == found


@pytest.mark.parametrize(
    ("tiers", "words"),
    [
        ((LONG, LONG), "two tiers above 200000 tokens"),
        ((replace(LONG, above_tokens=0),), "above 0 tokens"),
        ((replace(LONG, above_tokens=-5),), "above -5 tokens"),
        ((replace(LONG, above_tokens=100_000_001),), "above 100000001 tokens"),
        ((replace(LONG, input="-1"),), "input above 200000 tokens is '-1'"),
        ((replace(LONG, reasoning="1e3"),), "reasoning above 200000 tokens is"),
        ((replace(LONG, output="1000000.01"),), "at most 1000000"),
        (tuple(replace(LONG, above_tokens=n) for n in range(1, 10)), "at most 8 tiers"),
    ],
)
def test_a_wrong_tier_is_one_clear_sentence_and_changes_nothing(store: Store, tiers: tuple[prices.PriceTier, ...], words: str) -> None:
    """The present price holds on."""
    before = set_price(store)

    with pytest.raises(Invalid, match=words):
        set_price(store, at=THEN, tiers=tiers)

    assert [before] == prices.list_all(store, act(NEXT_MONTH), tenant=None, at=None)


def test_as_many_tiers_as_there_may_be_are_taken(store: Store) -> None:
    """The bound itself."""
    made = set_price(store, tiers=tuple(replace(LONG, above_tokens=n) for n in range(1, 9)))

    assert list(range(1, 9)) == [tier["above_tokens"] for tier in made["tiers"]]


def stored(**changes: Any) -> dict[str, Any]:
    """A tier as the card's row has it."""
    prices_of_it = dict.fromkeys(("input_nano", "output_nano", "cached_nano", "reasoning_nano"), 1)
    return {name: value for name, value in ({"above_tokens": 6} | prices_of_it | changes).items() if value is not None}


@pytest.mark.parametrize(
    "tiers",
    [
        {}, 7, [stored(above_tokens=0)], [stored(reasoning_nano=None)], [stored(input_nano=-1)], [stored(), stored()],
        [stored(above_tokens=n) for n in range(1, 10)],
    ],
)
def test_the_database_itself_refuses_tiers_that_could_not_be_charged_by(ledger_url: str, store: Store, tiers: Any) -> None:
    """Also of somebody who goes past the use case; and those that are there never change."""
    set_price(store, tiers=(LONG,))
    with psycopg.connect(ledger_url, autocommit=True) as connection:
        with pytest.raises(psycopg.errors.CheckViolation):
            connection.execute(
                "insert into rate_card (model, currency, input_nano, output_nano, cached_nano, reasoning_nano, tiers, effective, created_at) "
                "values ('large', 'USD', 1, 1, 1, 1, %s, tstzrange('2027-01-01', null), now())", (Jsonb(tiers),),
            )
        with pytest.raises(psycopg.errors.RaiseException, match="append-only"):
            connection.execute("update rate_card set tiers = '[]'")


def test_a_journal_with_tiers_is_replayed_to_the_same_sums_in_any_order(
    store: Store, ledger_url: str, empty_database: Callable[[], str], live: Path
) -> None:
    """No row's price depends on another's; the ledger verifies, and not one that says another tier."""
    set_price(store, input="1", output="2", tiers=(LONG,))
    chance = random.Random(8)
    lines = [end(n, at=THEN, input=chance.randint(199_990, 200_010), output=chance.randint(0, 90)) for n in range(300)]
    write(live, lines)
    collect(ledger_url, live, now=THEN)
    into, other = empty_database(), live.parent.parent / "other" / "journal.jsonl"
    migrate(into, NEXT_MONTH.date())
    write(other, chance.sample(lines, len(lines)))

    done = replay(other, into, prices_from=ledger_url, now=NEXT_MONTH)

    assert sums(ledger_url) == sums(into)
    by_tier = "select tier_above_tokens, count(*), sum(amount_nano) from billing_usage_v1 group by 1 order by 1"
    assert rows(ledger_url, by_tier) == rows(into, by_tier)
    with psycopg.connect(ledger_url) as connection:
        assert verify(connection).holds and done.sums_digest == verify(connection).sums_digest
        connection.execute("set session_replication_role = replica")
        connection.execute("update usage_event set tier_above_tokens = 7 where request_id = %s", (request_id(1),))
        broken = [verdict.invariant for verdict in verify(connection).verdicts if verdict.violations]
        connection.rollback()
    assert ["each amount is what its rate card says, and the card held at admission"] == broken


def test_a_closed_month_with_tiers_verifies_and_a_late_row_is_an_adjustment_by_its_tier(store: Store, ledger_url: str, live: Path) -> None:
    """The amount and the card are in the root hash, and with them the tier."""
    set_price(store, input="1", output="2", tiers=(LONG,))
    write(live, [end(1, at=THEN, input=200_001, output=0)])
    collect(ledger_url, live, now=NEXT_MONTH)
    close(store)

    write(live, [end(2, at=THEN, input=300_000, output=0)])
    collect(ledger_url, live, now=NEXT_MONTH)

    assert invoices.verify(store, act(NEXT_MONTH), OCTOBER)["ok"]
    assert [(OCTOBER, "usage", 400_002_000), (NOVEMBER, "adjustment", 600_000_000)] == rows(
        ledger_url, "select period, kind, amount_nano from billing_invoice_v1 order by 1"
    )


def test_a_price_is_corrected_with_its_tiers_by_the_ledgers_own_rounding(store: Store, ledger_url: str, live: Path) -> None:
    """A thousand random requests around the bounds, to the nano; the same again finds nothing."""
    set_price(store, input="1", output="2")
    chance = random.Random(10)
    tiers = (prices.PriceTier(above_tokens=1000, input="0.123456789", output="0.9", cached="0.011111111"), replace(LONG, above_tokens=2000))
    card = RateCard(
        rate_card_id=1, tenant_id=None, model="tiny", currency="USD", input_nano=77, output_nano=88, cached_nano=77,
        reasoning_nano=88, minimum_nano=0, meter="", each_nano=0, starts_at=THEN, ends_at=None,
        tiers=prices.tiers(prices.Price(model="tiny", input="0", output="0", tiers=tiers)),
    )
    counts = [(chance.choice([0, 999, 1000, 1001, 2000, 2001, chance.randrange(3000)]), chance.randrange(500)) for _ in range(1000)]
    write(live, [end(n, at=THEN, input=i, output=o, cached=i // 3) for n, (i, o) in enumerate(counts)])
    collect(ledger_url, live, now=THEN)
    fields: dict[str, Any] = {"input": "0.000000077", "output": "0.000000088", "tiers": tiers}

    shown = rerate(store, apply=False, **fields)
    rerate(store, **fields)
    again = rerate(store, **fields)

    expected = sum(amount_nano(card, input_tokens=i, output_tokens=o, cached_tokens=i // 3, reasoning_tokens=0) or 0 for i, o in counts)
    assert [expected] == totals(store)
    assert shown["difference_nano"] == expected - rows(ledger_url, "select sum(amount_nano)::bigint from usage_event")[0][0]
    assert [] == again["tenants"]
    assert [[1000, 2000]] == [[tier["above_tokens"] for tier in tiers] for (tiers,) in rows(ledger_url, "select tiers from rerating")]
    with psycopg.connect(ledger_url) as connection:
        assert verify(connection).holds
