# SPDX-License-Identifier: Apache-2.0
"""What an exchange costs: integers, one rounding, each token once."""

from __future__ import annotations

import random
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from fractions import Fraction

import pytest

from chassis.errors import Invalid
from control.money import decimal_text, nano
from metering.core.rating import RateCard, RateCards, amount_nano

NEW_YEAR = datetime(2026, 1, 1, tzinfo=UTC)
CARD = RateCard(
    rate_card_id=1, tenant_id=None, model="tiny", currency="USD", input_nano=150_000_000, output_nano=600_000_000,
    cached_nano=75_000_000, reasoning_nano=900_000_000, minimum_nano=0, meter="images", each_nano=40_000_000,
    starts_at=NEW_YEAR, ends_at=None,
)


def cost(card: RateCard = CARD, input: int = 0, output: int = 0, cached: int = 0, reasoning: int = 0) -> int:
    amount = amount_nano(
        card, input_tokens=input, output_tokens=output, cached_tokens=cached, reasoning_tokens=reasoning
    )
    assert amount is not None
    return amount


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ({}, 0),
        ({"input": 1}, 150),
        ({"output": 1}, 600),
        ({"input": 1, "cached": 1}, 75),
        ({"output": 1, "reasoning": 1}, 900),
        ({"input": 1_000_000, "output": 1_000_000}, 750_000_000),
        ({"input": 10, "output": 10, "cached": 4, "reasoning": 6}, 6 * 150 + 4 * 75 + 4 * 600 + 6 * 900),
    ],
)
def test_each_token_is_charged_once_at_its_price(tokens: dict[str, int], expected: int) -> None:
    """Cached is part of input, reasoning part of output."""
    assert expected == cost(**tokens)


@pytest.mark.parametrize(("price", "expected"), [(499_999, 0), (500_000, 1), (500_001, 1), (1_499_999, 1), (1_500_000, 2)])
def test_half_a_nano_is_rounded_up_and_less_is_not(price: int, expected: int) -> None:
    """The one rounding, at its edge."""
    assert expected == cost(replace(CARD, input_nano=price), input=1)


def test_the_sum_is_rounded_and_not_its_parts() -> None:
    """Two halves are one."""
    assert 1 == cost(replace(CARD, input_nano=500_000, output_nano=500_000), input=1, output=1)


def test_a_minimum_is_for_requests_that_used_a_token() -> None:
    """Zero stays zero."""
    card = replace(CARD, minimum_nano=1000)

    assert (0, 1000, 1000, 1050) == (cost(card), cost(card, input=1), cost(card, input=6), cost(card, input=7))


def test_amounts_are_within_half_a_nano_of_the_exact_fraction() -> None:
    """Ten thousand random requests against arithmetic that has no rounding."""
    chance = random.Random(3)
    for _ in range(10_000):
        prices = [chance.randrange(10**chance.randint(1, 15)) for _ in range(4)]
        card = replace(CARD, **dict(zip(("input_nano", "output_nano", "cached_nano", "reasoning_nano"), prices, strict=True)))
        read, written = chance.randrange(10**8), chance.randrange(10**8)
        cached, reasoning = chance.randint(0, read), chance.randint(0, written)

        amount = cost(card, input=read, output=written, cached=cached, reasoning=reasoning)

        exact = Fraction(
            (read - cached) * prices[0] + (written - reasoning) * prices[1] + cached * prices[2] + reasoning * prices[3],
            1_000_000,
        )
        assert -Fraction(1, 2) < amount - exact <= Fraction(1, 2)
        assert amount < 2**63


def test_a_card_holds_from_its_beginning_and_before_its_end() -> None:
    """To the microsecond."""
    tick, end = timedelta(microseconds=1), NEW_YEAR + timedelta(days=31)
    one, two = replace(CARD, ends_at=end), replace(CARD, rate_card_id=2, starts_at=end)
    cards = RateCards([two, one])

    found = [
        cards.find(tenant_id="acme", model="tiny", admitted_at=at)
        for at in (NEW_YEAR - tick, NEW_YEAR, end - tick, end, end + tick)
    ]

    assert [None, one, one, two, two] == found


def test_a_tenants_own_card_goes_before_the_one_for_everybody() -> None:
    """And is nobody else's."""
    own = replace(CARD, rate_card_id=2, tenant_id="acme", ends_at=NEW_YEAR + timedelta(days=1))
    cards = RateCards([CARD, own])

    assert own == cards.find(tenant_id="acme", model="tiny", admitted_at=NEW_YEAR)
    assert CARD == cards.find(tenant_id="acme", model="tiny", admitted_at=NEW_YEAR + timedelta(days=1))
    assert CARD == cards.find(tenant_id="bolt", model="tiny", admitted_at=NEW_YEAR)
    assert None is cards.find(tenant_id="acme", model="other", admitted_at=NEW_YEAR)


@pytest.mark.parametrize("text", ["0", "0.15", "0.6", "1000000", "0.000000001", "999999999.999999999"])
def test_decimal_text_becomes_nano_and_back_exactly(text: str) -> None:
    """No float on the way."""
    number = nano(text, what="input")

    assert number == nano(decimal_text(number), what="input")
    assert Fraction(text) * 10**9 == number


@pytest.mark.parametrize("text", ["", ".5", "5.", "-1", "+1", "1e3", "1_000", "0,15", "nan", "inf", " 1", "1\n", "0.0000000001", "٣", "1234567890"])
def test_what_is_no_plain_number_is_refused(text: str) -> None:
    """Nothing is guessed about money."""
    with pytest.raises(Invalid, match="input is"):
        nano(text, what="input")


def test_a_meter_is_charged_beside_the_tokens_and_rounded_with_them() -> None:
    """Each at its price; a price of another meter charges nothing."""
    used = {"input_tokens": 3, "output_tokens": 0, "cached_tokens": 0, "reasoning_tokens": 0}

    assert 3 * 150 + 2 * 40_000_000 == amount_nano(CARD, **used, meter="images", quantity=2)
    assert 3 * 150 == amount_nano(CARD, **used, meter="characters", quantity=2)


def test_what_only_a_meter_can_charge_has_no_price_where_the_card_has_none_for_it() -> None:
    """Never free by mistake; a price of nothing is one."""
    nothing = {"input_tokens": 0, "output_tokens": 0, "cached_tokens": 0, "reasoning_tokens": 0}

    assert amount_nano(CARD, **nothing, meter="characters", quantity=2) is None
    assert 0 == amount_nano(replace(CARD, meter="characters", each_nano=0), **nothing, meter="characters", quantity=2)
    assert 0 == amount_nano(CARD, **nothing)


def test_a_minimum_is_for_whatever_was_used() -> None:
    """An image cheaper than the minimum costs the minimum."""
    card = replace(CARD, each_nano=5, minimum_nano=1000)

    assert 1000 == amount_nano(card, input_tokens=0, output_tokens=0, cached_tokens=0, reasoning_tokens=0, meter="images", quantity=1)
