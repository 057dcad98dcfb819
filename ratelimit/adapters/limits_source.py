# SPDX-License-Identifier: Apache-2.0
"""
The limits and prices in force, read whole from Postgres and swapped as one; and what the ledger has summed.

A change is pushed and read at once; the period bounds what a lost push can cost. While
Postgres is away the last table stays in force. Before the first one there is none to
stand on: the service does not serve until it has read it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import fields
from datetime import UTC, datetime
from typing import Final, LiteralString

import structlog

from chassis.errors import Unavailable
from chassis.stores.postgres import ReadPool, fetch_all, listen
from ratelimit.core.demand import Counter
from ratelimit.core.limits import Effect, Limit, LimitTable, OnStoreError, Period, Pool, Share, Unit
from ratelimit.core.usage import Price, Tier

log = structlog.get_logger()

_ALL_LIMITS: Final = """
select limit_id, tenant_id, project_id, key_id, model, unit, period, amount, burst, effect, on_store_error, currency
from rate_limit
order by limit_id
"""
#: Those in force now; a price for a later day comes with the next reload after it begins.
_PRICES: Final = """
select model, tenant_id, currency, input_nano, output_nano, cached_nano, reasoning_nano, minimum_nano, meter, each_nano, tiers
from rate_card
where effective @> now()
"""
_POOLS: Final = "select model, slots, tokens_per_second from pool_capacity"
_WEIGHTS: Final = "select tenant_id, weight from tenant_weight"
#: Of a tenant that was given none.
WEIGHT_DEFAULT: Final = 1
#: What one limit's calendar window holds in the ledger: its hourly sums are written with the rows, and
#: days and months begin with an hour.
_HOURLY: Final[LiteralString] = "from billing_usage_hourly_v1 where hour >= %(start)s and hour < %(end)s"
_SUMS: Final[Mapping[Unit, LiteralString]] = {
    Unit.REQUESTS: "sum(request_count)",
    Unit.TOKENS: "sum(input_tokens + output_tokens)",
    Unit.INPUT_TOKENS: "sum(input_tokens)",
    Unit.OUTPUT_TOKENS: "sum(output_tokens)",
    Unit.CACHED_TOKENS: "sum(cached_tokens)",
    Unit.MONEY: "sum(amount_nano) filter (where currency = %(currency)s)",
}
_OF_SCOPE: Final[LiteralString] = """
  and tenant = %(tenant)s
  and (%(project)s::text is null or project = %(project)s)
  and (%(key)s::text is null or key_id = %(key)s)
  and (%(model)s::text is null or model = %(model)s)
"""
_RELOAD_EVERY_SECONDS = 5.0
_TIER_FIELDS: Final = tuple(field.name for field in fields(Tier))
_RETRY_EVERY_SECONDS = 0.5

PriceList = Mapping[tuple[str, str | None], Price]


class LimitsSource:
    """Holds the current tables; reading them never blocks."""

    def __init__(self, pool: ReadPool) -> None:
        self._pool = pool
        self._changed = threading.Event()
        self._prices: PriceList = {}
        self._by_id: Mapping[int, Limit] = {}
        self._pools: Mapping[str, Pool] = {}
        self._weights: Mapping[str, int] = {}
        self.current = LimitTable(())
        #: What the limits in force do while the store is away.
        self.modes: frozenset[OnStoreError] = frozenset()
        self._load_first()

    def watch(self, url: str) -> None:
        """Keep the tables current from background threads."""
        listen(url, ("peaje_rate_limit", "peaje_rate_card"), lambda *_: self._changed.set(), name="ratelimit")
        threading.Thread(target=self._run, name="limits", daemon=True).start()

    def price(self, *, model: str, tenant_id: str) -> Price | None:
        """The price in force: the tenant's own, else everybody's; None if there is none."""
        return self._prices.get((model, tenant_id)) or self._prices.get((model, None))

    def share(self, *, model: str, tenant_id: str) -> Share | None:
        """A tenant's share of the pool behind *model*; None where the pool has no capacity set."""
        pool = self._pools.get(model)
        return None if pool is None else Share(pool=pool, weight=self._weights.get(tenant_id, WEIGHT_DEFAULT))

    @property
    def shared_models(self) -> list[str]:
        """Models whose pool has a capacity."""
        return list(self._pools)

    def spent(self, counter: Counter) -> int:
        """What the ledger has for *counter*'s window; raises `Unavailable`."""
        limit = self._by_id.get(counter.limit_id)
        if limit is None:
            raise Unavailable("The limit is gone.")
        parameters = {
            "tenant": limit.tenant_id, "project": limit.project_id, "key": limit.key_id, "model": limit.model,
            "currency": limit.currency, "start": _moment(counter.starts_us), "end": _moment(counter.ends_us),
        }  # fmt: skip
        query: LiteralString = "select coalesce(" + _SUMS[counter.unit] + ", 0)::bigint " + _HOURLY + _OF_SCOPE
        [(spent,)] = fetch_all(self._pool, query, parameters)
        return int(spent)

    def _load_first(self) -> None:
        while True:
            try:
                return self._load()
            except Unavailable:
                log.warning("limits_wait_for_postgres")
                time.sleep(_RETRY_EVERY_SECONDS)

    def _run(self) -> None:
        while True:
            self._changed.wait(_RELOAD_EVERY_SECONDS)
            self._changed.clear()
            try:
                self._load()
            except Unavailable:
                log.warning("limits_stale")

    def _load(self) -> None:
        limits = [
            Limit(
                limit_id=limit_id, tenant_id=tenant_id, project_id=project_id, key_id=key_id, model=model,
                unit=Unit(unit), period=Period(period), amount=amount, burst=burst, effect=Effect(effect),
                on_store_error=OnStoreError(on_store_error), currency=currency,
            )
            for (
                limit_id, tenant_id, project_id, key_id, model, unit, period, amount, burst, effect, on_store_error,
                currency,
            ) in fetch_all(self._pool, _ALL_LIMITS, ())
        ]  # fmt: skip
        prices: dict[tuple[str, str | None], Price] = {}
        for model, tenant_id, currency, input_, output, cached, reasoning, minimum, meter, each, tiers in fetch_all(self._pool, _PRICES, ()):
            prices[model, tenant_id] = Price(
                currency=currency, input_nano=input_, output_nano=output, cached_nano=cached, reasoning_nano=reasoning, minimum_nano=minimum,
                meter=meter, each_nano=each,
                tiers=tuple(Tier(**{name: tier[name] for name in _TIER_FIELDS}) for tier in tiers),
            )
        self._pools = {
            model: Pool(model=model, slots=slots, tokens_per_second=tokens_per_second)
            for model, slots, tokens_per_second in fetch_all(self._pool, _POOLS, ())
        }
        self._weights = dict(fetch_all(self._pool, _WEIGHTS, ()))
        self._by_id = {limit.limit_id: limit for limit in limits}
        self._prices = prices
        self.modes = frozenset(limit.on_store_error for limit in limits)
        self.current = LimitTable(limits)


def _moment(us: int) -> datetime:
    return datetime.fromtimestamp(us // 1_000_000, tz=UTC)
