# SPDX-License-Identifier: Apache-2.0
"""What is counted of an exchange: Envoy's timings of it, and tenants up to a bound."""

from __future__ import annotations

from typing import Any

import pytest
from prometheus_client import REGISTRY

from metering.adapters.metrics import OTHER_TENANTS, Exchanges
from metering.core.journal import Entry, UsageEvent, parse, refused, usage_event
from metering.core.timings import Timings, timings
from tests.journals import NOON, end, stamp

NO_TIMINGS = Timings(added=None, first_token=None, between_tokens=None, tokens_per_second=None)


def exchange(*, stream: bool = True, tenant: str = "acme", **facts: Any) -> tuple[Entry, UsageEvent]:
    """An end record and its row."""
    request = {"started_at": stamp(NOON), "dialect": "openai.chat", "model": "tiny", "stream": stream, **facts.pop("request", {})}
    entry = parse(end(1, tenant=tenant, request=request, **facts).rstrip())
    return entry, usage_event(entry)


def value(name: str, **labels: str) -> float:
    """What a series shows."""
    return REGISTRY.get_sample_value(name, labels) or 0.0


def test_a_stream_is_timed_by_its_first_byte_and_its_gaps() -> None:
    """Five tokens have four gaps."""
    entry, event = exchange(output=5, added_us=2_000, first_byte_us=300_000, answer_us=400_000)

    assert Timings(added=0.002, first_token=0.3, between_tokens=0.1, tokens_per_second=12.5) == timings(entry, event)


@pytest.mark.parametrize(
    "facts",
    [{"stream": False}, {"flags": "DC"}, {"output": 0}],
    ids=["in one piece", "left by its client", "without a token"],
)
def test_what_is_no_whole_stream_says_what_was_added_and_no_more(facts: dict[str, Any]) -> None:
    """Its first byte is not a first token, its length no rate."""
    entry, event = exchange(**{"output": 5, **facts}, added_us=2_000, first_byte_us=300_000, answer_us=400_000)

    assert Timings(added=0.002, first_token=None, between_tokens=None, tokens_per_second=None) == timings(entry, event)


def test_one_token_has_a_first_byte_and_no_gap() -> None:
    """Nothing is divided by zero."""
    entry, event = exchange(output=1, first_byte_us=300_000, answer_us=0)

    assert Timings(added=None, first_token=0.3, between_tokens=None, tokens_per_second=None) == timings(entry, event)


@pytest.mark.parametrize("odd", [-1, True, "7", 1.5, None, {}, 86_400_000_001])
def test_an_odd_timing_is_left_out_and_the_row_stands(odd: object) -> None:
    """Never a reason to lose a row: they are for people who watch."""
    entry, event = exchange(added_us=odd, first_byte_us=odd, answer_us=odd)

    assert NO_TIMINGS == timings(entry, event)
    assert 5 == event.output_tokens


def test_tenants_beyond_the_bound_share_a_label() -> None:
    """Two have their own, whoever comes later has not; the first keep theirs."""
    exchanges = Exchanges(tenants_max=2)
    before = {name: value("peaje_tenant_requests_total", tenant=name, outcome="ok") for name in ("t-1", "t-2", "t-3", OTHER_TENANTS)}

    for tenants in (("t-1", "t-2", "t-3"), ("t-1", "t-4")):
        exchanges.recorded([exchange(tenant=tenant)[::-1] for tenant in tenants], NOON)

    counted = {name: value("peaje_tenant_requests_total", tenant=name, outcome="ok") - was for name, was in before.items()}
    assert {"t-1": 2, "t-2": 1, "t-3": 0, OTHER_TENANTS: 2} == counted


def test_a_list_of_models_is_no_refusal() -> None:
    """The gateway answers it by itself, so ratelimit has not admitted it either."""
    entry, _ = exchange(tenant="t-lists", status=200, admission={})

    Exchanges(tenants_max=5).refused(refused(entry))

    assert 0 == value("peaje_tenant_requests_total", tenant="t-lists", outcome="refused")


def test_a_refused_request_counts_for_its_tenant_and_its_status() -> None:
    """Only of callers who are known: the journal keeps no others."""
    exchanges = Exchanges(tenants_max=1)
    entry, _ = exchange(tenant="t-refused", status=429, admission={})
    before = value("peaje_gateway_refusals_total", status="429")

    exchanges.refused(refused(entry))

    assert 1 == value("peaje_tenant_requests_total", tenant="t-refused", outcome="refused")
    assert before + 1 == value("peaje_gateway_refusals_total", status="429")


@pytest.mark.parametrize(("request_facts", "lane"), [({"express": "id"}, "express"), ({"recognised": "id"}, "recognised"), ({}, "asked")])
def test_the_lane_says_who_was_asked(request_facts: dict[str, str], lane: str) -> None:
    """By what the gate wrote into the record."""
    before = value("peaje_gateway_lanes_total", lane=lane)

    Exchanges(tenants_max=0).recorded([exchange(request=request_facts)[::-1]], NOON)

    assert before + 1 == value("peaje_gateway_lanes_total", lane=lane)


def test_a_batch_counts_as_its_rows_would_one_by_one() -> None:
    """Tokens and requests of one tenant are added up first, and nothing of it is lost."""
    batch = [exchange(tenant="t-batch", input=number, output=2 * number)[::-1] for number in range(1, 5)]

    Exchanges(tenants_max=1).recorded(batch, NOON)

    assert 4 == value("peaje_tenant_requests_total", tenant="t-batch", outcome="ok")
    assert (10, 20, 0) == tuple(value("peaje_tenant_tokens_total", tenant="t-batch", kind=kind) for kind in ("input", "output", "cached"))
