# SPDX-License-Identifier: Apache-2.0
"""
Which limits apply to a request, and what it asks of each.

A limit is bound to values (tenant, perhaps key, perhaps model) and becomes one or two counters.
All limits that match must allow; a specific one does not replace a general one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

MINUTE_US = 60_000_000

#: Bytes of request body per prompt token, on the low side: English text has about 4, the JSON
#: around it counts as well, so an estimate errs towards holding too much, never too little.
PROMPT_BYTES_PER_TOKEN = 2.5
#: Output tokens held for a request that names no limit. Settled to the truth when the stream ends.
OUTPUT_TOKENS_ASSUMED = 512
#: Most output tokens held for one choice, whatever the caller asks; the rest is charged as it settles.
OUTPUT_TOKENS_HELD_MAX = 4096


class Unit(Enum):
    """What a counter counts."""

    REQUESTS = "requests"
    TOKENS = "tokens"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """A limit as people set it; None in *key_id* or *model* means any."""

    limit_id: int
    tenant_id: str
    key_id: str | None
    model: str | None
    requests_per_minute: int | None
    tokens_per_minute: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """An admission request: who, for what, how large."""

    request_id: str
    tenant_id: str
    key_id: str
    model: str
    dialect: str
    prompt_bytes: int
    output_tokens_max: int
    choices: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Counter:
    """A limit bound to values and a unit, with the hits that one request adds to it."""

    name: str
    unit: Unit
    limit: int
    period_us: int
    hits: int
    #: Whom the limit binds, for the caller's eyes: "tenant", "key", "model" or a pair.
    scope: str


class LimitTable:
    """All limits, immutable, found by tenant; a change makes a new table."""

    def __init__(self, limits: Iterable[Limit]) -> None:
        self._by_tenant: dict[str, list[Limit]] = {}
        for limit in limits:
            self._by_tenant.setdefault(limit.tenant_id, []).append(limit)

    def match(self, ask: Ask) -> list[Limit]:
        """Limits that bind *ask*, in the order they were made."""
        return [
            limit
            for limit in self._by_tenant.get(ask.tenant_id, ())
            if limit.key_id in (None, ask.key_id) and limit.model in (None, ask.model)
        ]

    def __len__(self) -> int:
        return sum(map(len, self._by_tenant.values()))


def tokens_to_reserve(ask: Ask) -> int:
    """
    Tokens to hold for *ask*: the prompt, estimated from its bytes, and the output it may produce.

    >>> ask = Ask(request_id="r", tenant_id="t", key_id="k", model="m", dialect="openai.chat",
    ...           prompt_bytes=100, output_tokens_max=16, choices=2)
    >>> tokens_to_reserve(ask)  # 40 for the prompt, twice 16 for the output
    72
    """
    prompt = math.ceil(ask.prompt_bytes / PROMPT_BYTES_PER_TOKEN)
    if ask.dialect in ("openai.embeddings", "openai.models"):
        return prompt
    output = min(ask.output_tokens_max or OUTPUT_TOKENS_ASSUMED, OUTPUT_TOKENS_HELD_MAX)
    return prompt + output * max(ask.choices, 1)


def counters(limits: Iterable[Limit], ask: Ask, *, tokens: int) -> list[Counter]:
    """
    What *ask* takes from which counters, requests before tokens.

    Names share the hash tag of the tenant: all counters of one decision live in one slot of a
    Redis Cluster, so one script can take them all or none.
    """
    found: list[Counter] = []
    for limit in limits:
        scope = _scope(limit)
        stem = f"peaje:{{{limit.tenant_id}}}:{limit.limit_id}"
        if limit.requests_per_minute is not None:
            found.append(
                Counter(
                    name=f"{stem}:rpm", unit=Unit.REQUESTS, limit=limit.requests_per_minute,
                    period_us=MINUTE_US, hits=1, scope=scope,
                )
            )
        if limit.tokens_per_minute is not None:
            found.append(
                Counter(
                    name=f"{stem}:tpm", unit=Unit.TOKENS, limit=limit.tokens_per_minute,
                    period_us=MINUTE_US, hits=tokens, scope=scope,
                )
            )
    return found


def reservation_name(*, tenant_id: str, request_id: str) -> str:
    """The key under which a reservation waits to be settled."""
    return f"peaje:{{{tenant_id}}}:held:{request_id}"


def _scope(limit: Limit) -> str:
    parts = [word for word, value in (("key", limit.key_id), ("model", limit.model)) if value is not None]
    return " and ".join(parts) or "tenant"
