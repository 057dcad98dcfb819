# SPDX-License-Identifier: Apache-2.0
"""
Say what an exchange costs: which rate card holds, and the amount by it.

Integers only. Prices are nano-currency per million tokens, and per one of what else is metered (an image, a
character); amounts are nano-currency. One rounding rule: the parts of a request are summed exactly and the sum is rounded once, half a nano up.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Final

#: Tokens that a price is for.
TOKENS_PER_PRICE: Final = 1_000_000
NANO: Final = 1_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Tier:
    """
    Prices of requests with more than *above_tokens* input tokens, cached ones included.

    They stand in place of the card's own for all tokens of such a request, and for none of any other.
    """

    above_tokens: int
    input_nano: int
    output_nano: int
    cached_nano: int
    reasoning_nano: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RateCard:
    """Prices of a model for a while: from `starts_at`, before `ends_at`."""

    rate_card_id: int
    #: None: for every tenant that has no card of its own.
    tenant_id: str | None
    model: str
    currency: str
    input_nano: int
    output_nano: int
    cached_nano: int
    reasoning_nano: int
    #: The least that a request with any token, or anything else that it is metered by, costs.
    minimum_nano: int
    #: What else is charged, each at `each_nano`; empty: nothing.
    meter: str
    each_nano: int
    starts_at: datetime
    ends_at: datetime | None
    #: From the lowest *above_tokens* to the highest.
    tiers: tuple[Tier, ...] = ()

    def tier(self, input_tokens: int) -> Tier | None:
        """The tier that a request with so many input tokens falls into; None: the card's own prices are charged."""
        return next((tier for tier in reversed(self.tiers) if input_tokens > tier.above_tokens), None)

    def holds_at(self, moment: datetime) -> bool:
        """Whether a request admitted at *moment* is charged by this card."""
        return self.starts_at <= moment and (self.ends_at is None or moment < self.ends_at)


class RateCards:
    """Cards by scope; a tenant's own card goes before the one for everybody."""

    def __init__(self, cards: Iterable[RateCard]) -> None:
        self._by_scope: dict[tuple[str | None, str], list[RateCard]] = defaultdict(list)
        for card in cards:
            self._by_scope[card.tenant_id, card.model].append(card)

    def find(self, *, tenant_id: str, model: str, admitted_at: datetime) -> RateCard | None:
        """The card that held when the request was admitted; None: it has no price."""
        for scope in ((tenant_id, model), (None, model)):
            for card in self._by_scope.get(scope, ()):
                if card.holds_at(admitted_at):
                    return card
        return None


def amount_nano(
    card: RateCard, *, input_tokens: int, output_tokens: int, cached_tokens: int, reasoning_tokens: int,
    meter: str | None = None, quantity: int = 0,
) -> int | None:
    """
    What the tokens and the *quantity* of what else was metered cost; None if the card has no price for it.

    Cached tokens are part of the input, reasoning tokens part of the output; each token is charged
    once, at the prices of the tier that the request's input falls into. Where there are tokens, a card without a price for the meter charges by them alone. Nothing used costs
    nothing, whatever the minimum.

    A million tokens at 0.15 of which half are cached at 0.075:

    >>> from datetime import UTC, datetime
    >>> card = RateCard(
    ...     rate_card_id=1, tenant_id=None, model="m", currency="USD", input_nano=150_000_000, output_nano=600_000_000,
    ...     cached_nano=75_000_000, reasoning_nano=600_000_000, minimum_nano=0,
    ...     meter="images", each_nano=40_000_000, starts_at=datetime(2026, 1, 1, tzinfo=UTC), ends_at=None)
    >>> amount_nano(card, input_tokens=1_000_000, output_tokens=0, cached_tokens=500_000, reasoning_tokens=0)
    112500000
    >>> amount_nano(card, input_tokens=0, output_tokens=0, cached_tokens=0, reasoning_tokens=0, meter="images", quantity=2)
    80000000
    """
    tokens, each = input_tokens + output_tokens, card.each_nano if meter == card.meter else 0
    if quantity and not tokens and meter != card.meter:
        return None
    prices = (card.tier(input_tokens) if card.tiers else None) or card
    exact = (
        (input_tokens - cached_tokens) * prices.input_nano
        + cached_tokens * prices.cached_nano
        + (output_tokens - reasoning_tokens) * prices.output_nano
        + reasoning_tokens * prices.reasoning_nano
    )
    rounded = (2 * exact + TOKENS_PER_PRICE) // (2 * TOKENS_PER_PRICE)
    return max(rounded + quantity * each, card.minimum_nano) if tokens or quantity else 0
