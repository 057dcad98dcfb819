# SPDX-License-Identifier: Apache-2.0
"""What an exchange may use or has used, in tokens and by its meter, and what that costs; integers only."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ratelimit.core.limits import Unit

_MILLION = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """Nano-units of *currency* per million tokens, and for each of what a meter counts."""

    currency: str
    input_nano: int
    output_nano: int
    #: Of input tokens that the engine had cached.
    cached_nano: int
    #: The least that a request that used anything costs, in nano-units.
    minimum_nano: int = 0
    #: What else is charged; empty: nothing.
    meter: str = ""
    each_nano: int = 0

    def of(self, meter: str) -> Price:
        """The same for requests of *meter*, which another meter's price does not charge."""
        return self if meter == self.meter else dataclasses.replace(self, meter=meter, each_nano=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens, of which *cached* is part of *input*, and the quantity of what else the dialect is metered by."""

    input: int
    output: int
    cached: int = 0
    quantity: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What is said of an exchange when it is over."""

    #: None if the engine did not say: the estimate it was admitted with then stands.
    input: int | None
    output: int
    cached: int = 0
    quantity: int = 0

    def usage(self, admitted: Usage) -> Usage:
        """The usage to charge, given what was estimated at admission."""
        input_ = admitted.input if self.input is None else self.input
        return Usage(input=input_, output=self.output, cached=self.cached, quantity=self.quantity)


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
    cached = min(usage.cached, usage.input)
    parts = (
        (usage.input - cached) * price.input_nano + cached * price.cached_nano + usage.output * price.output_nano
    )
    if not usage.input and not usage.output and not usage.quantity:
        return 0
    return max(price.minimum_nano, -(-parts // _MILLION) + usage.quantity * price.each_nano)


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
