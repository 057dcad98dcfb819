# SPDX-License-Identifier: Apache-2.0
"""What Prometheus reads of a running installation."""

from __future__ import annotations

import time

from prometheus_client.parser import text_string_to_metric_families

from control.monitoring.catalogue import read_catalogue
from tests.dataplane.installation import VISIBLE_SECONDS, Installation, Tenant, chat


def shown(road: Installation, part: str) -> dict[str, float]:
    """Every sample that a part shows, by its name and the values of its labels."""
    return {
        f"{sample.name}{sorted(sample.labels.values())}": sample.value
        for family in text_string_to_metric_families(road.scrape(part)) for sample in family.samples
    }


def families(page: str) -> set[str]:
    """Our metrics on a page, those without a series yet too, by the name that samples have."""
    declared = (line.split() for line in page.splitlines() if line.startswith("# TYPE peaje_"))
    return {name for _, _, name, _ in declared if not name.endswith("_created")}


def test_each_process_shows_what_the_catalogue_says_and_nothing_else(road: Installation) -> None:
    """Both ways: what is not shown cannot be watched, and a zero of a process that does not count it would mislead."""
    catalogue = read_catalogue()

    for part in road.metrics_ports:
        assert {metric.name for metric in catalogue if part in metric.shown_by} == families(road.scrape(part)), part


def test_a_stream_is_timed_and_counted_for_its_tenant(road: Installation, tenant: Tenant) -> None:
    """By Envoy's clock: the engine waits before the first byte and between tokens, and so much it takes at least."""
    before = shown(road, "collector")
    gaps, pause, first = 9, 0.03, 0.2

    answer = road.post(
        tenant, json=chat(max_tokens=gaps + 1, stream=True), fault={"first_ms": first * 1000, "chunk_ms": pause * 1000}
    )

    assert 200 == answer.status_code
    name = f"peaje_tenant_requests_total['ok', '{tenant.tenant_id}']"
    deadline = time.monotonic() + VISIBLE_SECONDS
    while (after := shown(road, "collector")).get(name) != 1:
        assert time.monotonic() < deadline, sorted(after)
        time.sleep(0.05)
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert 1 == grown["peaje_model_first_token_seconds_count['tiny']"] == grown["peaje_model_tokens_per_second_count['tiny']"]
    assert first <= grown["peaje_model_first_token_seconds_sum['tiny']"]
    assert pause * 0.9 <= grown["peaje_model_between_tokens_seconds_sum['tiny']"]
    assert grown["peaje_model_tokens_per_second_sum['tiny']"] <= (gaps + 1) / (gaps * pause * 0.9)
    assert 0 < grown["peaje_gateway_added_seconds_sum[]"] < grown["peaje_model_first_token_seconds_sum['tiny']"]
    assert gaps + 1 == grown[f"peaje_tenant_tokens_total['output', '{tenant.tenant_id}']"]


def test_listeners_hear_themselves(road: Installation) -> None:
    """What carries a revocation shows how long it takes, in each process that must hear of one."""
    deadline = time.monotonic() + VISIBLE_SECONDS

    for part in ("extauth", "ratelimit", "beacon"):
        while not shown(road, part).get(f"peaje_listener_heard_seconds_count['{part}']"):
            assert time.monotonic() < deadline, part
            time.sleep(0.1)
        assert shown(road, part)[f"peaje_listener_silent_seconds['{part}']"] < VISIBLE_SECONDS
