# SPDX-License-Identifier: Apache-2.0
"""A price that was wrong: what it changes, and that no row does."""

from __future__ import annotations

import random
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

from chassis.errors import Conflict, Invalid
from control import credits, invoices, prices, reratings, tenants  # noqa: A004
from control.act import ALL_TENANTS, Act
from control.minting import Mint
from control.store import Store
from metering.adapters.invariants import verify
from metering.core.rating import RateCard, amount_nano
from tests.integration.control_plane import CATALOGUE
from tests.journals import collect, end, images, rows, write

THEN = datetime(2026, 10, 11, 9, 30, tzinfo=UTC)
NEXT_MONTH = datetime(2026, 11, 2, 8, 0, tzinfo=UTC)
OCTOBER, NOVEMBER = date(2026, 10, 1), date(2026, 11, 1)


def act(at: datetime = THEN) -> Act:
    """An operator of the platform, at a moment."""
    return Act(actor="op_test", scope=ALL_TENANTS, request_id="test", now=at)


@pytest.fixture
def store(ledger_url: str) -> Iterator[Store]:
    """Two tenants and one price for everybody: 1.00 in, 2.00 out."""
    store = Store(ledger_url)
    for name in ("acme", "bolt"):
        tenants.create(store, act(), name)
    set_price(store, input="1", output="2")
    yield store
    store.close()


@pytest.fixture
def live(tmp_path: Path) -> Path:
    return tmp_path / "journal/journal.jsonl"


def set_price(store: Store, **fields: Any) -> None:
    at = THEN - timedelta(days=10)
    prices.put(store, act(at), prices.Price(**({"model": "tiny"} | fields)), catalogue=CATALOGUE, clock=lambda: at)


def rerate(store: Store, *, apply: bool = True, at: datetime = THEN, month: date = OCTOBER, starts: str | None = None, ends: str | None = None, reason: str = "a typo", **fields: Any) -> dict[str, Any]:
    price = prices.Price(**({"model": "tiny", "input": "3", "output": "2"} | fields))
    asked = reratings.Asked(price=price, month=month, starts=starts, ends=ends, reason=reason)
    return reratings.rerate(store, act(at), asked, is_applied=apply)


def totals(store: Store, tenant: str = "acme", month: date = OCTOBER) -> list[int]:
    return [it["amount_nano"] for it in invoices.invoice(store, act(), tenant, month)["totals"]]


def differences(document: dict[str, Any]) -> list[tuple[Any, ...]]:
    return [(it["tenant_id"], it["request_count"], it["before_nano"], it["after_nano"]) for it in document["tenants"]]


def test_a_dry_run_shows_the_differences_and_changes_nothing(store: Store, ledger_url: str, live: Path) -> None:
    """Per tenant, in nano and as people write it."""
    write(live, [end(1, at=THEN, input=1000, output=10), end(2, at=THEN, tenant="bolt", input=500, output=0)])
    collect(ledger_url, live, now=THEN)
    before = totals(store)

    shown = rerate(store, apply=False)

    assert [("acme", 1, 1_020_000, 3_020_000), ("bolt", 1, 500_000, 1_500_000)] == differences(shown)
    assert ("0.003", None, []) == (shown["difference"], shown["rerating_id"], shown["obstacles"])
    assert before == totals(store)
    assert [(0, 0)] == rows(ledger_url, "select (select count(*) from rerating), (select count(*) from audit_event where action = 'usage.rerated')")


def test_an_open_months_invoice_gets_a_line_and_its_rows_stay(store: Store, ledger_url: str, live: Path) -> None:
    """Audited; the same again finds nothing, another correction goes on from there."""
    write(live, [end(1, at=THEN, input=1000, output=10), end(2, at=THEN, input=1000, output=0)])
    collect(ledger_url, live, now=THEN)
    frozen = rows(ledger_url, "select * from usage_event order by request_id")

    first = rerate(store)
    again = rerate(store)
    after_first = totals(store)
    back = rerate(store, input="1")

    assert [2_020_000 + 4_000_000] == after_first and [2_020_000] == totals(store)
    assert (1, None, [], -4_000_000) == (first["rerating_id"], again["rerating_id"], again["tenants"], back["difference_nano"])
    assert frozen == rows(ledger_url, "select * from usage_event order by request_id")
    lines = [it for it in invoices.invoice(store, act(), "acme", OCTOBER)["lines"] if it["kind"] == "rerating"]
    assert [(4, 0, 0)] == [(it["request_count"], it["amount_nano"], it["input_tokens"]) for it in lines]
    assert [("op_test", "a typo")] * 2 == rows(ledger_url, "select actor, detail->'after'->>'reason' from audit_event where action = 'usage.rerated'")
    assert [(OCTOBER, OCTOBER, 4_000_000), (OCTOBER, OCTOBER, -4_000_000)] == rows(
        ledger_url, "select period, of_period, amount_nano from billing_reratings_v1 order by rerating_id"
    )


def test_a_meters_price_is_corrected_like_any_other(store: Store, ledger_url: str, live: Path) -> None:
    """Rows that only the meter can charge are left alone by a correction that says nothing of it."""
    write(live, [images(1, 2, at=THEN), end(2, at=THEN, input=1000, output=0)])
    collect(ledger_url, live, now=THEN)

    of_tokens = rerate(store, apply=False)
    of_images = rerate(store, input="1", meter="images", each="0.04")
    corrected = rerate(store, input="1", meter="images", each="0.05", reason="another typo")

    assert [("acme", 1, 1_000_000, 3_000_000)] == differences(of_tokens)
    assert [("acme", 1, 0, 80_000_000)] == differences(of_images)
    assert [("acme", 1, 80_000_000, 100_000_000)] == differences(corrected)
    assert [101_000_000] == totals(store)
    with psycopg.connect(ledger_url) as connection:
        assert verify(connection).holds


def test_a_closed_month_is_charged_in_the_first_open_one_and_stays_what_it_was(store: Store, ledger_url: str, live: Path) -> None:
    """Its invoice and its root hash do not move; the next month's close has the line under its own hash."""
    write(live, [end(1, at=THEN, input=1000, output=0), end(2, at=NEXT_MONTH, input=1000, output=0)])
    collect(ledger_url, live, now=NEXT_MONTH)
    invoices.close(store, act(NEXT_MONTH), OCTOBER, exception=None)
    closed = invoices.invoice(store, act(), "acme", OCTOBER)

    rerate(store, at=NEXT_MONTH)

    assert closed == invoices.invoice(store, act(), "acme", OCTOBER)
    assert invoices.verify(store, act(NEXT_MONTH), OCTOBER)["ok"]
    assert [1_000_000 + 2_000_000] == totals(store, month=NOVEMBER)
    later = datetime(2026, 12, 3, tzinfo=UTC)
    collect(ledger_url, live, now=later)
    invoices.close(store, act(later), NOVEMBER, exception=None)
    assert invoices.verify(store, act(later), NOVEMBER)["ok"]
    with psycopg.connect(ledger_url) as connection:
        connection.execute("set session_replication_role = replica")
        connection.execute("update rerating_line set amount_nano = amount_nano + 1")
        broken = [verdict.invariant for verdict in verify(connection).verdicts if verdict.violations]
        connection.rollback()
    assert 2 == len(broken), broken


def test_what_had_no_price_is_priced_and_then_a_month_closes(store: Store, ledger_url: str, live: Path) -> None:
    """The usual reason to re-rate."""
    write(live, [end(1, at=THEN, model="large", input=1000, output=0)])
    collect(ledger_url, live, now=NEXT_MONTH)
    with pytest.raises(Conflict, match="no price"):
        invoices.close(store, act(NEXT_MONTH), OCTOBER, exception=None)

    done = rerate(store, model="large", input="5", output="5")

    assert [1] == [it["unpriced_count"] for it in done["tenants"]]
    document = invoices.invoice(store, act(), "acme", OCTOBER)
    assert (0, [5_000_000]) == (document["requests_without_price"], totals(store))
    invoices.close(store, act(NEXT_MONTH), OCTOBER, exception=None)


def test_what_came_late_without_a_price_holds_up_the_month_that_it_is_charged_in(store: Store, ledger_url: str, live: Path) -> None:
    """Re-rated it is charged there, and both months' invoices say how many requests are still without a price."""
    write(live, [end(1, at=THEN, model="large", input=1000, output=0)])
    collect(ledger_url, live, now=NEXT_MONTH)
    invoices.close(store, act(NEXT_MONTH), OCTOBER, exception="large has no price")
    write(live, [end(2, at=THEN, model="large", input=2000, output=0)])
    later = datetime(2026, 12, 3, tzinfo=UTC)
    collect(ledger_url, live, now=later)

    def unpriced() -> list[int]:
        return [invoices.invoice(store, act(), "acme", month)["requests_without_price"] for month in (OCTOBER, NOVEMBER)]

    assert [1, 1] == unpriced()
    with pytest.raises(Conflict, match="1 exchanges charged in it used something and have no price"):
        invoices.close(store, act(later), NOVEMBER, exception=None)

    rerate(store, model="large", input="5", output="5", at=later)

    assert [0, 0] == unpriced()
    assert [15_000_000] == totals(store, month=NOVEMBER)
    invoices.close(store, act(later), NOVEMBER, exception=None)


def test_a_correction_of_the_general_price_leaves_a_tenants_own_price_alone(store: Store, ledger_url: str, live: Path) -> None:
    """And one of a tenant leaves the others alone."""
    set_price(store, input="7", output="0", tenant="bolt")
    write(live, [end(1, at=THEN, input=1000, output=0), end(2, at=THEN, tenant="bolt", input=1000, output=0)])
    collect(ledger_url, live, now=THEN)

    general, own = rerate(store, apply=False), rerate(store, apply=False, tenant="bolt", input="8")

    assert [("acme", 1, 1_000_000, 3_000_000)] == differences(general)
    assert [("bolt", 1, 7_000_000, 8_000_000)] == differences(own)


def test_a_part_of_a_month_can_be_rerated(store: Store, ledger_url: str, live: Path) -> None:
    """From a moment, before another."""
    write(live, [end(n, at=THEN + timedelta(days=n), input=1000, output=0) for n in range(5)])
    collect(ledger_url, live, now=NEXT_MONTH)

    shown = rerate(store, apply=False, starts="2026-10-12T09:30", ends="2026-10-14T09:30")

    assert [("acme", 2, 2_000_000, 6_000_000)] == differences(shown)


def test_amounts_are_those_of_the_ledgers_own_rounding(store: Store, ledger_url: str, live: Path) -> None:
    """A thousand random requests and prices, to the nano."""
    chance = random.Random(10)
    card = RateCard(
        rate_card_id=1, tenant_id=None, model="tiny", currency="USD", input_nano=123_456_789, output_nano=987_654_321,
        cached_nano=11_111_111, reasoning_nano=987_654_321, minimum_nano=70, meter="", each_nano=0,
        starts_at=THEN, ends_at=None,
    )
    counts = [(chance.choice([0, 1, chance.randrange(10**6)]), chance.choice([0, 1, chance.randrange(10**5)])) for _ in range(1000)]
    write(live, [end(n, at=THEN, input=i, output=o, cached=i // 3) for n, (i, o) in enumerate(counts)])
    collect(ledger_url, live, now=THEN)

    done = rerate(store, input="0.123456789", output="0.987654321", cached="0.011111111", minimum="0.00000007")

    expected = sum(amount_nano(card, input_tokens=i, output_tokens=o, cached_tokens=i // 3, reasoning_tokens=0) for i, o in counts)
    assert [expected] == totals(store)
    assert done["difference_nano"] == expected - rows(ledger_url, "select sum(amount_nano)::bigint from usage_event")[0][0]


def test_credits_follow_a_rerating(store: Store, ledger_url: str, live: Path) -> None:
    """What was charged too much returns, and the prepaid budget is the same for what is left to spend."""
    mint = Mint(peppers={1: bytes(32)}, random_bytes=random.Random(1).randbytes)
    credits.grant(store, act(), mint, "acme", amount="0.010", currency="USD", expires=None, reason="paid", reference=None)
    write(live, [end(1, at=THEN, input=3000, output=0)])
    collect(ledger_url, live, now=THEN)

    rerate(store, input="0.5")

    found = credits.show(store, act(), "acme")
    assert (8_500_000, 1_500_000) == (found["available_nano"], found["used_nano"])
    # The limiter has counted 3,000,000 and does not know of the correction.
    assert [(10_000_000 + 1_500_000,)] == rows(ledger_url, "select amount from rate_limit where unit = 'money'")


def test_what_cannot_be_rerated_says_so_and_changes_nothing(store: Store, ledger_url: str, live: Path) -> None:
    """Another currency, rows that are gone, moments outside the month, no reason."""
    write(live, [end(1, at=THEN, input=1000, output=0)])
    collect(ledger_url, live, now=THEN)

    assert ["1 of its requests were charged in USD"] == rerate(store, apply=False, currency="EUR")["obstacles"]
    with pytest.raises(Conflict, match="charged in USD"):
        rerate(store, currency="EUR")
    for words in ({"starts": "2026-09-30"}, {"ends": "2026-11-02"}, {"starts": "2026-10-02", "ends": "2026-10-01"}, {"starts": "x"}, {"reason": " "}, {"input": "-1"}):
        with pytest.raises(Invalid):
            rerate(store, **words)
    with psycopg.connect(ledger_url, autocommit=True) as connection:
        connection.execute("insert into usage_retired values ('2026-10-05', 7, now())")
        with pytest.raises(Conflict, match="rows of 1 of its days are gone"):
            rerate(store)
        connection.execute("delete from usage_retired")
    assert [(0,)] == rows(ledger_url, "select count(*) from rerating")
