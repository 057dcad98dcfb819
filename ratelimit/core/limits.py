# SPDX-License-Identifier: Apache-2.0
"""
What a limit is, and which limits bind a request.

A limit binds a tenant, and perhaps one of its projects, keys, a model, or any combination.
All limits that match must allow; a specific one does not replace a general one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum


class Unit(Enum):
    """What a limit counts. Cached tokens are input tokens that cost the engine less: part of input."""

    REQUESTS = "requests"
    TOKENS = "tokens"
    INPUT_TOKENS = "input_tokens"
    OUTPUT_TOKENS = "output_tokens"
    CACHED_TOKENS = "cached_tokens"
    #: Nano-units of a currency.
    MONEY = "money"
    #: Requests under way.
    CONCURRENCY = "concurrency"


class Period(Enum):
    """Over what a limit counts: a fixed length (a bucket that drains), a UTC calendar window, or now."""

    SECOND = "second"
    MINUTE = "minute"
    HOUR = "hour"
    DAY = "day"
    CALENDAR_DAY = "calendar_day"
    CALENDAR_MONTH = "calendar_month"
    #: Prepaid: counts from the beginning and never starts anew.
    EVER = "ever"
    #: Concurrency: what is under way at this moment.
    NOW = "now"


#: Lengths of the buckets, in microseconds.
LENGTHS_US = {
    Period.SECOND: 1_000_000,
    Period.MINUTE: 60_000_000,
    Period.HOUR: 3_600_000_000,
    Period.DAY: 86_400_000_000,
}


class Effect(Enum):
    """What a limit does when it has no room."""

    REFUSE = "refuse"
    #: Let pass and count on: a soft budget is for those who watch it.
    COUNT = "count"
    #: Let pass and take nothing, as if it had refused: what a new limit would do, before it does.
    SHADOW = "shadow"


class OnStoreError(Enum):
    """What a limit does while the counter store is away."""

    LOCAL = "local"
    ALLOW = "allow"
    DENY = "deny"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """A limit as people set it; None in *project_id*, *key_id* or *model* means any."""

    limit_id: int
    tenant_id: str
    project_id: str | None = None
    key_id: str | None = None
    model: str | None = None
    unit: Unit
    period: Period
    #: In hits of the unit: requests, tokens, nano-units of money, requests under way.
    amount: int
    #: Hits that may pass at once in an empty bucket; one period's amount unless set.
    burst: int | None = None
    effect: Effect = Effect.REFUSE
    on_store_error: OnStoreError = OnStoreError.LOCAL
    #: Of a budget, as in the rate card.
    currency: str | None = None

    @property
    def scope(self) -> str:
        """Whom the limit binds, for the caller's eyes: "tenant", or of "project", "key", "model"."""
        named = (("project", self.project_id), ("key", self.key_id), ("model", self.model))
        return " and ".join(word for word, value in named if value is not None) or "tenant"

    @property
    def is_quota(self) -> bool:
        """Whether it counts over a calendar window; others are buckets or what is under way."""
        return self.period not in LENGTHS_US and self.unit is not Unit.CONCURRENCY

    def binds(self, ask: Ask) -> bool:
        """Whether *ask*, of this limit's tenant, is within its scope."""
        return (
            self.project_id in (None, ask.project_id)
            and self.key_id in (None, ask.key_id)
            and self.model in (None, ask.model)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """An admission request: who, for what, how large."""

    request_id: str
    tenant_id: str
    project_id: str
    key_id: str
    model: str
    dialect: str
    prompt_bytes: int
    #: Per choice, as the caller named it; 0 if it named none.
    output_tokens_max: int
    choices: int
    #: How much is asked for of what the dialect is metered by besides tokens.
    quantity: int = 0
    #: Whether the answer comes as a stream, which can be ended before its end.
    streams: bool = False
    #: The life of the Envoy that asks; empty if it does not say.
    epoch: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """What the model servers behind a model can take; None leaves it open."""

    model: str
    #: Requests under way.
    slots: int | None
    tokens_per_second: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """A pool, and the tenant's weight in it."""

    pool: Pool
    weight: int


class LimitTable:
    """All limits, found by tenant; those of one tenant are replaced at once, under whoever reads."""

    def __init__(self, limits: Iterable[Limit]) -> None:
        self._by_tenant: dict[str, Sequence[Limit]] = {**by_tenant(limits)}

    def replace(self, tenant_id: str, limits: Sequence[Limit]) -> None:
        """Give a tenant these limits, in the order they were made, in place of all that it has."""
        if limits:
            self._by_tenant[tenant_id] = limits
        else:
            self._by_tenant.pop(tenant_id, None)

    def match(self, ask: Ask) -> list[Limit]:
        """Limits that bind *ask*, in the order they were made."""
        return [limit for limit in self._by_tenant.get(ask.tenant_id, ()) if limit.binds(ask)]

    def of(self, tenant_id: str) -> list[Limit]:
        """Limits of a tenant, in the order they were made."""
        return list(self._by_tenant.get(tenant_id, ()))

    @property
    def tenants(self) -> list[str]:
        """Tenants that have a limit, in order."""
        # Listed before it is sorted: a list of its keys is made at once, whoever replaces meanwhile.
        return sorted(list(self._by_tenant))  # noqa: C414

    def with_quotas(self) -> list[str]:
        """Tenants that have a limit over a calendar window."""
        return [tenant_id for tenant_id in self.tenants if any(limit.is_quota for limit in self.of(tenant_id))]

    def __len__(self) -> int:
        return sum(map(len, list(self._by_tenant.values())))


def by_tenant(limits: Iterable[Limit]) -> dict[str, list[Limit]]:
    """*limits* in their order, by the tenant whom they bind."""
    found: dict[str, list[Limit]] = {}
    for limit in limits:
        found.setdefault(limit.tenant_id, []).append(limit)
    return found
