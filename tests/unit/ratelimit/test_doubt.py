# SPDX-License-Identifier: Apache-2.0
"""Which refusals can have been false, and which were."""

from __future__ import annotations

import dataclasses

import pytest

from ratelimit.core.demand import Counter, Kind
from ratelimit.core.doubt import Hold, Judgement, Obstacle, is_doubtful, judge
from ratelimit.core.limits import Effect, Period, Unit
from ratelimit.core.reading import Reading, read
from ratelimit.core.usage import Price, Usage

TOKENS = Counter(
    name="q", limit_id=1, kind=Kind.QUOTA, unit=Unit.TOKENS, period=Period.CALENDAR_MONTH, amount=100, burst=100, full=40, lean=40,
    ends_us=10**15,
)  # fmt: skip
PACE = dataclasses.replace(TOKENS, name="b", kind=Kind.BUCKET, period=Period.MINUTE, ends_us=0)
AT_ONCE = dataclasses.replace(TOKENS, name="l", kind=Kind.LEASES, unit=Unit.CONCURRENCY, period=Period.NOW, amount=1, ends_us=0)
REQUESTS = dataclasses.replace(PACE, name="r", unit=Unit.REQUESTS, amount=1, burst=1)
HELD = (Hold(request_id="a", hits=30), Hold(request_id="b", hits=30))


def reading(counter: Counter, *, level: float, hits: int = 40) -> Reading:
    """What *counter* says to *hits* more."""
    return read(counter, level * (counter.period_us or 1), held=60, hits=hits, now_us=0)


@pytest.mark.parametrize(
    ("readings", "expected"),
    [
        ([reading(TOKENS, level=70)], True), ([reading(PACE, level=70)], True), ([reading(TOKENS, level=60)], False),
        ([reading(TOKENS, level=70), reading(AT_ONCE, level=1, hits=1)], False),
        ([reading(TOKENS, level=70), reading(REQUESTS, level=1, hits=1)], False),
        ([reading(TOKENS, level=70), reading(REQUESTS, level=0, hits=1)], True),
        ([reading(dataclasses.replace(TOKENS, effect=Effect.SHADOW), level=70)], False),
    ],
    ids=["quota", "bucket", "fits", "beside a slot", "beside a request", "beside one with room", "shadow"],
)  # fmt: skip
def test_only_what_is_estimated_can_have_been_held_for_nothing(readings: list[Reading], expected: bool) -> None:
    """One limit that counts things as they are refuses justly, whatever the others say."""
    assert expected is is_doubtful(readings)


@pytest.mark.parametrize(("counter", "level"), [(TOKENS, 70), (PACE, 70), (TOKENS, 120), (PACE, 120)])
def test_what_is_missing_is_what_does_not_fit(counter: Counter, level: int) -> None:
    """Also of a limit that was overshot."""
    assert level + 40 - 100 == reading(counter, level=level).missing


@pytest.mark.parametrize(("used", "expected"), [(25, Judgement.FALSE), (26, Judgement.JUST)])
def test_what_came_back_is_enough_or_not(used: int, expected: Judgement) -> None:
    """At the bound: ten were missing."""
    obstacle = Obstacle(counter=TOKENS, missing=10, holds=HELD)

    assert expected is judge([obstacle], {"a": Usage(input=5, output=20), "b": Usage(input=5, output=used - 5)})


def test_nothing_is_said_while_one_of_them_is_under_way() -> None:
    """Its end is not known yet."""
    assert None is judge([Obstacle(counter=TOKENS, missing=10, holds=HELD)], {"a": Usage(input=0, output=0)})


def test_every_limit_that_refused_must_have_had_room() -> None:
    """Money is judged at its own price."""
    price = Price(currency="USD", input_nano=1_000_000, output_nano=1_000_000, cached_nano=0)
    money = Obstacle(counter=dataclasses.replace(TOKENS, unit=Unit.MONEY, price=price), missing=20, holds=(Hold(request_id="a", hits=30),))
    tokens = Obstacle(counter=TOKENS, missing=10, holds=HELD)
    used = {"a": Usage(input=1, output=10), "b": Usage(input=1, output=29)}

    assert Judgement.FALSE is judge([tokens], used)
    assert Judgement.JUST is judge([tokens, money], used)


def test_nobody_in_the_way_is_a_just_refusal() -> None:
    """The limit was used up."""
    assert Judgement.JUST is judge([Obstacle(counter=TOKENS, missing=1, holds=())], {})
