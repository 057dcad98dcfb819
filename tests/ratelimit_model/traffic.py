# SPDX-License-Identifier: Apache-2.0
"""What callers send over simulated time, and who of them is refused by a limiter and by one that knows the future."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from random import Random

from ratelimit.core.decide import Memory, Outcome, Verdict, seeded, settle, take
from ratelimit.core.demand import Counter, Demand, Kind, demand
from ratelimit.core.estimate import Estimates
from ratelimit.core.limits import Ask, Limit
from ratelimit.core.usage import Report, Usage, hits
from tests.ratelimit_model import Model
from tests.ratelimit_model.machine import BEGIN_US

_MINUTE_US = 60_000_000
_OUTPUT_CAP = 16_384

Take = Callable[[Demand, int], Outcome]
Settle = Callable[[Demand, Report, int], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """One request: when it comes, what it names, what it turns out to be."""

    at_us: int
    lasts_us: int
    prompt_bytes: int
    named_max: int
    input: int
    output: int


def steady(order: Random, *, count: int, tokens_per_minute: float) -> Iterator[Offer]:
    """Independent callers of all sizes, *tokens_per_minute* on average."""
    mean = 1000 * 1.133 + 300 * 1.133  # of the two below
    now = float(BEGIN_US)
    for _ in range(count):
        now += order.expovariate(tokens_per_minute / mean / _MINUTE_US)
        input_, output = max(1, int(order.lognormvariate(0, 0.5) * 1000)), max(1, int(order.lognormvariate(0, 0.5) * 300))
        yield Offer(
            at_us=int(now), lasts_us=int(order.uniform(0.5, 20) * 1_000_000), prompt_bytes=int(input_ * order.uniform(3.8, 4.4)),
            # Who names a maximum is held to it; most name none or the context's length.
            named_max=order.choice([0, 0, 32_000, 4 * output]), input=input_, output=min(output, _OUTPUT_CAP),
        )  # fmt: skip


def agents(order: Random, *, bursts: int, at_once: int) -> Iterator[Offer]:
    """Coding agents: *at_once* requests in a burst, each names 32,000 output tokens and uses 50 to 500."""
    for burst in range(bursts):
        for _ in range(at_once):
            input_ = order.randrange(500, 2000)
            yield Offer(
                at_us=BEGIN_US + burst * 30_000_000 + order.randrange(200_000), lasts_us=order.randrange(2, 25) * 1_000_000,
                prompt_bytes=input_ * 4, named_max=32_000, input=input_, output=order.randrange(50, 500),
            )  # fmt: skip


@dataclass(slots=True)
class Played:
    """How it went."""

    offered: int = 0
    refused: int = 0
    #: Refused, and admitted by a limiter that charges what each request will turn out to use.
    refused_falsely: int = 0
    #: Refused by a limiter that holds the maximum that each request names.
    refused_by_flat_hold: int = 0
    used: int = 0


def play(offers: Sequence[Offer], limits: Sequence[Limit], *, take: Take, settle: Settle) -> Played:
    """Send *offers* to a limiter, each settled when it is over, and beside it to the one that knows and the one that holds all."""
    played, estimates, perfect, flat = Played(), Estimates(), Model(), Model()
    under_way: list[tuple[int, int, Demand, Offer]] = []

    def end(until_us: int) -> None:
        while under_way and under_way[0][0] <= until_us:
            at_us, _, asked, offer = heapq.heappop(under_way)
            report = Report(input=offer.input, output=offer.output)
            settle(asked, report, at_us)
            flat.settle(asked.request_id, report, at_us)
            estimates.learn(
                tenant_id="t", model="m", prompt_bytes=offer.prompt_bytes, input_tokens=offer.input, output_tokens=offer.output
            )

    for number, offer in enumerate(sorted(offers, key=lambda offer: offer.at_us)):
        end(offer.at_us)
        asked = _demand(offer, number, limits, estimates)
        actual = Usage(input=offer.input, output=offer.output)
        most = Usage(input=offer.input, output=offer.named_max or _OUTPUT_CAP)
        outcome = take(asked, offer.at_us)
        could, _ = perfect.take(_charged(asked, actual), offer.at_us)
        held, _ = flat.take(_charged(asked, most), offer.at_us)
        played.offered += 1
        played.refused += not outcome.admitted
        played.refused_falsely += not outcome.admitted and could != Verdict.REFUSED.name
        played.refused_by_flat_hold += held == Verdict.REFUSED.name
        if outcome.admitted:
            played.used += offer.input + offer.output
            heapq.heappush(under_way, (offer.at_us + offer.lasts_us, number, asked, offer))
    end(1 << 62)
    return played


def in_memory() -> tuple[Take, Settle]:
    """The limiter of `ratelimit.core.decide`."""
    memory = Memory()

    def taken(asked: Demand, now_us: int) -> Outcome:
        seeded(memory, {counter.name: 0 for counter in asked.counters if counter.kind is Kind.QUOTA})
        return take(memory, asked, now_us)

    return taken, lambda asked, report, now_us: settle(memory, asked.request_id, report, now_us)


def _demand(offer: Offer, number: int, limits: Sequence[Limit], estimates: Estimates) -> Demand:
    ask = Ask(
        request_id=f"r{number}", tenant_id=limits[0].tenant_id, project_id="p", key_id="k", model="m", dialect="openai.chat",
        prompt_bytes=offer.prompt_bytes, output_tokens_max=offer.named_max, choices=1,
    )  # fmt: skip
    now = datetime.fromtimestamp(offer.at_us / 1_000_000, tz=UTC)
    return demand(ask, limits, estimates=estimates, price=None, output_cap=_OUTPUT_CAP, now=now)


def _charged(asked: Demand, usage: Usage) -> Demand:
    """The same request where *usage* is what it asks for."""

    def charged(counter: Counter) -> Counter:
        wanted = hits(counter.unit, usage, None)
        return dataclasses.replace(counter, full=wanted, lean=wanted)

    return dataclasses.replace(asked, counters=tuple(map(charged, asked.counters)), full=usage, lean=usage, output_least=usage.output)
