# SPDX-License-Identifier: Apache-2.0
"""Many streams on one hard quota: what each is given while all are under way."""

from __future__ import annotations

import dataclasses
import random
from datetime import UTC, datetime

import pytest

from ratelimit.core.decide import Memory, Renewal, Verdict, renew, settle, take
from ratelimit.core.demand import demand
from ratelimit.core.estimate import Estimates
from ratelimit.core.limits import Ask, Limit, Period, Unit
from ratelimit.core.usage import Price, Report

NOW = datetime(2030, 3, 14, tzinfo=UTC)
SLICE = 256
ASK = Ask(
    request_id="r", tenant_id="t", project_id="p", key_id="k", model="m", dialect="openai.chat", prompt_bytes=1000,
    output_tokens_max=16_384, choices=1, streams=True,
)  # fmt: skip
USD = Price(currency="USD", input_nano=150_000_000, output_nano=600_000_000, cached_nano=75_000_000)


def lives(limit: Limit, *, at_once: int, seed: int) -> tuple[int, int, int]:
    """
    Coding agents that name a large maximum and use little, *at_once* of them, until one is refused or ended.

    Answers what was used by then, what of it by the one that was ended, and how many were admitted.
    """
    draw, memory, estimates = random.Random(seed), Memory(), Estimates()
    under_way: list[tuple[str, int, int, int]] = []
    used = number = 0
    while True:
        while len(under_way) < at_once:
            number += 1
            ask = dataclasses.replace(ASK, request_id=f"r{number}")
            asked = demand(ask, [limit], estimates=estimates, price=USD, output_cap=16_384, slice_tokens=SLICE, now=NOW)
            outcome = take(memory, asked, number)
            if outcome.verdict is Verdict.REFUSED:
                return used, 0, number
            held = 16_384 if outcome.verdict is Verdict.FULL else outcome.output
            under_way.append((ask.request_id, 0, held, draw.randint(20, 900)))
        request_id, output, held, length = under_way.pop(draw.randrange(at_once))
        output += 1
        if output > held:
            held = renew(memory, request_id, Renewal(input=250, output=output, more=SLICE), number)
            if held < output:
                return used, output, number
        if output < length:
            under_way.append((request_id, output, held, length))
            continue
        settle(memory, request_id, Report(input=250, output=output), number)
        used += 250 + output


@pytest.mark.parametrize("seed", range(3))
def test_a_large_maximum_and_a_small_answer_is_not_refused_while_there_is_enough(seed: int) -> None:
    """Sixteen at once on a quota that two of their maximums would fill: all but what they have under way is used."""
    quota = Limit(limit_id=1, tenant_id="t", unit=Unit.TOKENS, period=Period.CALENDAR_MONTH, amount=40_000)

    used, _, admitted = lives(quota, at_once=16, seed=seed)

    # Under way are sixteen of a prompt that is estimated at 400, and of at most 900 and a slice of output.
    assert used >= 40_000 - 16 * (400 + 900 + SLICE)
    assert admitted > 16


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("unit", [Unit.TOKENS, Unit.OUTPUT_TOKENS, Unit.MONEY])
def test_streams_together_never_deliver_more_than_a_hard_limit_has(unit: Unit, seed: int) -> None:
    """To the token and the nano-unit, whatever each asks for and when."""
    draw, memory = random.Random(seed), Memory()
    amount = 2_000_000 if unit is Unit.MONEY else 5_000
    limit = Limit(limit_id=1, tenant_id="t", unit=unit, period=Period.CALENDAR_MONTH, amount=amount, currency="USD" if unit is Unit.MONEY else None)
    streams: dict[str, tuple[int, int]] = {}
    ended: dict[str, int] = {}
    for number in range(6_000):
        if draw.random() < 0.01:
            ask = dataclasses.replace(ASK, request_id=f"r{number}", output_tokens_max=draw.randint(1, 3_000))
            asked = demand(ask, [limit], estimates=Estimates(), price=USD, output_cap=16_384, slice_tokens=SLICE, now=NOW)
            outcome = take(memory, asked, number)
            if outcome.admitted:
                streams[ask.request_id] = 0, outcome.output
        for request_id, (output, promised) in list(streams.items()):
            held, wanted = promised, output + draw.randint(1, 9)
            if wanted > held:
                held = renew(memory, request_id, Renewal(input=300, output=wanted, more=draw.choice([1, 7, SLICE])), number)
            if wanted > held or draw.random() < 0.005:
                ended[request_id] = output
                del streams[request_id]
                settle(memory, request_id, Report(input=300, output=output), number)
            else:
                streams[request_id] = wanted, held

    [level] = memory.levels.values()
    assert level.used <= amount
    assert amount - level.used - sum(hits for hits, _ in level.held.values()) < amount / 50
    assert len(ended) > 3
