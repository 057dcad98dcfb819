# SPDX-License-Identifier: Apache-2.0
"""What Lua adds to an engine's load report, so that Envoy weighs it."""

from __future__ import annotations

import pytest

from tests.conformance.road import complete

WAITING, USED = "named_metrics.num_requests_waiting", "named_metrics.kv_cache_usage_perc"


@pytest.mark.parametrize(
    ("said", "added"),
    [
        (f"{WAITING}=0.0, {USED}=0.25", "application_utilization=0.2500, rps_fractional=1"),
        (f"{USED}=0.25,{WAITING}=0", "application_utilization=0.2500, rps_fractional=1"),
        (f"{WAITING}=3, {USED}=0.25", "application_utilization=1.0000, rps_fractional=1"),
        (f"{USED}=0", "application_utilization=0.0100, rps_fractional=1"),
        (f"{USED}=nan", "application_utilization=0.0100, rps_fractional=1"),
        (f"{USED}=-1", "application_utilization=0.0100, rps_fractional=1"),
        ("application_utilization=0.5", "rps_fractional=1"),
        (f"cpu_utilization=0.5, {USED}=0.1", "rps_fractional=1"),
    ],
)
def test_a_report_gets_what_it_lacks(said: str, added: str) -> None:
    """A rate, which is the same for all; a utilization, from how full the cache is, or full where requests wait."""
    assert f"TEXT {said}, {added}" == complete(f"TEXT {said}")


@pytest.mark.parametrize(
    "report",
    [
        None, "", "TEXT", "TEXT ", "JSON {}", "TEXT cpu_utilization=0.5, rps_fractional=3", "TEXT named_metrics.other=1",
        f"TEXT x{USED}=0.5", f"TEXT {USED}=full", f"text {USED}=0.5", f"TEXT {USED}=0.5{' ' * 4096}",
    ],
)  # fmt: skip
def test_any_other_report_is_left_alone(report: str | None) -> None:
    """What is whole, what is none, what says nothing that we know, what no engine would write."""
    assert None is complete(report)


def test_the_longest_report_is_read() -> None:
    """4,096 bytes, and not one more."""
    said = f"TEXT {USED}=0.5"

    assert complete(said.ljust(4096)) is not None
    assert complete(said.ljust(4097)) is None
