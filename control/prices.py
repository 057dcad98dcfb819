# SPDX-License-Identifier: Apache-2.0
"""
Prices: set and list. A price that was charged never changes; a new one ends the one before it.

The price at admission counts, so a change is made while no collector is charging, and begins after
whatever has been charged by the old price.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from psycopg.types.json import Jsonb

from chassis.contract import METERS
from chassis.errors import Conflict, Invalid
from chassis.models import ModelCatalogue
from control import audit, keys, tenants
from control.act import Act
from control.durations import moment_ahead
from control.money import decimal_text, nano
from control.store import Store
from metering.adapters.periods import lock_charging
from metering.core.rating import Tier

#: Between the change and the beginning of a price that replaces another: more than the clocks of two
#: machines may differ, so that no request of "later" was charged already.
REPLACEMENT_LEAD = timedelta(seconds=5)
#: Of a million tokens, in whole units of currency.
PRICE_MAX = 1_000_000
CURRENCY_DEFAULT = "USD"
#: Of one card, as the schema has it: the field's own lists have one or two.
TIERS_MAX: Final = 8
#: As no row has more input tokens, a higher tier could never be charged by.
TIER_TOKENS_MAX: Final = 100_000_000

_COLUMNS = (
    "rate_card_id, tenant_id as tenant, model, currency, input_nano, output_nano, cached_nano, reasoning_nano, "
    "minimum_nano, nullif(meter, '') as meter, each_nano, lower(effective) as effective_from, upper(effective) as effective_until, tiers"
)
_SAME_SCOPE = "tenant_id is not distinct from %(tenant_id)s::text and model = %(model)s"
_END_PRESENT = f"""
update rate_card set effective = tstzrange(lower(effective), %(starts_at)s)
where {_SAME_SCOPE} and effective @> %(starts_at)s::timestamptz
"""
_INSERT = f"""
insert into rate_card (tenant_id, model, currency, input_nano, output_nano, cached_nano, reasoning_nano, minimum_nano,
                       meter, each_nano, tiers, effective, created_at)
values (%(tenant_id)s, %(model)s, %(currency)s, %(input_nano)s, %(output_nano)s, %(cached_nano)s, %(reasoning_nano)s,
        %(minimum_nano)s, %(meter)s, %(each_nano)s, %(tiers)s,
        tstzrange(%(starts_at)s, (select min(lower(effective)) from rate_card
                                  where {_SAME_SCOPE} and lower(effective) > %(starts_at)s)),
        %(now)s)
returning {_COLUMNS}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class PriceTier:
    """What a million tokens cost in requests with more than *above_tokens* input tokens, as decimal texts."""

    above_tokens: int
    input: str
    output: str
    #: None: as any input token of the tier.
    cached: str | None = None
    #: None: as any output token of the tier.
    reasoning: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """What a million tokens of a model cost, and one of what else it is metered by, as decimal texts."""

    model: str
    input: str
    output: str
    #: None: as any input token.
    cached: str | None = None
    #: None: as any output token.
    reasoning: str | None = None
    #: The least that a request that used anything costs.
    minimum: str = "0"
    #: One of `contract.METERS`, and what one costs; None: nothing but tokens.
    meter: str | None = None
    each: str | None = None
    #: Other prices for longer prompts, in any order.
    tiers: tuple[PriceTier, ...] = ()
    currency: str = CURRENCY_DEFAULT
    #: None: for every tenant without a price of its own.
    tenant: str | None = None
    #: A date, a time or a duration; None: now, or shortly after if it replaces another.
    starts: str | None = None


def put(
    store: Store, act: Act, price: Price, *, catalogue: ModelCatalogue, clock: Callable[[], datetime]
) -> dict[str, Any]:
    """Set a price from a moment on, until the next one already set; raises `Invalid`, `NotFound` or `Conflict`."""
    keys.refuse_unknown_models([price.model], catalogue)
    values: dict[str, Any] = columns(price) | {"model": price.model, "currency": _currency(price.currency)}
    values["tiers"] = Jsonb([asdict(tier) for tier in tiers(price)])
    with store.transaction(act.scope) as connection:
        values["tenant_id"] = tenants.resolve_id(connection, price.tenant)
        lock_charging(connection)
        # Only now: whatever was charged before we had the lock was admitted before this moment.
        now = clock()
        present = connection.execute(
            f"select from rate_card where {_SAME_SCOPE} and coalesce(upper(effective), 'infinity') > %(now)s limit 1",
            values | {"now": now},
        ).fetchone()
        earliest = now + REPLACEMENT_LEAD if present is not None else now
        starts_at = max(earliest, moment_ahead(price.starts, what="from", now=now) if price.starts else earliest)
        values |= {"starts_at": starts_at, "now": now}
        if connection.execute(
            f"select from rate_card where {_SAME_SCOPE} and lower(effective) = %(starts_at)s", values
        ).fetchone() is not None:
            raise Conflict(f"There is a price of {price.model} from exactly that moment.", mend="One that was set stays; one from a second later replaces it.")
        connection.execute(_END_PRESENT, values)
        made = connection.execute(_INSERT, values).fetchone()
        assert made is not None
        audit.append(connection, act, "price.set", str(made["rate_card_id"]), tenant_id=made["tenant"], after=made)
    return _shown(made)


def list_all(store: Store, act: Act, *, tenant: str | None, at: datetime | None) -> list[dict[str, Any]]:
    """Prices of everybody and of *tenant* (all in scope if None); only those in force *at* a moment if it is given."""
    with store.transaction(act.scope) as connection:
        found = connection.execute(
            f"select {_COLUMNS} from rate_card "
            "where (%(it)s::text is null or tenant_id is null or tenant_id = %(it)s) "
            "and (%(at)s::timestamptz is null or effective @> %(at)s::timestamptz) "
            "order by model, tenant_id nulls first, lower(effective)",
            {"it": tenants.resolve_id(connection, tenant), "at": at},
        ).fetchall()
    return [_shown(row) for row in found]


def columns(price: Price) -> dict[str, Any]:
    """The prices in nano-currency, and the meter, by their columns; raises `Invalid`."""
    if (price.meter is None) != (price.each is None):
        raise Invalid("A meter and the price of each belong together.", mend="Give both, or neither.")
    if price.meter is not None and price.meter not in METERS:
        raise Invalid(f"The meter is {price.meter!r}.", mend=f"Use one of {', '.join(METERS)}.")
    texts = {
        "input": price.input, "output": price.output,
        "cached": price.input if price.cached is None else price.cached,
        "reasoning": price.output if price.reasoning is None else price.reasoning,
        "minimum": price.minimum, "each": price.each or "0",
    }
    return {f"{name}_nano": _nano(text, what=name) for name, text in texts.items()} | {"meter": price.meter or ""}


def tiers(price: Price) -> tuple[Tier, ...]:
    """The tiers in nano-currency, from the lowest; raises `Invalid`."""
    if len(price.tiers) > TIERS_MAX:
        raise Invalid(f"A price has at most {TIERS_MAX} tiers; these are {len(price.tiers)}.")
    found: list[Tier] = []
    for tier in sorted(price.tiers, key=lambda tier: tier.above_tokens):
        above = tier.above_tokens
        if not 1 <= above <= TIER_TOKENS_MAX:
            raise Invalid(f"A tier above {above} tokens is none.", mend=f"Name a number from 1 to {TIER_TOKENS_MAX}.")
        if found and found[-1].above_tokens == above:
            raise Invalid(f"There are two tiers above {above} tokens.", mend="Name each once.")
        texts = {
            "input": tier.input, "output": tier.output,
            "cached": tier.input if tier.cached is None else tier.cached,
            "reasoning": tier.output if tier.reasoning is None else tier.reasoning,
        }
        numbers = {f"{name}_nano": _nano(text, what=f"{name} above {above} tokens") for name, text in texts.items()}
        found.append(Tier(above_tokens=above, **numbers))
    return tuple(found)


def _nano(text: str, *, what: str) -> int:
    number = nano(text, what=what)
    if number > nano(str(PRICE_MAX), what=what):
        raise Invalid(f"{what} is {text}; it must be at most {PRICE_MAX}.", mend="Prices are per million tokens, a meter's for each.")
    return number


def _currency(text: str) -> str:
    if not (len(text) == 3 and text.isascii() and text.isalpha() and text.isupper()):
        raise Invalid(f"The currency is {text!r}.", mend="Write its three capital letters, such as USD.")
    return text


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    """A card with its prices as people write them, next to the integers."""
    names = ("input", "output", "cached", "reasoning")
    each = None if row["meter"] is None else decimal_text(row["each_nano"])
    texts = {name: decimal_text(row[f"{name}_nano"]) for name in (*names, "minimum")}
    shown = [tier | {name: decimal_text(tier[f"{name}_nano"]) for name in names} for tier in row["tiers"]]
    return row | texts | {"each": each, "tiers": shown}
