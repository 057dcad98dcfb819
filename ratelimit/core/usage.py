# SPDX-License-Identifier: Apache-2.0
"""What an exchange may use or has used, in tokens and by its meter, and what that costs; integers only."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ratelimit.core.limits import Unit

_MILLION = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Tier:
    """Prices of requests with more than *above_tokens* input tokens, in place of all others for all of their tokens."""

    above_tokens: int
    input_nano: int
    output_nano: int
    cached_nano: int
    #: Of output tokens that were reasoning; None: as any other.
    reasoning_nano: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """Nano-units of *currency* per million tokens, and for each of what a meter counts."""

    currency: str
    input_nano: int
    output_nano: int
    #: Of input tokens that the engine had cached.
    cached_nano: int
    #: Of output tokens that were reasoning; None: as any other.
    reasoning_nano: int | None = None
    #: The least that a request that used anything costs, in nano-units.
    minimum_nano: int = 0
    #: What else is charged; empty: nothing.
    meter: str = ""
    each_nano: int = 0
    #: From the lowest *above_tokens* to the highest.
    tiers: tuple[Tier, ...] = ()
    #: Input tokens that the request which this is a price for may turn out to have, whatever it is estimated at.
    reach: int = 0

    def of(self, meter: str) -> Price:
        """The same for requests of *meter*, which another meter's price does not charge."""
        return self if meter == self.meter else dataclasses.replace(self, meter=meter, each_nano=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens, *cached* part of *input* and *reasoning* of *output*, and the quantity of what else the dialect is metered by."""

    input: int
    output: int
    cached: int = 0
    reasoning: int = 0
    quantity: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What is said of an exchange when it is over."""

    #: None if the engine did not say: the estimate it was admitted with then stands.
    input: int | None
    output: int
    cached: int = 0
    reasoning: int = 0
    quantity: int = 0
    #: Whether there was an exchange at all: of what never came to one nothing is charged, not even a request.
    happened: bool = True

    def usage(self, admitted: Usage) -> Usage:
        """The usage to charge, given what was estimated at admission."""
        input_ = admitted.input if self.input is None else self.input
        return Usage(input=input_, output=self.output, cached=self.cached, reasoning=self.reasoning, quantity=self.quantity)


def cost_nano(price: Price | None, usage: Usage) -> int:
    """
    What *usage* costs, rounded up to a whole nano-unit; nothing without a price, nothing where nothing was used.

    The ledger rounds half up: a budget may be held to be used by a nano-unit a request more than is billed.

    >>> price = Price(currency="USD", input_nano=150_000_000, output_nano=600_000_000, cached_nano=75_000_000)
    >>> cost_nano(price, Usage(input=1000, output=500, cached=200))
    435000
    """
    if price is None:
        return 0
    tier = next((tier for tier in reversed(price.tiers) if usage.input > tier.above_tokens), None)
    prices = price if tier is None else tier
    cached, reasoning = min(usage.cached, usage.input), min(usage.reasoning, usage.output)
    parts = (
        (usage.input - cached) * prices.input_nano + cached * prices.cached_nano
        + (usage.output - reasoning) * prices.output_nano + reasoning * _reasoning_nano(prices)
    )  # fmt: skip
    return _rounded(price, usage, parts)


def worst_nano(price: Price | None, usage: Usage) -> int:
    """
    What *usage* costs at most, whatever of it is cached or reasoning, and by the dearest tier within the request's reach.

    What is held of a budget goes by it. How many input tokens there are is as estimated; only their price is the worst.

    >>> price = Price(
    ...     currency="USD", input_nano=1_000_000, output_nano=0, cached_nano=0,
    ...     tiers=(Tier(above_tokens=100, input_nano=5_000_000, output_nano=0, cached_nano=0),), reach=101)
    >>> usage = Usage(input=80, output=0)
    >>> cost_nano(price, usage), worst_nano(price, usage)
    (80, 400)
    """
    if price is None:
        return 0
    most = max(usage.input, price.reach)
    reached: list[Price | Tier] = [price, *(tier for tier in price.tiers if tier.above_tokens < most)]
    parts = [
        usage.input * max(it.input_nano, it.cached_nano) + usage.output * max(it.output_nano, _reasoning_nano(it)) for it in reached
    ]
    return _rounded(price, usage, max(parts))


def hits(unit: Unit, usage: Usage, price: Price | None) -> int:
    """What *usage* adds to a counter of *unit*; a request is one hit of requests and of concurrency."""
    match unit:
        case Unit.TOKENS:
            return usage.input + usage.output
        case Unit.INPUT_TOKENS:
            return usage.input
        case Unit.OUTPUT_TOKENS:
            return usage.output
        case Unit.CACHED_TOKENS:
            return min(usage.cached, usage.input)
        case Unit.MONEY:
            return cost_nano(price, usage)
    return 1


def holds(unit: Unit, usage: Usage, price: Price | None) -> int:
    """What is held of a counter of *unit* that may not be overshot, for a request that may use *usage*."""
    return worst_nano(price, usage) if unit is Unit.MONEY else hits(unit, usage, price)


def _reasoning_nano(prices: Price | Tier) -> int:
    return prices.output_nano if prices.reasoning_nano is None else prices.reasoning_nano


def _rounded(price: Price, usage: Usage, parts: int) -> int:
    if not usage.input and not usage.output and not usage.quantity:
        return 0
    return max(price.minimum_nano, -(-parts // _MILLION) + usage.quantity * price.each_nano)
