# SPDX-License-Identifier: Apache-2.0
"""
What a request asks of each counter: the limits that bind it, turned into names and numbers.

There are two ways to ask. *Full* is what the request can reach at worst; *lean* is what it
usually reaches. A counter that is settled as a debt (a bucket, a soft budget) is asked for the
usual in both. A hard quota or budget may not be overshot, so it is asked for the worst, and if
that does not fit for the usual or for as much of it as is left, down to the *least* that is worth
an answer. The output is then capped at exactly what is held: far from the limit nobody's answer
is cut short, near it nobody is refused who could still be served.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import Enum
from typing import Final

from chassis.contract import DIALECT_METERS
from ratelimit.core.estimate import Estimates
from ratelimit.core.limits import LENGTHS_US, Ask, Effect, Limit, OnStoreError, Period, Share, Unit
from ratelimit.core.usage import Price, Usage, hits, holds
from ratelimit.core.windows import window

#: Dialects whose answers have no generated tokens.
_WITHOUT_OUTPUT: Final = ("openai.embeddings", "openai.models", "rerank", "openai.images", "openai.speech")
_WITHOUT_TOKENS: Final = "openai.models"
#: Output tokens of one choice below which an answer is not worth its prompt: near the end of a hard
#: quota a request is refused rather than capped at fewer.
OUTPUT_TOKENS_LEAST: Final = 16
#: A stream that can be held in slices is held whole only while that leaves three more like it: whole answers hold
#: far more than they use, and what they hold must not end the streams of others.
WHOLE_SHARE: Final = 4
#: A pool is full when its backlog is what it does in so long: it evens out bursts, and is a wait that
#: nobody notices beside that of a generation.
BACKLOG_SECONDS: Final = 5
#: Bytes of prompt and output tokens of a choice that a request on a lease may have in any case: what is lent is counted in
#: the largest requests that may pass on it, so one that is small must not make all others ask.
LENT_PROMPT_BYTES_LEAST: Final = 4096
LENT_OUTPUT_TOKENS_LEAST: Final = 256
#: What an output cap bounds.
_OUTPUT_UNITS: Final = (Unit.TOKENS, Unit.OUTPUT_TOKENS, Unit.MONEY)


class Kind(Enum):
    """How a counter remembers."""

    #: A debt that drains evenly (GCRA).
    BUCKET = "bucket"
    #: Used and held in a calendar window.
    QUOTA = "quota"
    #: Who is under way.
    LEASES = "leases"
    #: Who is under way in a pool, shared fairly among tenants.
    SLOTS = "slots"
    #: Tokens that a pool has not had the time for, shared fairly among tenants.
    BACKLOG = "backlog"


@dataclass(frozen=True, slots=True, kw_only=True)
class Counter:
    """A limit bound to values, with what one request asks of it."""

    name: str
    limit_id: int
    kind: Kind
    unit: Unit
    period: Period
    #: The limit, in hits.
    amount: int
    #: Most hits at once: a bucket's size; else the amount.
    burst: int
    full: int
    lean: int
    effect: Effect = Effect.REFUSE
    on_store_error: OnStoreError = OnStoreError.LOCAL
    scope: str = "tenant"
    #: Of a budget: what its hits are worth; None charges nothing.
    price: Price | None = None
    #: When the calendar window started and ends, microseconds since 1970; 0 if it has none.
    starts_us: int = 0
    ends_us: int = 0
    #: Of a fair share: the tenant's, among the others in the pool.
    weight: int = 1

    @property
    def is_shared(self) -> bool:
        """Whether it is a pool's, and no business of one tenant's headers."""
        return self.kind in (Kind.SLOTS, Kind.BACKLOG)

    @property
    def period_us(self) -> int:
        """Length of a bucket's period; 0 for what has none."""
        return LENGTHS_US.get(self.period, 0)

    @property
    def is_hard(self) -> bool:
        """Whether it may not be overshot: what is asked of it goes by the output that is granted."""
        return self.kind is Kind.QUOTA and self.effect is Effect.REFUSE


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What a request may be at the most that passes on a lease of quotas, and what that uses at worst."""

    prompt_bytes: int
    #: Output tokens of one choice that the model server is held to, whatever the caller names; None: to nothing.
    cap: int | None
    usage: Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """All that one request asks, to be taken whole or not at all."""

    tenant_id: str
    request_id: str
    counters: tuple[Counter, ...]
    full: Usage
    lean: Usage
    #: Fewest output tokens, of all choices together, that a hard counter is asked for; as in *lean* unless said.
    output_least: int = -1
    choices: int = 1
    #: Whether the model server must be held to what is granted: a hard limit on its output binds.
    is_capped: bool = False
    #: Whether the lean ask is the first slice of an output that is renewed while it streams.
    is_sliced: bool = False
    #: The life of the Envoy that asked: whose journal tells of the request, should nobody settle it.
    epoch: str = ""
    #: Of later requests like this one, should its quotas be lent; None where there is no quota, or they are not.
    bounds: Bounds | None = None
    #: Whether there is anything to settle when the exchange ends.
    settles: bool = field(init=False)

    def __post_init__(self) -> None:
        settles = any(c.unit is not Unit.REQUESTS or c.kind is Kind.QUOTA for c in self.counters)
        object.__setattr__(self, "settles", settles)
        if self.output_least < 0:
            object.__setattr__(self, "output_least", self.lean.output)

    @property
    def room_for(self) -> int:
        """How many times over the full ask has to fit into a hard counter to be taken."""
        return WHOLE_SHARE if self.is_sliced else 1

    def cap(self, output: int) -> int | None:
        """Output tokens per choice that may be promised where *output* are held for all choices; None: no promise."""
        return output // self.choices if self.is_capped else None


def demand(
    ask: Ask,
    limits: Iterable[Limit],
    *,
    estimates: Estimates,
    price: Price | None,
    output_cap: int,
    slice_tokens: int = 0,
    now: datetime,
    share: Share | None = None,
) -> Demand:
    """
    Work out what *ask* asks of *limits*, in their order, and of its *share* of the model's pool.

    *output_cap* is the operator's cap on one choice's output tokens under a hard limit, *slice_tokens*
    what a stream under one is given at a time where not all of it fits (0: it is capped instead).
    """
    limits = list(limits)
    prompt = estimates.prompt_tokens(model=ask.model, prompt_bytes=ask.prompt_bytes)
    if price is not None:
        price = price.of(DIALECT_METERS.get(ask.dialect, ""))
        if price.tiers:
            # A tokenizer makes at most a token of each byte, and the JSON around a prompt is more than a chat template adds.
            price = replace(price, reach=ask.prompt_bytes)
    choices, usual, worst = max(ask.choices, 1), 0, 0
    if ask.dialect not in _WITHOUT_OUTPUT:
        usual = estimates.output_tokens(
            tenant_id=ask.tenant_id, model=ask.model, named_max=ask.output_tokens_max, cap=output_cap
        )
        worst = min(ask.output_tokens_max or output_cap, output_cap)
    is_capped = worst > 0 and any(_is_hard(limit) and limit.unit in _OUTPUT_UNITS for limit in limits)
    is_sliced = is_capped and ask.streams and slice_tokens > 0
    full = Usage(input=prompt, output=worst * choices, quantity=ask.quantity)
    usually = replace(full, output=usual * choices)
    lean = replace(full, output=min(usually.output, slice_tokens) if is_sliced else usually.output)
    least = replace(full, output=min(lean.output, OUTPUT_TOKENS_LEAST * choices))
    return Demand(
        tenant_id=ask.tenant_id,
        request_id=ask.request_id,
        counters=(
            *(
                _counter(limit, full=full, lean=lean if _is_hard(limit) else usually, least=least, price=price, now=now)
                for limit in limits
                if limit.unit in (Unit.REQUESTS, Unit.CONCURRENCY) or ask.dialect != _WITHOUT_TOKENS
            ),
            *(() if share is None else _shared(share, usually.input + usually.output)),
        ),
        full=full,
        lean=lean,
        output_least=least.output,
        choices=choices,
        is_capped=is_capped,
        is_sliced=is_sliced,
        epoch=ask.epoch,
        bounds=_bounds(ask, limits, estimates, cap=output_cap if is_capped else None, worst=worst, now=now),
    )


def _bounds(
    ask: Ask, limits: Iterable[Limit], estimates: Estimates, *, cap: int | None, worst: int, now: datetime
) -> Bounds | None:
    """Of the largest that was asked for lately the next powers of two: requests that differ a little are lent to alike."""
    # What else is metered is asked for each request.
    if ask.quantity or not any(limit.is_quota for limit in limits):
        return None
    prompt_bytes, output = estimates.largest(
        tenant_id=ask.tenant_id, model=ask.model, prompt_bytes=ask.prompt_bytes, output_tokens=worst * max(ask.choices, 1), now=now
    )
    prompt_bytes = max(LENT_PROMPT_BYTES_LEAST, _power_of_two(2 * prompt_bytes))
    if cap is not None:
        output = max(LENT_OUTPUT_TOKENS_LEAST, _power_of_two(output))
    usage = Usage(input=estimates.prompt_tokens(model=ask.model, prompt_bytes=prompt_bytes), output=output)
    return Bounds(prompt_bytes=prompt_bytes, cap=cap, usage=usage)


def _power_of_two(least: int) -> int:
    return 1 << max(0, least - 1).bit_length()


def counter(limit: Limit, *, now: datetime) -> Counter:
    """The counter of *limit* at *now*, of which nothing is asked."""
    nothing = Usage(input=0, output=0)
    return _counter(limit, full=nothing, lean=nothing, least=nothing, price=None, now=now)


def pool_place(model: str) -> str:
    """What a pool is called where a tenant has its id: one place for all, in it they meet."""
    return f"pool:{model}"


def slots_key(model: str) -> str:
    """The name of the counter of a pool's requests under way."""
    return f"peaje:{{{pool_place(model)}}}:slots"


def _shared(share: Share, tokens: int) -> Iterator[Counter]:
    pool = share.pool
    if pool.slots is not None:
        yield Counter(
            name=slots_key(pool.model), limit_id=0, kind=Kind.SLOTS, unit=Unit.CONCURRENCY, period=Period.NOW,
            amount=pool.slots, burst=pool.slots, full=1, lean=1, scope=pool.model, weight=share.weight,
        )  # fmt: skip
    if pool.tokens_per_second is not None:
        yield Counter(
            name=f"peaje:{{{pool_place(pool.model)}}}:backlog", limit_id=0, kind=Kind.BACKLOG, unit=Unit.TOKENS, period=Period.SECOND,
            amount=pool.tokens_per_second, burst=pool.tokens_per_second * BACKLOG_SECONDS, full=tokens, lean=tokens,
            scope=pool.model, weight=share.weight,
        )  # fmt: skip


def _counter(
    limit: Limit, *, full: Usage, lean: Usage, least: Usage, price: Price | None, now: datetime
) -> Counter:
    if limit.currency is not None and (price is None or price.currency != limit.currency):
        # What has no price in the budget's currency cannot be charged to it; the ledger does not either.
        price = None
    name, starts_us, ends_us = f"peaje:{{{limit.tenant_id}}}:{limit.limit_id}", 0, 0
    if limit.unit is Unit.CONCURRENCY:
        kind = Kind.LEASES
    elif limit.period in LENGTHS_US:
        kind = Kind.BUCKET
    else:
        kind = Kind.QUOTA
        current = window(limit.period, now)
        name = f"{name}:{current.name}"
        starts_us, ends_us = _microseconds(current.start), _microseconds(current.end)
    burst = limit.amount if limit.burst is None else limit.burst
    asked = holds if _is_hard(limit) else hits
    usual = asked(limit.unit, lean, price)
    if kind is Kind.BUCKET:
        # What is usual may be more than fits into a bucket at all: it is asked for the whole of it, the rest is a debt.
        usual = min(usual, max(burst, hits(limit.unit, least, price)))
    return Counter(
        name=name, limit_id=limit.limit_id, kind=kind, unit=limit.unit, period=limit.period, amount=limit.amount,
        burst=burst, full=asked(limit.unit, full, price) if _is_hard(limit) else usual, lean=usual,
        effect=limit.effect, on_store_error=limit.on_store_error, scope=limit.scope,
        price=price if limit.unit is Unit.MONEY else None,
        starts_us=starts_us, ends_us=ends_us,
    )  # fmt: skip


def _is_hard(limit: Limit) -> bool:
    """A quota or budget that may not be overshot; buckets settle as a debt."""
    return limit.is_quota and limit.effect is Effect.REFUSE


def _microseconds(moment: datetime) -> int:
    return int(moment.timestamp()) * 1_000_000
