# SPDX-License-Identifier: Apache-2.0
"""Leases of quotas are repaid from the ledger: when it has all of them, by what it has, and once."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from psycopg.types.json import Jsonb

from chassis.stores.postgres import read_pool
from ratelimit.adapters.counters import Loan, StoredCounters, StoreRefused, connect
from ratelimit.adapters.loans import SPENT_AFTER, Loans
from ratelimit.core.lease import offer, wish
from ratelimit.core.limits import Unit
from tests.integration.stores import PATIENCE_SECONDS
from tests.integration.test_quota_leases import demand, quota

_TENANTS = itertools.count()


def lease(number: int) -> str:
    """Its id, as Envoy makes those of requests."""
    return f"00000000-0000-4000-8000-{number:012}"


_FIRST = lease(1)


class Bank:
    """A lease of a tenant's quotas that is out, in a real store and a real ledger."""

    def __init__(self, store_url: str, ledger_url: str) -> None:
        self.store = connect(store_url, cluster=False, timeout_seconds=PATIENCE_SECONDS)
        self.counters = StoredCounters(self.store)
        self.pool = read_pool(ledger_url, name="test", connections=1)
        self.loans = Loans(self.counters, self.pool)
        self.ledger = psycopg.connect(ledger_url, autocommit=True)
        self.tenant = f"loan-{next(_TENANTS)}"
        self.quotas = [quota(self.tenant, unit, amount=10**9, ends_us=2**52) for unit in (Unit.REQUESTS, Unit.TOKENS, Unit.MONEY)]
        for one in self.quotas:
            self.store.hset(one.name, "used", 0)
        #: By the store's own clock.
        self.given_at = self.lend(1)

    def lend(self, number: int) -> datetime:
        """Give a lease of five requests, and settle the one that asked at nothing."""
        asked = replace(demand(self.tenant, number, *self.quotas), request_id=lease(number))
        outcome = self.counters.take(asked, {}, lease=offer(asked, wish("5 quotas"), now_us=0))
        assert 5 == outcome.lent
        [(_, given_us)] = [it for it in self.counters.lent_before(self.tenant, 2**52, most=9) if it[0] == lease(number)]
        self.loans.given(self.tenant)
        return datetime.fromtimestamp(given_us / 1e6, tz=UTC)

    def read_until(self, moment: datetime, *, epoch: str = "life") -> None:
        """The collector has read that life's journal up to *moment*."""
        self.ledger.execute("insert into journal_stream values (%s, 'starts', %s) on conflict do nothing", (f"j-{epoch}", epoch))
        self.ledger.execute(
            "insert into journal_state values (%s, %s) on conflict (journal) do update set read_until = excluded.read_until",
            (f"j-{epoch}", moment),
        )

    def spend(self, lease_id: str, *, requests: int, tokens: int, nano: int, currency: str = "USD") -> None:
        """The ledger has rows of that lease."""
        self.ledger.execute(
            "insert into lease_use (lease_id, currency, tenant_id, request_count, input_tokens, output_tokens, cached_tokens, "
            "amount_nano, recorded_at) values (%s, %s, %s, %s, %s, 0, 0, %s, now())",
            (lease_id, currency, self.tenant, requests, tokens, nano),
        )

    def open(self, request_id: str, lease_id: str) -> None:
        """One of its requests is under way."""
        self.ledger.execute(
            "insert into open_exchange (request_id, started_at, seen_at, journal, epoch, entry) values (%s, now(), now(), 'j-life', 'life', %s)",
            (request_id, Jsonb({"admission": {"admitted": True, "lease": lease_id}})),
        )

    def levels(self, field: str) -> list[int]:
        """That of requests, tokens and money."""
        return [int(self.store.hget(one.name, field) or 0) for one in self.quotas]


@pytest.fixture
def bank(counter_store: str, ledger_url: str) -> Iterator[Bank]:
    """Give a bank whose lease is out."""
    made = Bank(counter_store, ledger_url)
    yield made
    made.pool.close()
    made.ledger.close()
    made.store.close()


def test_a_lease_is_repaid_when_its_journal_was_read_beyond_it(bank: Bank) -> None:
    """Not a moment before; then by what its rows sum up to, in all currencies but for money."""
    bank.spend(_FIRST, requests=2, tokens=30, nano=90)
    bank.spend(_FIRST, requests=1, tokens=7, nano=1000, currency="EUR")
    over = bank.given_at + SPENT_AFTER
    lent = bank.levels("lent")

    bank.read_until(over - timedelta(microseconds=1))
    assert 0 == bank.loans.repay(over)
    bank.read_until(over)
    assert 0 == bank.loans.repay(over - timedelta(microseconds=1))
    assert lent == bank.levels("lent") == [5, 200, 600]
    assert [1, 0] == [bank.loans.repay(over) for _ in range(2)]

    assert [[0, 0, 0], [3, 37, 90]] == [bank.levels("lent"), bank.levels("used")]


def test_a_lease_that_nobody_spent_is_free_again(bank: Bank) -> None:
    """The ledger has nothing of it."""
    bank.read_until(bank.given_at + SPENT_AFTER)

    assert 1 == bank.loans.repay(bank.given_at + SPENT_AFTER)
    assert [[0, 0, 0], [0, 0, 0]] == [bank.levels("lent"), bank.levels("used")]


def test_while_a_request_of_it_is_under_way_it_is_held(bank: Bank) -> None:
    """However long; another lease of the same caller is not in its way."""
    later = bank.lend(2) + SPENT_AFTER
    bank.open("a-request", _FIRST)
    bank.spend(_FIRST, requests=4, tokens=40, nano=120)
    bank.read_until(later)

    assert [1, 0] == [bank.loans.repay(later) for _ in range(2)]
    assert [5, 200, 600] == bank.levels("lent")

    bank.ledger.execute("delete from open_exchange where request_id = 'a-request'")
    assert 1 == bank.loans.repay(later)
    assert [[0, 0, 0], [4, 40, 120]] == [bank.levels("lent"), bank.levels("used")]


def test_another_envoys_journal_says_nothing_of_it(bank: Bank) -> None:
    """Only the life that spent it; one that nobody has read yet holds it."""
    over = bank.given_at + SPENT_AFTER
    bank.read_until(over, epoch="another")

    assert 0 == bank.loans.repay(over)
    assert [5, 200, 600] == bank.levels("lent")


def test_two_processes_repay_once(bank: Bank) -> None:
    """One that gave it, and one that found it when it looked at everybody."""
    other = Loans(bank.counters, bank.pool)
    other.given(bank.tenant)
    bank.spend(_FIRST, requests=3, tokens=30, nano=90)
    bank.read_until(bank.given_at + SPENT_AFTER)

    assert {0, 1} >= {loans.repay(bank.given_at + SPENT_AFTER) for loans in (bank.loans, other)}
    assert [3, 30, 90] == bank.levels("used")


def test_a_damaged_counter_is_in_nobody_elses_way(bank: Bank) -> None:
    """It is said, and the others are repaid."""
    bank.lend(2)
    over = bank.given_at + SPENT_AFTER + timedelta(seconds=5)
    bank.read_until(over)
    repay = bank.counters.repay

    def refusing(tenant_id: str, lease_id: str, used: Any) -> bool:
        if lease_id == _FIRST:
            raise StoreRefused("A counter is damaged.")
        return repay(tenant_id, lease_id, used)

    bank.counters.repay = refusing  # type: ignore[method-assign]
    bank.loans.repay(over)

    assert [5, 200, 600] == bank.levels("lent")


def test_what_only_the_index_has_is_forgotten(bank: Bank) -> None:
    """A day later, without word from the ledger: its reservation is gone."""
    assert {_FIRST: Loan} == {name: type(it) for name, it in bank.counters.lent(bank.tenant, [_FIRST]).items()}
    bank.store.delete(f"peaje:{{{bank.tenant}}}:lent:{_FIRST}")

    bank.loans.repay(bank.given_at + SPENT_AFTER)

    assert [] == bank.counters.lent_before(bank.tenant, 2**52, most=9)
