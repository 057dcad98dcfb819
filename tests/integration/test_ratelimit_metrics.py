# SPDX-License-Identifier: Apache-2.0
"""What Prometheus reads of ratelimit: every outcome counted once, and no more series for more callers."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import httpx
import pytest

from chassis.errors import Unavailable
from chassis.telemetry.metrics import serve
from chassis.wire import ratelimit_pb2 as wire
from ratelimit.adapters import metrics
from ratelimit.adapters.counters import StoredCounters, connect
from ratelimit.adapters.doubts import JUDGED_WITHIN, WAITING_MAX
from tests.integration.ports import free_ports
from tests.integration.test_ratelimit_stores import Desk, own_store

__all__ = ["own_store"]


@pytest.fixture(scope="module")
def port() -> int:
    """Where the metrics of this process are shown."""
    [found] = free_ports(1)
    serve(found)
    return found


@pytest.fixture
def desk(postgres_url: str, own_store: str) -> Iterator[Desk]:
    """A desk with a model for each kind of limit."""
    made = Desk(postgres_url, own_store)
    made.limit("requests", "day", 1, model="rate")
    made.limit("tokens", "calendar_month", 36, model="narrow")
    made.limit("tokens", "minute", 36, model="brisk")
    made.limit("tokens", "calendar_month", 10_000, model="quota")
    made.limit("requests", "day", 0, model="shadow", effect="shadow")
    made.limit("requests", "day", 5, model="allow", on_store_error="allow")
    made.limit("requests", "day", 5, model="deny", on_store_error="deny")
    made.connection.execute("insert into pool_capacity values ('pool', 1, null, now())")
    made.open()
    yield made
    made.close()


def scrape(port: int) -> dict[str, float]:
    """Every series with its value."""
    text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    return {name: float(value) for name, value in re.findall(r"^(peaje_ratelimit\S+) (\S+)$", text, re.MULTILINE)}


def test_every_decision_and_settle_is_counted_once(desk: Desk, port: int) -> None:
    """By outcome, kind of limit, and tokens that were too few or too many."""
    before = scrape(port)

    for number in range(2):
        desk.admit(f"rate{number}", model="rate")
        desk.admit(f"pool{number}", model="pool")
    desk.admit("quota", model="quota")
    desk.settle("quota", input="15", output="9")
    desk.settle("pool0", input="3", output="3")
    desk.settle("pool0", input="3", output="3")
    desk.admit("shadow", model="shadow")
    desk.admit("free", model="other")

    after = scrape(port)
    found = {
        name.removeprefix("peaje_ratelimit_"): after[name] - before.get(name, 0)
        for name in after if after[name] != before.get(name, 0) and "seconds" not in name and "created" not in name
    }  # fmt: skip
    assert {
        'decisions_total{outcome="full"}': 4, 'decisions_total{outcome="refused"}': 2, 'decisions_total{outcome="unlimited"}': 1,
        'refusals_total{kind="bucket",unit="requests"}': 1, 'refusals_total{kind="slots",unit="concurrency"}': 1,
        'over_total{effect="shadow",unit="requests"}': 1, "reservations_total": 2, 'settled_total{by="envoy"}': 2,
        # Requests and slots are counted as they are: nobody held more than was used.
        'refusals_judged_total{judgement="just"}': 2,
        # Twenty were held each: four too few, fourteen too many.
        "excess_tokens_total": 4, "returned_tokens_total": 14,
    } == found  # fmt: skip
    assert 7 == after["peaje_ratelimit_decision_seconds_count"] - before["peaje_ratelimit_decision_seconds_count"]
    for call, count in (("take", 6), ("settle", 3)):
        name = f'peaje_ratelimit_store_seconds_count{{call="{call}"}}'
        assert count == after[name] - before[name]


@pytest.mark.parametrize(("used", "judgement"), [((3, 3), "false"), ((9, 8), "just")])
@pytest.mark.parametrize("model", ["narrow", "brisk"])
def test_a_refusal_is_judged_by_what_those_in_its_way_came_to_use(
    desk: Desk, port: int, model: str, used: tuple[int, int], judgement: str
) -> None:
    """Twenty are held of the thirty-six of a hard quota, or of a minute's bucket; not before the ledger has their end."""
    desk.admit("in the way", model=model)
    refused = desk.admit("refused", model=model)
    now = datetime.now(UTC)
    before = scrape(port)

    desk.doubts.look(now)
    desk.doubts.judge(now)
    early = scrape(port)
    desk.connection.execute(
        "insert into usage_event (request_id, tenant_id, project_id, key_id, model, dialect, started_at, ended_at, status, outcome, "
        "input_tokens, output_tokens, cached_tokens, reasoning_tokens, basis, streamed, recorded_at) values "
        "('in the way', %s, 'default', 'k', 'm', 'openai.chat', %s, %s, 200, 'ok', %s, %s, 0, 0, 'reported', false, now())",
        (desk.tenant, now, now, *used),
    )
    desk.doubts.judge(now)

    after = scrape(port)
    assert wire.RateLimitResponse.OVER_LIMIT == refused.overall_code
    judged = {name for name in after if "judged_total{" in name and after[name] != before[name]}
    assert {name: before[name] for name in before if "judged" in name} == {name: early[name] for name in early if "judged" in name}
    assert {f'peaje_ratelimit_refusals_judged_total{{judgement="{judgement}"}}'} == judged


def test_a_refusal_whose_obstacle_goes_on_is_given_up(desk: Desk, port: int) -> None:
    """After a quarter of an hour, not before."""
    desk.admit("long", model="narrow")
    desk.admit("refused", model="narrow")
    now, name = datetime.now(UTC), 'peaje_ratelimit_refusals_judged_total{judgement="unknown"}'
    desk.doubts.look(now)
    before = scrape(port)[name]

    desk.doubts.judge(now + JUDGED_WITHIN)
    kept = scrape(port)[name]
    desk.doubts.judge(now + JUDGED_WITHIN + timedelta(seconds=1))

    assert (0, 1) == (kept - before, scrape(port)[name] - before)


def test_a_storm_of_refusals_is_judged_in_part(desk: Desk, port: int) -> None:
    """At the bound of those that wait."""
    desk.admit("in the way", model="narrow")
    name = 'peaje_ratelimit_refusals_judged_total{judgement="unknown"}'
    before = scrape(port)[name]

    for number in range(WAITING_MAX):
        desk.admit(f"r{number}", model="narrow")
    waiting = scrape(port)[name]
    desk.admit("one more", model="narrow")

    assert (0, 1) == (waiting - before, scrape(port)[name] - before)


def test_a_store_that_is_away_shows_with_the_modes_in_force(desk: Desk, port: int) -> None:
    """Failures until it is left alone, then only decisions without it."""
    desk.servicer._stored = StoredCounters(connect("redis://127.0.0.1:1", cluster=False))
    metrics.STORE_AWAY.set_function(lambda: desk.breaker.is_open)
    before = scrape(port)

    for number in range(5):
        desk.admit(f"a{number}", model="allow")
        desk.admit(f"l{number}", model="rate")
        with contextlib.suppress(Unavailable):
            desk.admit(f"d{number}", model="deny")

    after = scrape(port)
    gained = {name: after[name] - before.get(name, 0) for name in after}
    assert (0, 1) == (before["peaje_ratelimit_store_away"], after["peaje_ratelimit_store_away"])
    assert 3 == gained['peaje_ratelimit_store_failures_total{reason="away"}']
    assert {5} == {gained[f'peaje_ratelimit_without_store_total{{mode="{mode}"}}'] for mode in ("local", "allow", "deny")}
    assert 5 == gained['peaje_ratelimit_decisions_total{outcome="unavailable"}']


def test_more_callers_are_no_more_series_and_none_is_named(desk: Desk, port: int) -> None:
    """Whatever they call themselves."""
    desk.admit("first", model="rate")
    before = scrape(port)

    for number in range(100):
        desk.admit(f"r{number}", model=f'evil"}}\n{number}', key_id=f"key-{number}", tenant=f"tenant-{number}")

    after = scrape(port)
    assert set(before) == set(after)
    assert not [name for name in after if "evil" in name or "key-" in name or "tenant-" in name or desk.tenant in name]
