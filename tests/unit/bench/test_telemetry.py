# SPDX-License-Identifier: Apache-2.0
"""The interval that the telemetry bench tells: exact for any distribution, by counting."""

from __future__ import annotations

import pytest

from bench.telemetry import Cycle, interval, row


@pytest.mark.parametrize(("count", "low", "high"), [(5, 1, 5), (6, 1, 6), (10, 2, 9), (20, 6, 15), (40, 14, 27)])
def test_the_interval_is_the_table_s_of_the_sign_test(count: int, low: int, high: int) -> None:
    """Below six nothing narrower than all of them is sure."""
    assert (low, high) == interval([float(number) for number in range(count, 0, -1)])


def test_a_line_says_how_much_more_and_how_sure() -> None:
    """By ratios, not by the difference of two medians."""
    cycles = [Cycle(off=100.0 * factor, on=104.0 * factor, scrape=0.0, rate=100.0) for factor in range(1, 11)]

    assert "| lane | 100 | 550 | 572 | 0 | +4.0 % | +4.0 to +4.0 % | 10 |" == row("lane", cycles)


def test_a_request_has_its_part_of_a_scrape() -> None:
    """Of 15 ms each fifteen seconds at a hundred requests a second: ten microseconds."""
    assert 110.0 == Cycle(off=100.0, on=100.0, scrape=15_000.0, rate=100.0).with_scrapes
