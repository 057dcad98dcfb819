# SPDX-License-Identifier: Apache-2.0
"""Leases among many workers, in virtual time: the promises of decision 23 at a thousand of them."""

from __future__ import annotations

import pytest

from bench.lending import Scenario, play, rush
from ratelimit.core.limits import Unit


@pytest.mark.parametrize(("workers", "seed", "first_byte"), [(1, 1, 0.2), (30, 2, 0.2), (1000, 1, 0.2), (1, 3, 3.0), (30, 4, 6.0)])
def test_no_request_passes_beyond_the_limit_and_little_is_left_unused(workers: int, seed: int, first_byte: float) -> None:
    """A rush while leases are out: whoever is refused finds less than half of the bucket left, which is what may be lent."""
    seen = play(rush(workers=workers, seed=seed, first_byte_us=int(first_byte * 1e6)))

    assert seen.passed < seen.offered
    assert seen.over[Unit.REQUESTS] <= 0
    assert seen.left_at_refusal_max < 0.5
    assert seen.unspent_max <= 0.5


@pytest.mark.parametrize(("workers", "first_byte"), [(1, 0.2), (1000, 0.2), (1, 3.0)])
def test_tokens_overshoot_by_what_was_under_way_at_the_most(workers: int, first_byte: float) -> None:
    """The published bound: the sum over requests under way, or over and not told yet, of what they used beyond their charge."""
    seen = play(rush(workers=workers, seed=1, tokens_each=300, first_byte_us=int(first_byte * 1e6)))

    assert seen.passed < seen.offered
    assert seen.over_bound <= 0


def test_far_from_the_limit_few_ask_and_near_it_all_do() -> None:
    """By the request rate of each worker; from half of the bucket on each request is decided."""
    far = play(Scenario(workers=10, per_minute=60_000, load=0.1, used=0.0, requests=1000))
    spread = play(Scenario(workers=1000, per_minute=60_000, load=0.1, used=0.0, requests=1000))
    near = play(Scenario(workers=10, per_minute=60_000, load=0.5, used=0.95, requests=500))

    assert far.asked_each < 0.2
    assert 0.8 < spread.asked_each < 1.0
    assert near.asked == near.offered


@pytest.mark.parametrize(("first_byte", "asked"), [(0.2, 0.06), (1.0, 0.06), (3.0, 0.2)])
def test_while_a_slow_first_byte_is_awaited_one_asks_for_all(first_byte: float, asked: float) -> None:
    """Twenty a second at one worker: without it 11 %, 47 % and 77 % of them would ask."""
    seen = play(Scenario(workers=1, per_minute=12_000, load=0.1, used=0.0, requests=1200, first_byte_us=int(first_byte * 1e6)))

    assert seen.asked_each < asked


@pytest.mark.parametrize(("a_second", "asked"), [(0.5, 0.42), (2, 0.17), (5, 0.08)])
def test_a_lease_lasts_its_time_for_who_comes_seldom(a_second: float, asked: float) -> None:
    """Those who call are asked about every five seconds in any case: 29, 9 and 4 %. It was 51, 22 and 10."""
    seen = play(Scenario(workers=1, per_minute=12_000, load=a_second * 60 / 12_000, used=0.0, requests=600))

    assert seen.asked_each < asked


def test_a_scenario_is_played_the_same_each_time() -> None:
    """By its seed, which matters."""
    scenario = Scenario(workers=5, per_minute=6000, load=2.0, used=0.3, requests=400)

    assert play(scenario) == play(scenario)
    assert play(scenario) != play(Scenario(workers=5, per_minute=6000, load=2.0, used=0.3, requests=400, seed=2))
