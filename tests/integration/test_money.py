# SPDX-License-Identifier: Apache-2.0
"""Prices, amounts, months and adjustments, on a real Postgres."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

import psycopg
import pyarrow.parquet as pq
import pytest

from chassis.errors import Conflict, Invalid, NotFound, Unavailable
from chassis.models import ModelCatalogue
from chassis.schema.migrate import migrate
from chassis.schema.partitions import ensure_partitions
from control import invoices, prices, tenants
from control.act import ALL_TENANTS, Act
from control.store import Store
from metering.adapters.invariants import verify
from metering.adapters.replay import examine, replay
from tests.journals import (
    collect,
    end,
    exchanges,
    images,
    request_id,
    rows,
    start,
    sums,
    write,
)

CATALOGUE = ModelCatalogue.parse(
    {"models": [{"name": name, "engine": "openai", "endpoints": ["127.0.0.1:1"]} for name in ("tiny", "large")]}, source="test"
)
#: Ten days into the month that most tests charge in.
THEN = datetime(2026, 10, 11, 9, 30, tzinfo=UTC)
NEXT_MONTH = datetime(2026, 11, 2, 8, 0, tzinfo=UTC)
OCTOBER = date(2026, 10, 1)
NOVEMBER = date(2026, 11, 1)


def act(at: datetime) -> Act:
    """An operator of the platform, at a moment."""
    return Act(actor="op_test", scope=ALL_TENANTS, request_id="test", now=at)


@pytest.fixture
def store(ledger_url: str) -> Iterator[Store]:
    """The control plane's way to a ledger with three tenants."""
    store = Store(ledger_url)
    for name in ("acme", "bolt", "crux"):
        tenants.create(store, act(THEN), name)
    yield store
    store.close()


@pytest.fixture
def live(tmp_path: Path) -> Path:
    """Where a journal's live file is."""
    return tmp_path / "journal" / "journal.jsonl"


def set_price(store: Store, at: datetime = THEN - timedelta(days=10), **fields: Any) -> dict[str, Any]:
    """Set a price as it would have been at that moment."""
    price = prices.Price(**({"model": "tiny", "input": "0.15", "output": "0.60"} | fields))
    return prices.put(store, act(at), price, catalogue=CATALOGUE, clock=lambda: at)


def amounts(url: str) -> list[tuple[Any, ...]]:
    return rows(url, "select request_id, currency, amount_nano, rate_card_id from billing_usage_v1 order by 1")


def test_a_row_has_the_amount_of_the_card_that_held_at_admission(store: Store, ledger_url: str, live: Path) -> None:
    """In the transaction that writes it; hours and days sum it."""
    card = set_price(store, cached="0.075")
    write(live, [end(1, at=THEN, input=1000, cached=400, output=10), end(2, at=THEN, model="large")])

    collect(ledger_url, live, now=THEN)

    amount = 600 * 150 + 400 * 75 + 10 * 600
    assert [(request_id(1), "USD", amount, card["rate_card_id"]), (request_id(2), None, None, None)] == amounts(ledger_url)
    hourly = "select model, currency, amount_nano, request_count from billing_usage_{}_v1 order by 1 desc"
    for length in ("hourly", "daily"):
        assert [("tiny", "USD", amount, 1), ("large", None, None, 1)] == rows(ledger_url, hourly.format(length))
    with psycopg.connect(ledger_url) as connection:
        assert 1 == verify(connection).notes["requests_without_price"]


def test_requests_across_a_price_change_each_have_the_price_at_their_admission(store: Store, ledger_url: str, live: Path) -> None:
    """Ten thousand of them, a millisecond apart, collected after the change and out of order."""
    change = THEN + timedelta(seconds=5)
    old = set_price(store, input="1", output="0")
    new = set_price(store, at=THEN, input="2", output="0", starts=change.isoformat())
    moments = [change + timedelta(milliseconds=n - 5000) for n in range(10_000)]
    write(live, [end(n, at=at, input=1, output=0) for n, at in reversed(list(enumerate(moments)))])

    collect(ledger_url, live, now=change)

    found = rows(ledger_url, "select rate_card_id, count(*), sum(amount_nano), min(started_at), max(started_at) from usage_event group by 1 order by 1")
    assert [
        (old["rate_card_id"], 5000, 5_000_000, moments[0], moments[4999]),
        (new["rate_card_id"], 5000, 10_000_000, moments[5000], moments[-1]),
    ] == found


def test_a_price_that_replaces_another_begins_after_whatever_was_charged(store: Store) -> None:
    """The first holds at once; the second a few seconds later, and the first ends there."""
    first = set_price(store, at=THEN)
    second = set_price(store, at=THEN + timedelta(hours=1), input="0.20")

    moment = THEN + timedelta(hours=1) + prices.REPLACEMENT_LEAD
    listed = prices.list_all(store, act(NEXT_MONTH), tenant=None, at=None)
    assert THEN == first["effective_from"]
    assert [(THEN, moment), (moment, None)] == [(it["effective_from"], it["effective_until"]) for it in listed]
    assert [second] == prices.list_all(store, act(NEXT_MONTH), tenant=None, at=moment)
    assert ("0.20", 200_000_000) == (second["input"], second["input_nano"])


def test_a_price_set_between_two_others_lasts_until_the_later_one(store: Store) -> None:
    """Nothing overlaps, nothing is lost."""
    set_price(store, at=THEN)
    set_price(store, at=THEN, input="3", starts="2026-12-01")
    set_price(store, at=THEN, input="2", starts="2026-11-01")

    listed = prices.list_all(store, act(NEXT_MONTH), tenant=None, at=None)
    edges = [THEN, datetime(2026, 11, 1, tzinfo=UTC), datetime(2026, 12, 1, tzinfo=UTC), None]
    assert list(pairwise(edges)) == [(it["effective_from"], it["effective_until"]) for it in listed]
    assert ["0.15", "2.00", "3.00"] == [it["input"] for it in listed]


def test_a_tenants_own_price_is_charged_to_it_alone(store: Store, ledger_url: str, live: Path) -> None:
    """The override."""
    set_price(store, input="1", output="0")
    set_price(store, input="0.5", output="0", tenant="bolt", currency="EUR")
    write(live, [end(1, at=THEN, input=10, tenant="acme"), end(2, at=THEN, input=10, tenant="bolt")])

    collect(ledger_url, live, now=THEN)

    assert [("USD", 10_000), ("EUR", 5_000)] == [row[1:3] for row in amounts(ledger_url)]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"input": "-1"}, "input is '-1'"),
        ({"output": "1000000.01"}, "at most 1000000"),
        ({"cached": "1e3"}, "cached is"),
        ({"model": "huge"}, "not served"),
        ({"currency": "usd"}, "currency is"),
        ({"starts": "2026-01-01"}, "is past"),
        ({"starts": "soon"}, "from is"),
        ({"tenant": "nobody"}, "no tenant"),
        ({"meter": "images"}, "belong together"),
        ({"each": "0.04"}, "belong together"),
        ({"meter": "miles", "each": "0.04"}, "The meter is 'miles'"),
        ({"meter": "images", "each": "-1"}, "each is '-1'"),
        ({"meter": "images", "each": "1000001"}, "at most 1000000"),
    ],
)
def test_a_wrong_price_is_one_clear_sentence_and_changes_nothing(store: Store, fields: dict[str, Any], words: str) -> None:
    """Money is not guessed at."""
    with pytest.raises((Invalid, NotFound), match=words):
        set_price(store, at=THEN, **fields)

    assert [] == prices.list_all(store, act(NEXT_MONTH), tenant=None, at=None)


def test_the_database_itself_refuses_overlapping_prices_and_changes_of_charged_ones(ledger_url: str, store: Store) -> None:
    """Also of somebody who goes past the use case."""
    set_price(store)
    with psycopg.connect(ledger_url, autocommit=True) as connection:
        with pytest.raises(psycopg.errors.ExclusionViolation):
            connection.execute(
                "insert into rate_card (model, currency, input_nano, output_nano, cached_nano, reasoning_nano, effective, created_at) "
                "select model, currency, 1, 1, 1, 1, tstzrange('2027-01-01', '2027-02-01'), created_at from rate_card"
            )
        for change in ("update rate_card set input_nano = 1", "delete from rate_card"):
            with pytest.raises(psycopg.errors.RaiseException, match="append-only"):
                connection.execute(change)  # type: ignore[call-overload]


def test_a_price_change_waits_for_whoever_is_charging(store: Store, ledger_url: str) -> None:
    """So that no transaction has the change in its past and in its future."""
    with psycopg.connect(ledger_url) as charging:
        charging.execute("select pg_advisory_xact_lock_shared(%s)", (0x7065616A_65000003,))
        with store.transaction(ALL_TENANTS) as connection:
            connection.execute("set local lock_timeout = '100ms'")
            with pytest.raises(psycopg.errors.LockNotAvailable):
                prices.lock_charging(connection)
            connection.rollback()


def close(store: Store, period: date = OCTOBER, **fields: Any) -> dict[str, Any]:
    return invoices.close(store, act(NEXT_MONTH), period, **({"exception": None} | fields))


def test_a_closed_month_never_changes_and_later_facts_are_adjustments_of_the_next(store: Store, ledger_url: str, live: Path) -> None:
    """Same rows, same lines, same hash; the totals of both months together are those of all rows."""
    set_price(store, input="1", output="2")
    set_price(store, model="large", input="3", output="4")
    write(live, exchanges(100, at=THEN))
    collect(ledger_url, live, now=NEXT_MONTH)
    before = invoices.invoice(store, act(NEXT_MONTH), "acme", OCTOBER)
    assert 100 == close(store)["row_count"]
    closed = invoices.invoice(store, act(NEXT_MONTH), "acme", OCTOBER)

    write(live, [line for n in range(5) for line in (start(200 + n, at=THEN), end(200 + n, at=THEN))])
    write(live, exchanges(20, at=NEXT_MONTH, first=300))
    collect(ledger_url, live, now=NEXT_MONTH)

    assert ("open", "closed") == (before["state"], closed["state"])
    assert before["totals"] == closed["totals"]
    assert closed == invoices.invoice(store, act(NEXT_MONTH), "acme", OCTOBER)
    assert invoices.verify(store, act(NEXT_MONTH), OCTOBER)["ok"]
    [late] = [line for line in invoices.invoice(store, act(NEXT_MONTH), "acme", NOVEMBER)["lines"] if line["kind"] == "adjustment"]
    assert (5, 15, 25, 5 * (3 * 1000 + 5 * 2000)) == (
        late["request_count"], late["input_tokens"], late["output_tokens"], late["amount_nano"]
    )
    billed = rows(ledger_url, "select sum(amount_nano), sum(request_count) from billing_invoice_v1")
    assert billed == rows(ledger_url, "select sum(amount_nano), count(*) from usage_event")
    assert [(NOVEMBER, OCTOBER)] == rows(ledger_url, "select distinct period, of_period from billing_adjustments_v1")


def test_a_month_closes_with_what_is_metered_besides_tokens(store: Store, ledger_url: str, live: Path) -> None:
    """A line of its own beside that of the tokens, also for what comes late; lines without are hashed as they always were."""
    set_price(store, meter="images", each="0.04")
    write(live, [end(1, at=THEN, input=1000, output=0), images(2, 2, at=THEN), images(3, 1, at=THEN)])
    collect(ledger_url, live, now=NEXT_MONTH)

    closed = close(store)
    write(live, [images(4, 5, at=THEN)])
    collect(ledger_url, live, now=NEXT_MONTH)

    assert [
        (OCTOBER, "usage", 1, 1000, None, 0, 150_000), (OCTOBER, "usage", 2, 0, "images", 3, 120_000_000),
        (NOVEMBER, "adjustment", 1, 0, "images", 5, 200_000_000),
    ] == rows(
        ledger_url, "select period, kind, request_count, input_tokens, meter, quantity, amount_nano from billing_invoice_v1 order by 1, 5 nulls first"
    )
    assert [(2, 3)] == rows(ledger_url, "select count(*), sum(quantity)::int from usage_event where meter = 'images' and request_id <> %s", request_id(4))
    assert invoices.verify(store, act(NEXT_MONTH), OCTOBER)["ok"]
    assert 3 == closed["row_count"]
    with psycopg.connect(ledger_url) as connection:
        assert verify(connection).holds
        connection.execute("alter table invoice_line disable trigger user")
        connection.execute("update invoice_line set quantity = quantity + 1 where meter = 'images'")
        broken = {verdict.invariant for verdict in verify(connection).verdicts if verdict.violations}
        connection.rollback()
    assert {"closed months are what they were", "lines of closed months and their later adjustments equal the hourly sums"} == broken


def test_a_row_without_a_meter_is_hashed_as_before_there_was_one(store: Store, ledger_url: str, live: Path) -> None:
    """Months that were closed by an earlier version verify by this one."""
    set_price(store)
    write(live, [end(1, at=THEN, input=1000, output=7)])
    collect(ledger_url, live, now=NEXT_MONTH)
    close(store)

    [(kept,)] = rows(ledger_url, "select hash from billing_period_hour")
    [(then,)] = rows(
        ledger_url,
        """
        select sha256(sha256(convert_to(jsonb_build_array(
            request_id, tenant_id, project_id, key_id, model, dialect, to_char(started_at at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US'),
            to_char(ended_at at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US'), status, outcome, input_tokens, output_tokens, cached_tokens,
            reasoning_tokens, basis, currency, amount_nano, rate_card_id)::text, 'UTF8'))) from usage_event
        """,
    )
    assert then == kept


def test_closing_under_load_puts_each_request_into_exactly_one_month(store: Store, ledger_url: str, live: Path) -> None:
    """Twenty batches; the month closes between two of them, with rows of it in every batch."""
    set_price(store, input="1", output="1")
    pieces = [exchanges(50, at=THEN, first=1000 * n) for n in range(20)]
    for n, piece in enumerate(pieces):
        write(live, piece)
        collect(ledger_url, live, now=NEXT_MONTH)
        if n == 9:
            close(store, exception="priced in part")

    assert [(500,)] == rows(ledger_url, "select sum(request_count)::int from billing_invoice_v1 where kind = 'usage'")
    assert [(500,)] == rows(ledger_url, "select count(*) from billing_adjustments_v1")
    assert invoices.verify(store, act(NEXT_MONTH), OCTOBER)["ok"]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([start(1, at=THEN)], "1 exchanges that began before its end are still open"),
        ([end(1, at=THEN), end(1, at=THEN, output=6)], "1 of its exchanges are told differently"),
        ([end(1, at=THEN, model="large")], "1 of its exchanges used something and have no price"),
    ],
    ids=["open", "conflict", "no price"],
)
def test_a_month_with_something_unexplained_closes_only_with_a_reason(
    store: Store, ledger_url: str, live: Path, lines: list[bytes], words: str
) -> None:
    """The reason is kept with the month."""
    set_price(store)
    write(live, lines)
    collect(ledger_url, live, now=NEXT_MONTH)

    with pytest.raises(Conflict, match=words):
        close(store)
    assert [] == invoices.list_periods(store, act(NEXT_MONTH))
    assert "agreed" == close(store, exception="agreed")["exception"]


def test_a_month_does_not_close_before_every_journal_is_read_to_its_end(store: Store, ledger_url: str, live: Path) -> None:
    """A collector that is behind may still have rows of it."""
    set_price(store)
    write(live, [end(1, at=THEN)])
    collect(ledger_url, live, now=THEN)

    with pytest.raises(Conflict, match="local was last read to its end at 2026-10-11 09:30:00"):
        close(store)


def test_months_close_once_in_order_and_after_they_are_over(store: Store, ledger_url: str, live: Path) -> None:
    """Whatever the reason."""
    set_price(store, at=datetime(2026, 9, 1, tzinfo=UTC))
    write(live, [end(1, at=datetime(2026, 9, 30, 23, 59, 59, tzinfo=UTC)), end(2, at=THEN)])
    collect(ledger_url, live, now=NEXT_MONTH)

    with pytest.raises(Conflict, match="not over"):
        close(store, NOVEMBER, exception="hurry")
    with pytest.raises(Conflict, match="2026-09 has usage and is not closed"):
        close(store, exception="hurry")
    close(store, date(2026, 9, 1))
    close(store)
    with pytest.raises(Conflict, match="closed already"):
        close(store)
    with pytest.raises(NotFound, match="not closed"):
        invoices.verify(store, act(NEXT_MONTH), NOVEMBER)


@pytest.mark.parametrize(
    "tampering",
    [
        "update usage_event set output_tokens = 0, amount_nano = 0 where request_id = (select min(request_id) from usage_event)",
        "delete from usage_event where request_id = (select min(request_id) from usage_event)",
        "update invoice_line set amount_nano = amount_nano + 1",
        "update billing_period_hour set row_count = row_count + 1",
        "update billing_period set root_hash = sha256('')",
    ],
)
def test_whoever_changes_a_closed_month_past_its_guards_is_found_out(
    store: Store, ledger_url: str, live: Path, tampering: str
) -> None:
    """By the month's verification and by the ledger's."""
    set_price(store)
    write(live, exchanges(20, at=THEN))
    collect(ledger_url, live, now=NEXT_MONTH)
    close(store, exception="large has no price")
    with psycopg.connect(ledger_url) as connection:
        if tampering.startswith("update"):
            with pytest.raises(psycopg.errors.RaiseException, match="append-only"), connection.transaction():
                connection.execute(tampering)  # type: ignore[call-overload]
        connection.execute("set session_replication_role = replica")
        connection.execute(tampering)  # type: ignore[call-overload]
        connection.execute("set session_replication_role = origin")

        assert not verify(connection).holds
        # So that the ledger holds again when the test is over.
        connection.rollback()


def test_days_of_closed_months_are_retired_and_the_bill_stays(store: Store, ledger_url: str, live: Path) -> None:
    """Rows go; sums, lines, hashes and adjustments stay, and a record that is read again is not charged again."""
    set_price(store)
    write(live, [end(1, at=THEN), end(2, at=THEN + timedelta(days=1)), end(3, at=NEXT_MONTH)])
    with psycopg.connect(ledger_url) as connection:
        for day in (THEN, NEXT_MONTH):
            ensure_partitions(connection, day.date(), days_ahead=1)
    collect(ledger_url, live, now=NEXT_MONTH, retention_days=1)
    assert [(3,)] == rows(ledger_url, "select count(*) from usage_event")
    close(store)
    write(live, [end(4, at=THEN)])
    collect(ledger_url, live, now=NEXT_MONTH)
    before = rows(ledger_url, "select * from billing_invoice_v1 order by 1, 2, 5")

    later = NEXT_MONTH + timedelta(days=400)
    collect(ledger_url, live, now=later, retention_days=1)
    with psycopg.connect(ledger_url) as connection:
        connection.execute("delete from journal_position")
    collect(ledger_url, live, now=later, retention_days=1)

    assert [(request_id(3),)] == rows(ledger_url, "select request_id from usage_event")
    assert [(THEN.date(), 2), (THEN.date() + timedelta(days=1), 1)] == rows(
        ledger_url, "select day, row_count from usage_retired where row_count > 0 order by 1"
    )
    assert before == rows(ledger_url, "select * from billing_invoice_v1 order by 1, 2, 5")
    assert invoices.verify(store, act(NEXT_MONTH), OCTOBER)["ok"]
    # Read again, those can no longer be compared.
    assert [(request_id(n),) for n in (1, 2, 4)] == rows(ledger_url, "select request_id from usage_conflict order by 1")


def test_an_invoice_as_csv_is_exact_and_starts_no_formula(store: Store, ledger_url: str, live: Path) -> None:
    """Decimals, not floats."""
    set_price(store, input="0.000000001", output="0.15")
    write(live, [end(1, at=THEN, input=3, output=5)])
    collect(ledger_url, live, now=THEN)
    document = invoices.invoice(store, act(NEXT_MONTH), "acme", OCTOBER)
    document["lines"][0]["project"] = "=1+1"

    header, line = invoices.as_csv(document).splitlines()

    assert header.startswith("period,tenant,project,model,kind,request_count,input_tokens,")
    assert "2026-10,acme,'=1+1,tiny,usage,1,3,5,0,0,USD,0.00000075,open,,0" == line


def test_an_invoice_as_parquet_is_exact_and_typed(store: Store, ledger_url: str, live: Path) -> None:
    """Read by the official library: integers, decimals, a date; null where there is no price."""
    set_price(store, input="0.000000001", output="0.15")
    write(live, [end(1, at=THEN, input=3, output=5), end(2, at=THEN, model="large")])
    collect(ledger_url, live, now=THEN)

    data = invoices.as_parquet(invoices.invoice(store, act(NEXT_MONTH), "acme", OCTOBER))

    table = pq.read_table(io.BytesIO(data))
    assert ["date32[day]", "int64", "decimal128(38, 9)"] == [str(table.schema.field(it).type) for it in ("period", "input_tokens", "amount")]
    assert [("tiny", OCTOBER, Decimal("0.00000075"), 750), ("large", OCTOBER, None, None)] == sorted(
        ((it["model"], it["period"], it["amount"], it["amount_nano"]) for it in table.to_pylist()), reverse=True
    )


def test_without_its_library_parquet_is_refused_with_the_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an extra."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)

    with pytest.raises(Unavailable, match="Install the extra `parquet`"):
        invoices.as_parquet({"lines": []})


@pytest.mark.parametrize("text", ["2026", "2026-13", "2026-1", "26-01", "2026-00", "0000-01", "2026-11-01"])
def test_a_month_is_written_in_one_way(text: str) -> None:
    """Nothing is guessed."""
    with pytest.raises(Invalid, match="Write it as"):
        invoices.month(text)


def test_a_journal_replayed_into_an_empty_database_gives_the_same_sums(
    store: Store, ledger_url: str, empty_database: Callable[[], str], live: Path
) -> None:
    """Over rotated files, torn and repeated records and lost exchanges: byte for byte, money too."""
    set_price(store)
    write(live.with_name("journal-000001.jsonl"), [*exchanges(300, at=THEN), start(900, at=THEN), end(901, at=THEN)[:99]])
    write(live, [*exchanges(300, at=NEXT_MONTH, first=300), *exchanges(10, at=THEN), end(902, at=THEN, epoch="f" * 32)])
    collect(ledger_url, live, now=NEXT_MONTH)
    into = empty_database()
    migrate(into, NEXT_MONTH.date())

    done = replay(live, into, prices_from=ledger_url, now=NEXT_MONTH + timedelta(days=1))

    assert sums(ledger_url) == sums(into)
    with psycopg.connect(ledger_url) as connection:
        assert done.sums_digest == verify(connection).sums_digest
    assert (602, 1, 0) == (done.request_count, done.lost_count, done.open_count)
    with pytest.raises(Conflict, match="has usage already"):
        replay(live, into, prices_from=None, now=NEXT_MONTH)


def test_a_journal_is_examined_without_being_collected(live: Path) -> None:
    """Records by type, what is none, what is not finished."""
    write(live.with_name("journal-000001.jsonl"), [start(1), b"what?\n", end(1)])
    write(live, [start(2), end(2)[:50]])

    found = examine(live)

    assert ["journal-000001.jsonl", "journal.jsonl"] == found.files
    assert {"Start": 2, "DownstreamEnd": 1} == dict(found.records)
    assert [("journal-000001.jsonl", len(start(1)))] == [defect[:2] for defect in found.defects]
    assert {"journal.jsonl": 50} == found.unfinished


def test_the_ledgers_verification_names_what_is_broken(postgres_url: str, live: Path) -> None:
    """Each invariant can fail."""
    write(live, exchanges(5))
    collect(postgres_url, live)
    breaks = {
        "a request has one row over all days": (
            "insert into usage_event select (jsonb_populate_record(u, jsonb_build_object('started_at', u.started_at + interval '1 day'))).* "
            "from usage_event u limit 1"
        ),
        "hourly sums equal the sums of the rows": "update usage_hour set output_tokens = output_tokens + 1",
        "cached tokens are part of the input, reasoning tokens of the output, and none means none": (
            "update usage_event set cached_tokens = input_tokens + 1"
        ),
        "an amount has a currency and a rate card, or there is none of the three": "update usage_event set amount_nano = 1",
        "each amount is what its rate card says, and the card held at admission": (
            "update usage_event set amount_nano = 1, currency = 'USD', rate_card_id = 7"
        ),
    }
    with psycopg.connect(postgres_url) as connection:
        assert verify(connection).holds
        connection.commit()
        for invariant, change in breaks.items():
            connection.execute("set session_replication_role = replica")
            connection.execute(change)  # type: ignore[call-overload]
            broken = {verdict.invariant for verdict in verify(connection).verdicts if verdict.violations}
            connection.rollback()

            assert invariant in broken
