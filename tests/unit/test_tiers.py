# SPDX-License-Identifier: Apache-2.0
"""Prices for longer prompts: what a request costs by its tier, what is held for it, and how a tier is written."""

from __future__ import annotations

import doctest
import random
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest

from chassis.errors import Invalid
from control import prices
from control.cli import tiers as written
from metering.core import rating
from metering.core.rating import RateCard, amount_nano
from ratelimit.core import usage
from ratelimit.core.decide import Memory, settle, take
from ratelimit.core.demand import demand
from ratelimit.core.estimate import Estimates
from ratelimit.core.limits import Limit, Period, Unit
from ratelimit.core.usage import Price, Report, Usage, cost_nano, holds
from tests.unit.ratelimit.test_core import ASK, NOW
from tests.unit.test_rating import CARD

#: The middle tier is the dearest for input, and the highest is the cheapest for everything.
TIERS = (
    rating.Tier(above_tokens=100, input_nano=300_000_000, output_nano=900_000_000, cached_nano=30_000_000, reasoning_nano=1_000_000_000),
    rating.Tier(above_tokens=200, input_nano=10_000_000, output_nano=20_000_000, cached_nano=1_000_000, reasoning_nano=20_000_000),
)
TIERED = replace(CARD, tiers=TIERS)


def cost(card: RateCard, *, input: int, output: int = 0, cached: int = 0, reasoning: int = 0, **metered: object) -> int:
    amount = amount_nano(
        card, input_tokens=input, output_tokens=output, cached_tokens=cached, reasoning_tokens=reasoning, **metered,  # type: ignore[arg-type]
    )
    assert amount is not None
    return amount


@pytest.mark.parametrize(
    ("input_tokens", "price"), [(0, 0), (1, 150), (99, 150), (100, 150), (101, 300), (200, 300), (201, 10), (100_000_000, 10)]
)
def test_a_request_is_charged_whole_by_the_tier_that_its_input_falls_into(input_tokens: int, price: int) -> None:
    """More than the bound is in the tier, exactly the bound is not; the first tokens cost what the last do."""
    assert input_tokens * price == cost(TIERED, input=input_tokens)


def test_the_whole_input_says_which_tier_and_the_tier_prices_every_kind_of_token() -> None:
    """Cached tokens count towards the bound; output, cached and reasoning tokens have the tier's own prices."""
    assert 11 * 300 + 90 * 30 + 4 * 900 + 6 * 1000 == cost(TIERED, input=101, cached=90, output=10, reasoning=6)
    assert 10 * 150 + 90 * 75 + 4 * 600 + 6 * 900 == cost(TIERED, input=100, cached=90, output=10, reasoning=6)


def test_the_minimum_and_the_meter_are_the_cards_whatever_the_tier() -> None:
    """Tiers are of tokens."""
    card = replace(TIERED, minimum_nano=50_000)

    assert 50_000 == cost(card, input=1) and 50_000 == cost(card, input=101)
    assert 101 * 300 + 40_000_000 == cost(card, input=101, meter="images", quantity=1)


def test_tiered_amounts_are_within_half_a_nano_of_the_exact_fraction() -> None:
    """Ten thousand random cards and requests, at the bounds and anywhere, against arithmetic that has no rounding."""
    chance = random.Random(13)
    names = ("input_nano", "output_nano", "cached_nano", "reasoning_nano")
    for _ in range(10_000):
        bounds = sorted(chance.sample(range(1, 10**6), chance.randint(0, 8)))
        numbers = [{name: chance.randrange(10 ** chance.randint(1, 15)) for name in names} for _ in range(len(bounds) + 1)]
        tiers = tuple(rating.Tier(above_tokens=bound, **prices) for bound, prices in zip(bounds, numbers[1:], strict=True))
        card = replace(CARD, tiers=tiers, **numbers[0])  # type: ignore[arg-type]
        read = chance.choice([0, 1, chance.randrange(10**7), *(bound + chance.choice([-1, 0, 1]) for bound in bounds)])
        written = chance.randrange(10**6)
        cached, reasoning = chance.randint(0, read), chance.randint(0, written)

        amount = cost(card, input=read, output=written, cached=cached, reasoning=reasoning)

        by = numbers[sum(read > bound for bound in bounds)]
        parts = zip((read - cached, written - reasoning, cached, reasoning), names, strict=True)
        assert -Fraction(1, 2) < amount - sum(Fraction(tokens * by[name], 1_000_000) for tokens, name in parts) <= Fraction(1, 2)


def test_what_is_held_is_never_less_than_what_the_request_can_cost() -> None:
    """Whichever tier within reach it turns out to fall into, dearer or cheaper, as long as it is no longer than estimated."""
    chance, dearer = random.Random(5), 0
    for _ in range(10_000):
        bounds = sorted(chance.sample(range(1, 3000), chance.randint(1, 4)))
        tiers = tuple(usage.Tier(above_tokens=b, **_prices(chance)) for b in bounds)
        price = Price(currency="USD", minimum_nano=chance.choice([0, 500]), tiers=tiers, reach=chance.randrange(4000), **_prices(chance))
        asked = Usage(input=chance.randrange(3000), output=chance.randrange(3000), quantity=chance.randint(0, 3))
        actual = Usage(
            input=chance.randint(0, asked.input), output=chance.randint(0, asked.output), cached=chance.randint(0, asked.input),
            reasoning=chance.randint(0, asked.output), quantity=chance.randint(0, asked.quantity),
        )

        held = holds(Unit.MONEY, asked, price)

        assert cost_nano(price, actual) <= held
        dearer += held > cost_nano(price, asked)
    assert 1000 < dearer


def test_reasoning_is_held_and_settled_at_its_own_price() -> None:
    """Dearer than the rest of the output it is held at, until the engine has said how much there was; cheaper it is not."""
    dear = Price(currency="USD", input_nano=1_000_000, output_nano=2_000_000, cached_nano=500_000, reasoning_nano=7_000_000)
    cheap = replace(dear, reasoning_nano=1_000_000)
    whole = Usage(input=10, output=20, reasoning=15)

    assert (10 + 5 * 2 + 15 * 7, 10 + 5 * 2 + 15) == (cost_nano(dear, whole), cost_nano(cheap, whole))
    assert (10 + 20 * 7, 10 + 20 * 2) == (holds(Unit.MONEY, whole, dear), holds(Unit.MONEY, whole, cheap))
    assert cost_nano(dear, whole) == cost_nano(dear, Report(input=10, output=20, reasoning=15).usage(whole))
    assert 20 * 7 == cost_nano(dear, Usage(input=0, output=20, reasoning=99))


def test_a_tier_out_of_reach_holds_nothing_more() -> None:
    """A short prompt's budget is not held by prices that it cannot be charged; at the bound itself neither."""
    tier = usage.Tier(above_tokens=100, input_nano=5_000_000, output_nano=5_000_000, cached_nano=0)
    price = Price(currency="USD", input_nano=1_000_000, output_nano=1_000_000, cached_nano=0, tiers=(tier,))
    asked = Usage(input=80, output=20)

    held = [holds(Unit.MONEY, asked, replace(price, reach=reach)) for reach in (0, 100, 101)]

    assert [100, 100, 500] == held
    assert 100 == holds(Unit.TOKENS, asked, replace(price, reach=101))


def test_a_budget_is_never_overspent_by_a_prompt_in_a_dearer_tier() -> None:
    """
    Forty lives of a budget with many prompts under way, each as long as its bytes allow.

    What is spent beyond the budget is at most what the tokens beyond the estimates cost; of whoever was no longer than
    estimated nothing is, although one dearer tier is within everybody's reach.
    """
    chance, admitted = random.Random(21), 0
    for life in range(40):
        tier = usage.Tier(above_tokens=chance.randint(20, 60), input_nano=9_000_000, output_nano=9_000_000, cached_nano=9_000_000)
        price = Price(currency="USD", input_nano=1_000_000, output_nano=1_000_000, cached_nano=1_000_000, tiers=(tier,))
        limit = Limit(limit_id=1, tenant_id="t", unit=Unit.MONEY, period=Period.CALENDAR_MONTH, amount=5_000, currency="USD")
        memory, under_way, beyond = Memory(), [], 0
        for number in range(100):
            ask = replace(ASK, request_id=str(number), prompt_bytes=chance.randint(1, 150), output_tokens_max=chance.randint(1, 40), choices=1)
            asked = demand(ask, [limit], estimates=Estimates(), price=price, output_cap=100, now=NOW)
            outcome = take(memory, asked, number)
            if outcome.admitted:
                admitted += 1
                most = ask.prompt_bytes if life % 2 else asked.full.input
                actual = Report(input=chance.randint(0, most), output=chance.randint(0, outcome.output))
                beyond += max(0, (actual.input or 0) - asked.full.input) * 9
                under_way.append((ask.request_id, actual))
            while len(under_way) > 20 or (under_way and number == 99):
                settle(memory, *under_way.pop(chance.randrange(len(under_way))), number)

        [level] = memory.levels.values()
        assert not level.held and level.used <= 5_000 + beyond
        assert beyond == 0 or life % 2
    assert admitted > 400


@pytest.mark.parametrize("module", [rating, usage, written])
def test_examples_in_the_docs_are_true(module: object) -> None:
    """They are what a reader tries first."""
    assert 0 == doctest.testmod(module).failed  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    [
        "", "200000", "200000:", "200000:input=1", "200000:output=1", "x:input=1,output=2", "-1:input=1,output=2", "1.5:input=1,output=2",
        "200000:input=1,input=2,output=3", "200000:input=1,output=2,tokens=3", "200000:input,output=2", "200k:input=1,output=2",
        "1234567890:input=1,output=2", "٢:input=1,output=2", "200000:input=1,output=2,",
    ],
)
def test_a_tier_that_is_not_written_as_one_is_refused_with_how_to(text: str) -> None:
    """Nothing is guessed about money."""
    with pytest.raises(Invalid, match="is not usable") as refused:
        written.tier_bodies([text])

    assert "200000:input=2.50,output=15" in str(refused.value.mend)


def test_a_written_tier_is_what_was_said_and_what_is_not_said_is_as_the_tiers_own_tokens() -> None:
    """From the lowest, whatever the order; cached as input, reasoning as output, as of a price without tiers."""
    said = written.tier_bodies(["7:output=3,input=2", "5:input=1,output=1,cached=0.5,reasoning=4"])
    price = prices.Price(model="tiny", input="1", output="1", tiers=tuple(prices.PriceTier(**tier) for tier in said))

    found = [(it.above_tokens, it.input_nano, it.output_nano, it.cached_nano, it.reasoning_nano) for it in prices.tiers(price)]

    nano = 1_000_000_000
    assert [(5, nano, nano, nano // 2, 4 * nano), (7, 2 * nano, 3 * nano, 2 * nano, 3 * nano)] == found


def _prices(chance: random.Random) -> dict[str, Any]:
    input_nano = chance.randrange(10**9)
    return {
        "input_nano": input_nano, "output_nano": chance.randrange(10**9), "cached_nano": chance.randrange(10**9),
        "reasoning_nano": chance.choice([None, chance.randrange(10**9)]),
    }
