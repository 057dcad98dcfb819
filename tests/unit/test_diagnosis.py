# SPDX-License-Identifier: Apache-2.0
"""What the doctor says of what was seen, at each bound."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from control.core import diagnosis as d
from control.core.rates import Rates, Sums, rates

NOW = datetime(2026, 11, 12, 12, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("remark", "level"),
    [
        (d.judge_clock("c", 2.0), d.Level.FINE), (d.judge_clock("c", -2.1), d.Level.LOOK), (d.judge_clock("c", 60.1), d.Level.FAULT),
        (d.judge_lag({"a": 5.0}), d.Level.FINE), (d.judge_lag({"a": 0.1, "b": 5.1}), d.Level.LOOK),
        (d.judge_lag({"a": 60.1}), d.Level.FAULT), (d.judge_lag({}), d.Level.FAULT),
        (d.judge_partitions(7), d.Level.FINE), (d.judge_partitions(6), d.Level.LOOK), (d.judge_partitions(0), d.Level.FAULT),
        (d.judge_disk("disk", 79.9), d.Level.FINE), (d.judge_disk("disk", 80), d.Level.LOOK), (d.judge_disk("disk", 95), d.Level.FAULT),
        (d.judge_certificates({}), d.Level.FINE), (d.judge_certificates({"a": 15}), d.Level.FINE),
        (d.judge_certificates({"a": 99, "b": 14}), d.Level.LOOK), (d.judge_certificates({"a": 0}), d.Level.FAULT),
        (d.judge_open(NOW - timedelta(hours=1), count=1, now=NOW), d.Level.FINE),
        (d.judge_open(NOW - timedelta(hours=1, seconds=1), count=1, now=NOW), d.Level.LOOK),
        (d.judge_open(None, count=0, now=NOW), d.Level.FINE),
        (d.judge_store(policy="noeviction", used_bytes=80, max_bytes=100), d.Level.FINE),
        (d.judge_store(policy="noeviction", used_bytes=81, max_bytes=100), d.Level.LOOK),
        (d.judge_store(policy="noeviction", used_bytes=10**9, max_bytes=0), d.Level.FINE),
        (d.judge_store(policy="allkeys-lru", used_bytes=1, max_bytes=100), d.Level.FAULT),
        (d.judge_parts({"envoy": "ready", "migrations": "done"}, {"envoy": 0}), d.Level.FINE),
        (d.judge_parts({"envoy": "ready"}, {"envoy": 2}), d.Level.LOOK), (d.judge_parts({"envoy": "died"}, {"envoy": 2}), d.Level.FAULT),
        (d.judge_services({"extauth": 2, "metering": 0}), d.Level.FAULT), (d.judge_services({"extauth": 1}), d.Level.FINE),
        (d.judge_differences(exceptions=0, drifting=[], defects=0), d.Level.FINE),
        (d.judge_differences(exceptions=1, drifting=[], defects=0), d.Level.FAULT),
        (d.judge_differences(exceptions=0, drifting=["tiny"], defects=0), d.Level.FAULT),
        (d.judge_differences(exceptions=0, drifting=[], defects=1), d.Level.FAULT),
        (d.judge_scripts({"gate": 0, "tap": 0}), d.Level.FINE), (d.judge_scripts({"gate": 0, "tap": 1}), d.Level.FAULT),
        (d.judge_key_sets({}), d.Level.FINE), (d.judge_key_sets({"acme": "ConnectError"}), d.Level.FAULT),
        (d.judge_keys([], active=3), d.Level.FINE), (d.judge_keys(["k1"], active=3), d.Level.LOOK),
        (d.judge_limits([]), d.Level.FINE), (d.judge_limits(["one.", "two."]), d.Level.LOOK),
        (d.judge_version("schema", "0012", "0012"), d.Level.FINE), (d.judge_version("schema", "0011", "0012"), d.Level.FAULT),
        (d.judge_webhooks([]), d.Level.FINE), (d.judge_webhooks(["wh_1"]), d.Level.LOOK),
    ],
)  # fmt: skip
def test_each_judgement_at_its_bounds(remark: d.Remark, level: d.Level) -> None:
    """What is not fine says what to do, and what is fine says nothing to do."""
    assert level == remark.level, remark
    assert (level is d.Level.FINE) == (not remark.mend), remark


def test_many_keys_are_counted_and_not_listed() -> None:
    """A line at night is a line."""
    said = d.judge_keys([f"k{number}" for number in range(8)], active=10).says

    assert "k4 and 3 more" in said
    assert "k5" not in said


def test_rates_are_what_grew_and_who_had_most_comes_first() -> None:
    """A newcomer counts from nothing; who did nothing is left out."""
    before = {"acme": Sums(requests=10, output_tokens=100), "idle": Sums(requests=3)}
    after = {"acme": Sums(requests=12, output_tokens=110), "idle": Sums(requests=3), "new": Sums(requests=1, input_tokens=40, refused=2)}

    assert [
        Rates(tenant="new", requests=0.5, input_tokens=20.0, output_tokens=0.0, refused=1.0),
        Rates(tenant="acme", requests=1.0, input_tokens=0.0, output_tokens=5.0, refused=0.0),
    ] == rates(before, after, seconds=2.0)


def test_a_sum_whose_oldest_hour_has_left_says_nothing() -> None:
    """Never less than nothing a second."""
    assert [] == rates({"acme": Sums(requests=10)}, {"acme": Sums(requests=4)}, seconds=1.0)


def test_each_difference_has_its_own_mend() -> None:
    """Damage to a journal's file is no exception that somebody could sign for."""
    damaged = d.judge_differences(exceptions=0, drifting=[], defects=1)
    both = d.judge_differences(exceptions=1, drifting=[], defects=1)

    assert (True, False) == ("disk" in damaged.mend, "sign" in damaged.mend)
    assert (True, True) == ("disk" in both.mend, "sign" in both.mend)
