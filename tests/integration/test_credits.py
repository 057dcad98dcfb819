# SPDX-License-Identifier: Apache-2.0
"""Credits as double entry, beside the ledger that they follow, on a real Postgres."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

from chassis.errors import Conflict, Invalid, NotFound
from control import credits, limits, prices, tenants  # noqa: A004
from control.act import ALL_TENANTS, Act
from control.minting import Mint
from control.store import Store
from metering.adapters.credits import settle_all
from metering.adapters.invariants import verify
from tests.integration.control_plane import CATALOGUE
from tests.journals import collect, end, rows, write

THEN = datetime(2026, 10, 11, 9, 30, tzinfo=UTC)
#: What one request of the tests costs, in nano: 1000 tokens at 1.00 a million.
COST = 1_000_000
MINT = Mint(peppers={1: bytes(range(32))}, random_bytes=random.Random(4).randbytes)


@dataclass
class Books:
    """A tenant with a price, and what tests do to it."""

    store: Store
    url: str
    live: Path
    used: int = 0

    def act(self, at: datetime) -> Act:
        return Act(actor="op_test", scope=ALL_TENANTS, request_id="test", now=at)

    def grant(self, amount: str, at: datetime = THEN, **words: Any) -> dict[str, Any]:
        asked = {"currency": "USD", "expires": None, "reason": "paid", "reference": None} | words
        return credits.grant(self.store, self.act(at), MINT, "acme", amount=amount, **asked)

    def use(self, requests: int, at: datetime = THEN) -> None:
        """Requests that cost `COST` each, collected at once."""
        write(self.live, [end(self.used + n, at=at, input=1000, output=0) for n in range(requests)])
        self.used += requests
        collect(self.url, self.live, now=at)

    def settle(self, at: datetime = THEN) -> int:
        with psycopg.connect(self.url, autocommit=True) as connection:
            return settle_all(connection, at)

    def show(self, at: datetime = THEN) -> dict[str, Any]:
        return credits.show(self.store, self.act(at), "acme")

    def budget(self) -> list[tuple[Any, ...]]:
        return rows(self.url, "select amount, currency from rate_limit where unit = 'money' and period = 'ever'")


@pytest.fixture
def books(ledger_url: str, tmp_path: Path) -> Iterator[Books]:
    """Every invariant is looked at when the test is over, I9 among them."""
    store = Store(ledger_url)
    found = Books(store=store, url=ledger_url, live=tmp_path / "journal/journal.jsonl")
    for name in ("acme", "bolt"):
        tenants.create(store, found.act(THEN), name)
    price = prices.Price(model="tiny", input="1", output="1")
    prices.put(store, found.act(THEN), price, catalogue=CATALOGUE, clock=lambda: THEN - timedelta(days=30))
    yield found
    store.close()


def remaining(document: dict[str, Any]) -> list[int]:
    return [it["remaining_nano"] for it in document["grants"]]


def test_usage_is_taken_from_the_grant_that_ends_first(books: Books) -> None:
    """Then from the next; what the books do not have yet is off the available amount already."""
    books.grant("0.010", reason="never ends")
    books.grant("0.002", expires="30d", reason="ends soon")
    books.use(3)
    before = books.show()
    books.settle()
    books.settle()
    after = books.show()

    assert (9 * COST, 12 * COST, 3 * COST) == (before["available_nano"], before["balance_nano"], before["owed_nano"])
    assert ("0.009", 9 * COST, 0) == (after["available"], after["balance_nano"], after["owed_nano"])
    assert [9 * COST, 0] == remaining(after)
    assert ["consume", "grant", "grant"] == [it["kind"] for it in after["transactions"]]
    assert [(0,)] == rows(books.url, "select sum(amount_nano) from billing_credit_entries_v1")


def test_what_a_grant_still_holds_when_it_ends_expires_and_no_longer_counts_for_the_budget(books: Books) -> None:
    """Once every journal has been read past its end: usage from before it may still come."""
    books.grant("0.005", expires="1d")
    books.use(2)
    later = THEN + timedelta(days=2)
    books.settle(later)
    waiting = books.show(later)
    books.use(1, at=later)
    books.settle(later)
    ended = books.show(later)

    assert ([3 * COST], [(5 * COST, "USD")]) == (remaining(waiting), [(5 * COST, "USD")])
    assert (2 * COST, 3 * COST, 0) == (ended["expired_nano"], ended["used_nano"], ended["balance_nano"])
    assert [(3 * COST, "USD")] == books.budget()


def test_what_was_charged_before_the_first_credit_is_not_paid_by_it(books: Books) -> None:
    """The limiter counts from the beginning, so the budget does too."""
    books.use(4)
    books.grant("0.001")
    books.use(1)
    books.settle()

    assert [(5 * COST, "USD")] == books.budget()
    assert (COST, 0, 0) == tuple(books.show()[name] for name in ("used_nano", "balance_nano", "owed_nano"))


def test_usage_beyond_the_credits_is_owed_and_taken_from_the_next_grant(books: Books) -> None:
    """A limiter has a bound, not a wall."""
    books.grant("0.001")
    books.use(3)
    books.settle()
    owed = books.show()
    books.grant("0.005")
    after = books.show()

    assert (0, 2 * COST, 0) == (owed["balance_nano"], owed["owed_nano"], owed["available_nano"])
    # Of two grants of one moment either may be told first.
    assert (3 * COST, 0, [0, 3 * COST]) == (after["balance_nano"], after["owed_nano"], sorted(remaining(after)))


def test_a_reference_is_granted_once(books: Books) -> None:
    """A payment that is told twice; the same number for another amount is a mistake."""
    first = books.grant("1", reference="pay-1")
    again = books.grant("1", reference="pay-1")

    assert (first["grant_id"], 1_000_000_000) == (again["grant_id"], again["balance_nano"])
    with pytest.raises(Conflict, match=r"was granted 1\.00"):
        books.grant("2", reference="pay-1")
    assert [(1,)] == rows(books.url, "select count(*) from credit_grant")


def test_a_grant_can_be_ended_and_what_was_used_stays_used(books: Books) -> None:
    """With a reason; twice changes nothing."""
    made = books.grant("0.005")
    books.use(2)
    ended = credits.expire(books.store, books.act(THEN), "acme", made["grant_id"], reason="refunded")
    again = credits.expire(books.store, books.act(THEN), "acme", made["grant_id"], reason="refunded")

    assert ended == again and (3 * COST, 2 * COST) == (ended["expired_nano"], ended["used_nano"])
    assert [(2 * COST, "USD")] == books.budget()
    assert ["credits.granted", "credits.expired"] == [it[0] for it in rows(books.url, "select action from audit_event where starts_with(action, 'credits') order by sequence")]
    with pytest.raises(NotFound):
        credits.expire(books.store, books.act(THEN), "bolt", made["grant_id"], reason="not yours")


def test_a_grant_that_cannot_be_is_refused_and_changes_nothing(books: Books) -> None:
    """Money is written exactly."""
    bad: list[tuple[str, dict[str, Any]]] = [
        ("0", {}), ("-1", {}), ("1e3", {}), ("9000001", {}), ("0.0000000001", {}), ("1", {"currency": "usd"}), ("1", {"reason": " "}),
        ("1", {"reason": "x" * 501}), ("1", {"reference": ""}), ("1", {"expires": "2020-01-01"}), ("1", {"expires": "soon"}),
    ]  # fmt: skip
    for amount, words in bad:
        with pytest.raises(Invalid):
            books.grant(amount, **words)

    assert [(0, 0)] == rows(books.url, "select (select count(*) from credit_book), (select count(*) from rate_limit)")


def test_credits_and_a_budget_set_by_hand_exclude_each_other(books: Books) -> None:
    """Two answers to one question; of one currency only, and below what the limiter counts exactly."""
    by_hand = {"prepaid_budget": "5"}
    scope = limits.Scope(tenant="bolt")
    limits.put(books.store, books.act(THEN), scope, by_hand, catalogue=CATALOGUE)
    with pytest.raises(Conflict, match="set by hand"):
        credits.grant(
            books.store, books.act(THEN), MINT, "bolt", amount="1", currency="USD", expires=None, reason="paid", reference=None
        )
    books.grant("1")
    with pytest.raises(Conflict, match="follows its credits"):
        limits.put(books.store, books.act(THEN), limits.Scope(tenant="acme"), by_hand, catalogue=CATALOGUE)
    with pytest.raises(Conflict, match="are in USD"):
        books.grant("1", currency="EUR")
    with pytest.raises(Invalid, match="does not count exactly"):
        books.grant("9000000")
    assert [1_000_000_000] == remaining(books.show())


def test_deleting_a_tenants_limits_leaves_the_budget_of_its_credits(books: Books) -> None:
    """Without it whatever is not paid for would pass."""
    books.grant("1")
    scope = limits.Scope(tenant="acme")
    limits.put(books.store, books.act(THEN), scope, {"requests_per_minute": 7}, catalogue=CATALOGUE)

    gone = limits.delete(books.store, books.act(THEN), scope)

    assert "prepaid_budget" not in str(gone)
    with pytest.raises(Conflict, match="follows its credits"):
        limits.delete(books.store, books.act(THEN), scope)
    assert [("money", "ever")] == rows(books.url, "select unit, period from rate_limit where tenant_id = 'acme'")


def test_the_database_refuses_books_that_do_not_balance(books: Books) -> None:
    """Whoever writes them: sums, overdrafts, changes, transactions without entries, accounts of two tenants."""
    books.grant("1")
    credits.grant(books.store, books.act(THEN), MINT, "bolt", amount="1", currency="USD", expires=None, reason="paid", reference=None)
    new = "insert into credit_transaction (tenant_id, kind, at, actor, reason) values ('acme', 'consume', now(), 'x', 'x') returning transaction_id"
    account = "(select account_id from credit_account where tenant_id = '{}' and kind = '{}')"
    mine, used, theirs = account.format("acme", "grant"), account.format("acme", "used"), account.format("bolt", "used")
    entries = (
        "",
        "insert into credit_entry values (%(it)s, {mine}, -5), (%(it)s, {used}, 4)",
        "insert into credit_entry values (%(it)s, {mine}, -5)",
        "insert into credit_entry values (%(it)s, {mine}, -1000000001), (%(it)s, {used}, 1000000001)",
        "insert into credit_entry values (%(it)s, {mine}, -5), (%(it)s, {theirs}, 5)",
    )
    with psycopg.connect(books.url, autocommit=True) as connection:
        for entry in entries:
            with pytest.raises(psycopg.errors.CheckViolation), connection.transaction():
                [(made,)] = connection.execute(new).fetchall()  # type: ignore[call-overload]
                if entry:
                    connection.execute(entry.format(mine=mine, used=used, theirs=theirs), {"it": made})  # type: ignore[call-overload]
        # An entry that is added to a transaction which was fine.
        with pytest.raises(psycopg.errors.CheckViolation):
            connection.execute(f"insert into credit_entry select min(transaction_id), {used}, 7 from credit_transaction")  # type: ignore[call-overload]
        for table in ("credit_entry", "credit_transaction", "credit_grant", "credit_account", "credit_book"):
            with pytest.raises(psycopg.errors.RaiseException, match="append-only"):
                connection.execute(f"delete from {table}")  # type: ignore[call-overload]
    assert [1_000_000_000] == remaining(books.show())


def test_any_order_of_grants_usage_and_ends_keeps_the_books_in_balance(books: Books) -> None:
    """Twenty-five random steps: sums are 0, nothing is overdrawn, and what is used is what was charged or all there was."""
    chance, now, granted = random.Random(20261011), THEN, []
    books.grant("0.001")
    for _ in range(25):
        now += timedelta(hours=chance.randint(1, 30))
        match chance.choice(("grant", "use", "use", "settle", "end")):
            case "grant":
                granted.append(books.grant(f"0.00{chance.randint(1, 9)}", at=now, expires=chance.choice([None, "1d", "5d", "30d"]))["grant_id"])
            case "use":
                books.use(chance.randint(1, 4), at=now)
            case "end" if granted:
                credits.expire(books.store, books.act(now), "acme", chance.choice(granted), reason="x")
            case _:
                books.settle(now)
        found = books.show(now)
        assert found["granted_nano"] == found["used_nano"] + found["expired_nano"] + found["balance_nano"]
        assert all(left >= 0 for left in remaining(found)) and sum(remaining(found)) == found["balance_nano"]
        assert books.used * COST == found["used_nano"] + found["owed_nano"]
        assert [(max(0, found["granted_nano"] - found["expired_nano"]), "USD")] == books.budget()
    books.settle(now)
    assert 0 in (books.show(now)["owed_nano"], books.show(now)["balance_nano"])


def test_the_ledgers_verification_sees_books_that_were_changed_past_their_guards(postgres_url: str, tmp_path: Path) -> None:
    """I9 can fail."""
    store = Store(postgres_url)
    it = Books(store=store, url=postgres_url, live=tmp_path / "journal/journal.jsonl")
    tenants.create(store, it.act(THEN), "acme")
    it.grant("1")
    store.close()
    with psycopg.connect(postgres_url) as connection:
        for change in ("update credit_entry set amount_nano = amount_nano + 1 where amount_nano > 0", "delete from credit_entry where amount_nano < 0"):
            connection.execute("set session_replication_role = replica")
            connection.execute(change)  # type: ignore[call-overload]
            broken = [verdict.invariant for verdict in verify(connection).verdicts if verdict.violations]
            connection.rollback()

            assert "the entries of each credit transaction sum to 0, and so do all together" in broken
