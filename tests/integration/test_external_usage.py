# SPDX-License-Identifier: Apache-2.0
"""Usage that did not pass by Envoy, in the same ledger."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

from control import external_usage
from metering.adapters.invariants import verify
from tests.integration.control_plane import ControlPlane
from tests.journals import collect, end, rows, write

#: The control plane's clock stands here.
NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


def item(name: str, **changes: Any) -> dict[str, Any]:
    return {
        "id": name, "tenant": "acme", "model": "offline", "input_tokens": 1000, "output_tokens": 10,
        "started_at": (NOW - timedelta(hours=1)).isoformat(),
    } | changes  # fmt: skip


@pytest.fixture
def plane(control: ControlPlane) -> ControlPlane:
    """With two tenants."""
    control.tenant("acme")
    control.tenant("rival")
    return control


def post(plane: ControlPlane, *items: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    answer = plane.ask("POST", "/v1/usage", json={"items": list(items)})
    return answer.status_code, answer.json()


def test_posted_usage_is_charged_summed_and_billed_as_any_other(plane: ControlPlane, postgres_url: str) -> None:
    """At the price of its moment; every invariant holds."""
    with psycopg.connect(postgres_url) as connection:
        connection.execute(
            "insert into rate_card (model, currency, input_nano, output_nano, cached_nano, reasoning_nano, effective, created_at) "
            "values ('offline', 'USD', 1000000000, 2000000000, 500000000, 2000000000, '[2026-01-01,)', now())"
        )

    plane.made("/v1/webhooks", {"url": "https://example.com/", "events": ["usage.recorded"]})

    done = post(plane, item("a"), item("b", cached_tokens=400, tenant="rival"))

    assert (201, {"added": 2, "known": 0}) == done
    assert [("acme", "offline", "external", "reported", 1_020_000), ("rival", "offline", "external", "reported", 820_000)] == rows(
        postgres_url, "select tenant, model, dialect, basis, amount_nano from billing_usage_v1 order by 1"
    )
    assert ["a", "b"] == [it[0] for it in rows(postgres_url, "select external_id from billing_external_usage_v1 order by 1")]
    assert [("acme",), ("rival",)] == rows(postgres_url, "select tenant_id from outbox where kind = 'usage.recorded' order by 1")
    march = plane.ask("GET", "/v1/tenants/acme/invoices/2026-03").json()
    assert ["0.00102"] == [it["amount"] for it in march["totals"]]
    with psycopg.connect(postgres_url) as connection:
        assert verify(connection).holds


def test_images_from_outside_are_charged_by_their_meter(plane: ControlPlane, postgres_url: str) -> None:
    """Beside tokens or alone; with another quantity a known id is a contradiction."""
    plane.made("/v1/prices", {"model": "tiny", "input": "1", "output": "0", "meter": "images", "each": "0.04"})
    at = {"model": "tiny", "started_at": NOW.isoformat(), "input_tokens": 0, "output_tokens": 0, "meter": "images", "quantity": 3}

    done = post(plane, item("a", **at))
    again = post(plane, item("a", **at))
    other = post(plane, item("a", **(at | {"quantity": 4})))

    assert [(201, 1), (201, 0), 409] == [(done[0], done[1]["added"]), (again[0], again[1]["added"]), other[0]]
    assert [("images", 3, 120_000_000)] == rows(postgres_url, "select meter, quantity, amount_nano from billing_usage_v1")


def test_what_is_posted_again_changes_nothing(plane: ControlPlane, postgres_url: str) -> None:
    """Alone or among new ones; another tenant's equal id is another item."""
    answers = [post(plane, item("a")), post(plane, item("a"), item("b")), post(plane, item("a", tenant="rival"))]

    assert [(1, 0), (1, 1), (1, 0)] == [(it[1]["added"], it[1]["known"]) for it in answers]
    assert [(3, 3000)] == rows(postgres_url, "select sum(request_count)::int, sum(input_tokens)::int from usage_hour")


def test_a_known_id_with_other_numbers_is_refused_with_all_that_came_with_it(plane: ControlPlane, postgres_url: str) -> None:
    """The first one stands."""
    post(plane, item("a"))
    for changes in (
        {"input_tokens": 7}, {"model": "other"}, {"started_at": (NOW - timedelta(days=2)).isoformat()},
        {"ended_at": NOW.isoformat()},
    ):
        status, document = post(plane, item("new"), item("a", **changes))
        assert (409, True) == (status, "such as a." in document["error"]["message"]), document
    assert [("acme", 1000)] == rows(postgres_url, "select tenant_id, input_tokens from usage_event")
    assert [(1,)] == rows(postgres_url, "select count(*) from external_usage")


@pytest.mark.parametrize(
    "changes",
    [
        {"id": ""}, {"id": "x" * 201}, {"id": "a\nb"}, {"model": ""}, {"input_tokens": -1}, {"input_tokens": 100_000_001},
        {"input_tokens": 1.5}, {"input_tokens": "1"}, {"cached_tokens": 1001}, {"reasoning_tokens": 11},
        {"started_at": "2026-03-01T11:00:00"}, {"started_at": "yesterday"}, {"started_at": (NOW + timedelta(hours=1)).isoformat()},
        {"started_at": (NOW - timedelta(days=401)).isoformat()}, {"ended_at": (NOW - timedelta(hours=2)).isoformat()},
        {"meter": "images"}, {"quantity": 2}, {"meter": "miles", "quantity": 2}, {"meter": "images", "quantity": -1},
        {"colour": "blue"}, {"key_id": "000000000000"}, {"model": "\x00"},
    ],
    ids=str,
)
def test_an_item_that_cannot_be_is_refused_and_changes_nothing(idle_control: ControlPlane, changes: dict[str, Any]) -> None:
    """With the good one beside it."""
    status, document = post(idle_control, item("good"), item("bad") | changes)

    assert 400 == status, document
    assert 0 == post_count(idle_control)


def test_a_sum_that_no_column_holds_is_refused_in_words(plane: ControlPlane, postgres_url: str) -> None:
    """A price that is absurd, or counts that are: all of the call is refused, and nothing is a character."""
    with psycopg.connect(postgres_url) as connection:
        connection.execute(
            "insert into rate_card (model, currency, input_nano, output_nano, cached_nano, reasoning_nano, effective, created_at) "
            "values ('offline', 'USD', 1000000000000000, 0, 0, 0, '[2026-01-01,)', now())"
        )

    status, document = post(plane, *(item(str(number), input_tokens=100_000_000) for number in range(93)))

    assert (400, True) == (status, "larger than can be stored" in document["error"]["message"]), document
    assert [(0,)] == rows(postgres_url, "select count(*) from usage_event")


def post_count(plane: ControlPlane) -> int:
    """Requests of acme in the last 400 days."""
    found = plane.ask("GET", "/v1/usage?tenant=acme&since=400d&by=tenant").json()["usage"]
    return sum(it["requests"] for it in found)


def test_one_call_has_a_bound_and_names_what_is_there_twice(plane: ControlPlane, postgres_url: str) -> None:
    """At the bound."""
    assert 201 == post(plane, *(item(str(n)) for n in range(external_usage.ITEMS_MAX)))[0]
    assert [400, 400, 400, 404, 404] == [
        post(plane, *(item(str(n)) for n in range(external_usage.ITEMS_MAX + 1)))[0], post(plane)[0],
        post(plane, item("twice"), item("twice"))[0], post(plane, item("x", tenant="nobody"))[0], post(plane, item("x", project="nothing"))[0],
    ]
    assert [(external_usage.ITEMS_MAX,)] == rows(postgres_url, "select count(*) from usage_event")


def test_usage_of_a_closed_month_is_an_adjustment_of_the_open_one(plane: ControlPlane, postgres_url: str, tmp_path: Path) -> None:
    """As any late row."""
    february = datetime(2026, 2, 10, tzinfo=UTC)
    collect(postgres_url, write(tmp_path / "journal/journal.jsonl", [end(1, at=february)]), now=NOW)
    plane.made("/v1/periods/2026-02/close", {"exception": "test"})

    post(plane, item("late", started_at=february.isoformat()))

    assert [(date(2026, 3, 1), date(2026, 2, 1), 1000)] == rows(postgres_url, "select period, of_period, input_tokens from adjustment")
    with psycopg.connect(postgres_url) as connection:
        assert verify(connection).holds


def test_posters_that_meet_add_each_item_once(plane: ControlPlane, postgres_url: str) -> None:
    """Four at a time, over the same items in different orders."""

    def once(seed: int) -> dict[str, Any]:
        items = [item(str(n)) for n in range(40)]
        random.Random(seed).shuffle(items)
        return post(plane, *items)[1]

    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(once, range(8)))

    assert 40 == sum(it["added"] for it in done), done
    assert [(40,)] == rows(postgres_url, "select sum(request_count)::int from usage_hour")
