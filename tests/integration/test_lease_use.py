# SPDX-License-Identifier: Apache-2.0
"""What the ledger says each lease of quotas was spent on, on a real Postgres: exactly what its rows say."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final

import psycopg
import pytest

from chassis.schema.migrate import migrate
from metering.adapters import ledger
from metering.adapters.reading import read
from metering.adapters.replay import replay
from metering.adapters.tail import Piece, next_piece
from tests.journals import (
    NOON,
    collect,
    collecting,
    end,
    exchanges,
    lease_id,
    periodic,
    request_id,
    rows,
    start,
    write,
    write_apart,
)

USED = (
    "select lease_id, currency, tenant_id, request_count, input_tokens, output_tokens, cached_tokens, amount_nano "
    "from lease_use order by lease_id, currency"
)
#: Nano-currency for each input and each output token of the models that have a price.
PRICES: Final = {"tiny": ("USD", 1, 2), "large": ("EUR", 3, 5)}
ANOTHER_LIFE = "f" * 32


@pytest.fixture
def live(tmp_path: Path) -> Path:
    """Where a journal's live file is."""
    return tmp_path / "journal" / "journal.jsonl"


def give_prices(url: str, *models: str) -> None:
    with psycopg.connect(url) as connection:
        for model in models:
            currency, input_nano, output_nano = PRICES[model]
            connection.execute(
                "insert into rate_card (model, currency, input_nano, output_nano, cached_nano, reasoning_nano, effective, created_at) "
                "values (%s, %s, %s, %s, 0, 0, tstzrange('2026-01-01Z', null), now())",
                (model, currency, input_nano * 1_000_000, output_nano * 1_000_000),
            )


def told(lines: Iterable[bytes]) -> list[tuple[Any, ...]]:
    """What end records say of their leases, each model at its price: as `USED` has it."""
    found: dict[tuple[str, str, str], Counter[str]] = {}
    for record in map(json.loads, lines):
        lease = record["admission"].get("lease")
        if record["type"] == "DownstreamEnd" and lease:
            currency, input_nano, output_nano = PRICES.get(record["request"]["model"], ("", 0, 0))
            usage, tenant = record["usage"], record["identity"]["tenant"]
            found.setdefault((lease, currency, tenant), Counter()).update(
                n=1, input=usage["input"], output=usage["output"], cached=usage["cached"],
                amount=(usage["input"] - usage["cached"]) * input_nano + usage["output"] * output_nano,
            )
    return sorted((*key, it["n"], it["input"], it["output"], it["cached"], it["amount"]) for key, it in found.items())


def test_records_delivered_one_to_five_times_and_shuffled_are_spent_once(ledger_url: str, live: Path) -> None:
    """Leases of three tenants, each in two currencies, and half of all requests on none."""
    chance = random.Random(6)
    give_prices(ledger_url, *PRICES)
    lines = exchanges(600, leases=5)
    write(live, lines)
    deliveries = [line for line in lines for _ in range(chance.randint(1, 5))]
    chance.shuffle(deliveries)
    with collecting(ledger_url, live) as collector:
        whole = next_piece(live, {})
        assert whole is not None

        while deliveries:
            part, deliveries = deliveries[:70], deliveries[70:]
            single = Piece(start=0, data=b"".join(part)[:-1], place=whole.place)
            collector.ledger.write(read(single), [single], NOON)

    expected = told(lines)
    assert 30 == len(expected)
    assert expected == rows(ledger_url, USED)


def test_rows_without_a_price_are_summed_apart(ledger_url: str, live: Path) -> None:
    """What they used counts although nobody knows what it costs."""
    give_prices(ledger_url, "tiny")
    facts: dict[str, Any] = {"lease": lease_id(1)}
    for number, cached in ((1, 2), (2, 1)):
        write(live, [end(number, cached=cached, **facts), end(10 + number, model="free", **facts)])
        collect(ledger_url, live)

    assert [
        (lease_id(1), "", "acme", 2, 6, 10, 0, 0),
        (lease_id(1), "USD", "acme", 2, 6, 10, 3, 23),
    ] == rows(ledger_url, USED)  # fmt: skip


def test_an_exchange_is_open_by_its_lease_until_it_is_summed(ledger_url: str, live: Path) -> None:
    """Whatever was last heard of it; in no moment it is neither, and in none both."""
    facts: dict[str, Any] = {"lease": lease_id(1)}
    states = []
    for line in (start(1, **facts), periodic(1, output=3, **facts), end(1, output=4, **facts), end(1, output=4, **facts)):
        write_apart(live, [line])
        collect(ledger_url, live)
        [(under_way,)] = rows(ledger_url, "select count(*) from open_exchange where lease_id = any(%s)", [lease_id(1)])
        states.append((under_way, sum(row[3] for row in rows(ledger_url, USED))))

    assert [(1, 0), (1, 0), (0, 1), (0, 1)] == states
    assert [(lease_id(1), "", "acme", 1, 3, 4, 0, 0)] == rows(ledger_url, USED)


def test_an_exchange_whose_envoy_is_gone_has_spent_what_was_last_heard_of_it(ledger_url: str, live: Path) -> None:
    """The end that comes after all contradicts its row and adds nothing."""
    facts: dict[str, Any] = {"lease": lease_id(1)}
    write_apart(live, [start(1, **facts), start(2, **facts), start(3), periodic(2, output=4, **facts), end(4, epoch=ANOTHER_LIFE)])
    collect(ledger_url, live)
    lost = rows(ledger_url, USED)

    write(live, [end(2, output=9, **facts)])
    collect(ledger_url, live)

    assert [(lease_id(1), "", "acme", 2, 3, 4, 0, 0)] == lost
    assert lost == rows(ledger_url, USED)
    assert [(request_id(2),)] == rows(ledger_url, "select request_id from usage_conflict")


def test_a_record_of_a_retired_day_spends_nothing(ledger_url: str, live: Path) -> None:
    """Nobody can say whether it was among the rows that are gone, and so among the sums."""
    with psycopg.connect(ledger_url) as connection:
        connection.execute("insert into usage_retired values (%s, 1, %s)", (NOON.date(), NOON))
    tomorrow = NOON + timedelta(days=1)
    write(live, [end(1, lease=lease_id(1)), end(2, lease=lease_id(1), at=tomorrow)])

    collect(ledger_url, live)

    assert [(lease_id(1), "", "acme", 1, 3, 5, 0, 0)] == rows(ledger_url, USED)


def test_a_journal_replayed_into_an_empty_database_spends_the_same(
    ledger_url: str, empty_database: Callable[[], str], live: Path
) -> None:
    """Orphans too."""
    give_prices(ledger_url, *PRICES)
    write_apart(live, [*exchanges(60, leases=2), start(100, lease=lease_id(1)), end(101, epoch=ANOTHER_LIFE, lease=lease_id(2))])
    collect(ledger_url, live)
    into = empty_database()
    migrate(into, NOON.date())

    replay(live, into, prices_from=ledger_url, now=NOON)

    assert len(rows(ledger_url, USED)) > 6
    assert rows(ledger_url, USED) == rows(into, USED)


def test_what_is_no_lease_loses_no_row(ledger_url: str, live: Path) -> None:
    """Under way it is found by no lease, and ended it is summed by none."""
    odd = ["mine", "0" * 100_000, 7, {"id": lease_id(1)}, lease_id(1) + "\n", lease_id(10).upper()]
    for number, lease in enumerate(odd):
        admission = {"admitted": True, "lease": lease}
        write(live, [periodic(number, output=3, admission=admission), end(100 + number, admission=admission)])

    collect(ledger_url, live)

    assert [(len(odd),)] == rows(ledger_url, "select count(*) from usage_event")
    assert [(None, len(odd))] == rows(ledger_url, "select lease_id, count(*) from open_exchange group by 1")
    assert [] == rows(ledger_url, USED)


def test_a_batch_without_a_lease_does_nothing_about_leases(ledger_url: str, live: Path) -> None:
    """Seen by a ledger that has no place for them."""
    with psycopg.connect(ledger_url) as connection:
        connection.execute("drop table lease_use")
    write(live, [end(1)])
    piece = next_piece(live, {})
    assert piece is not None

    with collecting(ledger_url, live) as collector:
        added = collector.ledger.write(read(piece), [piece], NOON)

    assert {request_id(1)} == added


def test_sums_go_48_hours_after_their_last_row_unless_something_of_them_is_open(ledger_url: str, live: Path) -> None:
    """Looked at once a minute."""
    later, days = NOON + timedelta(hours=10), timedelta(hours=48)
    write_apart(live, [*(end(number, lease=lease_id(number)) for number in (1, 2, 3)), start(4, lease=lease_id(3))])
    collect(ledger_url, live, now=NOON)
    write(live, [end(5, lease=lease_id(2))])
    collect(ledger_url, live, now=later)

    def left(now: datetime, *, monotonic: float) -> list[str]:
        with collecting(ledger_url, live, silent_seconds=3600.0) as collector:
            collector.step(NOON, 0.0)
            collector.step(now, monotonic)
        return [row[0] for row in rows(ledger_url, USED)]

    assert [lease_id(1), lease_id(2), lease_id(3)] == left(NOON + days, monotonic=60.0)
    assert [lease_id(1), lease_id(2), lease_id(3)] == left(NOON + days * 2, monotonic=59.0)
    assert [lease_id(2), lease_id(3)] == left(NOON + days + timedelta(microseconds=1), monotonic=60.0)
    assert [lease_id(3)] == left(later + days * 2, monotonic=60.0)


def test_one_pass_drops_the_oldest_sums_up_to_its_bound(ledger_url: str, live: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest waits for the next."""
    monkeypatch.setattr(ledger, "LEASES_PER_PASS_MAX", 2)
    for number in (3, 1, 2):
        write(live, [end(number, lease=lease_id(number))])
        collect(ledger_url, live, now=NOON + timedelta(minutes=number))

    with collecting(ledger_url, live) as collector:
        dropped = [collector.ledger.forget_leases(NOON + timedelta(days=1))]
        kept = [row[0] for row in rows(ledger_url, USED)]
        dropped += [collector.ledger.forget_leases(NOON + timedelta(days=1)) for _ in range(2)]

    assert [2, 1, 0] == dropped
    assert [lease_id(3)] == kept
