# SPDX-License-Identifier: Apache-2.0
"""
The limits and prices in force, read from Postgres; and what the ledger has summed.

A change is pushed by name, and the limits of its tenant are read at once; everything is read at the start, after a
silence that may have hidden a change, and now and then. While Postgres is away the last table stays in force. Before
the first one there is none to stand on: the service does not serve until it has read it.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter as Counts
from collections.abc import Mapping, Sequence
from dataclasses import fields
from datetime import UTC, datetime
from typing import Any, Final, LiteralString

import structlog

from chassis.errors import Unavailable
from chassis.stores.postgres import ReadPool, fetch_all, listen
from ratelimit.core.demand import Counter
from ratelimit.core.limits import Effect, Limit, LimitTable, OnStoreError, Period, Pool, Share, Unit, by_tenant
from ratelimit.core.usage import Price, Tier

log = structlog.get_logger()

_LIMITS: Final[LiteralString] = """
select limit_id, tenant_id, project_id, key_id, model, unit, period, amount, burst, effect, on_store_error, currency
from rate_limit
"""
#: A page ends with a tenant, so that none is read in part.
_PAGE_END: Final = "select tenant_id from rate_limit where tenant_id > %s order by tenant_id offset %s limit 1"
_PAGE: Final[LiteralString] = _LIMITS + "where tenant_id > %s and tenant_id <= %s order by limit_id"
_LAST_PAGE: Final[LiteralString] = _LIMITS + "where tenant_id > %s order by limit_id"
_OF_TENANTS: Final[LiteralString] = _LIMITS + "where tenant_id = any(%s) order by limit_id"
#: A change names a key where there is one, else the tenant. A key never changes its tenant.
_TENANTS_OF: Final = "select tenant_id from api_key where key_id = any(%(names)s) union select unnest(%(names)s::text[])"
#: Those in force now, and when that will be others.
_PRICES: Final = """
select model, tenant_id, currency, input_nano, output_nano, cached_nano, reasoning_nano, minimum_nano, meter, each_nano, tiers
from rate_card
where effective @> now()
"""
_PRICES_TURN: Final = """
select extract(epoch from min(turn) - now())::float8
from rate_card, lateral unnest(array[lower(effective), upper(effective)]) as turn where turn > now()
"""
_POOLS: Final = "select model, slots, tokens_per_second from pool_capacity"
_WEIGHTS: Final[LiteralString] = "select tenant_id, weight from tenant_weight"
_WEIGHTS_OF: Final[LiteralString] = _WEIGHTS + " where tenant_id = any(%s)"
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
_TIER_FIELDS: Final = tuple(field.name for field in fields(Tier))
#: Between two readings of everything: what a change costs that nobody told of, as by hand with triggers off.
WHOLE_EVERY_SECONDS: Final = 300.0
#: Limits that are read at once: a twentieth of a second, well below a statement's timeout.
PAGE_LIMITS: Final = 5_000
#: So many times as long as it took to read a page, the next one is waited for: a fifth of the core that decides, or
#: half of it after a silence that may have hidden a change.
_REST: Final = 4.0
_REST_AFTER_SILENCE: Final = 1.0
#: Names of changes that wait to be read; beyond it everything is read.
NAMES_MAX: Final = 10_000
_RETRY_EVERY_SECONDS: Final = 0.5

LIMIT_CHANNEL: Final = "peaje_rate_limit"
PRICE_CHANNEL: Final = "peaje_rate_card"

PriceList = Mapping[tuple[str, str | None], Price]


class _Heard:
    """What was told to have changed and is not read yet; one thread listens, another reads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._names: set[str] = set()
        self.is_all = False
        self.has_prices = False
        self.any = threading.Event()

    def tell(self, channel: str, name: str) -> None:
        """Keep what changed; without a *name* it may be anything."""
        with self._lock:
            self.has_prices = self.has_prices or channel == PRICE_CHANNEL
            if channel == LIMIT_CHANNEL and name:
                self._names.add(name)
            if (channel == LIMIT_CHANNEL and not name) or len(self._names) > NAMES_MAX:
                self.is_all = True
                self._names.clear()
        self.any.set()

    def names(self) -> list[str]:
        """Take the names of keys and tenants whose limits changed."""
        with self._lock:
            self.any.clear()
            names, self._names = list(self._names), set()
        return names


class LimitsSource:
    """Holds the current tables; reading them never blocks."""

    def __init__(self, pool: ReadPool) -> None:
        self._pool = pool
        self._heard = _Heard()
        self._prices: PriceList = {}
        #: Seconds until other prices are in force, by a steady clock.
        self._prices_turn_at = math.inf
        self._by_id: dict[int, Limit] = {}
        self._modes: Counts[OnStoreError] = Counts()
        self._pools: Mapping[str, Pool] = {}
        self._weights: dict[str, int] = {}
        self.current = LimitTable(())
        self._load_first()

    def watch(self, url: str) -> None:
        """Keep the tables current from background threads."""
        listen(url, (LIMIT_CHANNEL, PRICE_CHANNEL), self.tell, name="ratelimit")
        threading.Thread(target=self._run, name="limits", daemon=True).start()

    def tell(self, channel: str, name: str) -> None:
        """Hear of a change of the key or tenant with that *name*; without one, of any number of changes."""
        self._heard.tell(channel, name)

    @property
    def modes(self) -> frozenset[OnStoreError]:
        """What the limits in force do while the store is away."""
        return frozenset(mode for mode, count in list(self._modes.items()) if count)

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
                return self.read_all(rest=0.0)
            except Unavailable:
                log.warning("limits_wait_for_postgres")
                time.sleep(_RETRY_EVERY_SECONDS)

    def _run(self) -> None:
        whole_at = time.monotonic() + WHOLE_EVERY_SECONDS
        while True:
            self._heard.any.wait(max(0.0, min(whole_at, self._prices_turn_at) - time.monotonic()))
            try:
                is_told = self._heard.is_all
                if is_told or time.monotonic() >= whole_at:
                    self._heard.is_all = False
                    try:
                        self.read_all(rest=_REST_AFTER_SILENCE if is_told else _REST)
                    except Unavailable:
                        self._heard.is_all = is_told
                        raise
                    whole_at = time.monotonic() + WHOLE_EVERY_SECONDS
                self.read_changed()
            except Unavailable:
                log.warning("limits_stale")
                self._heard.any.set()
                time.sleep(_RETRY_EVERY_SECONDS)

    def read_changed(self) -> frozenset[str]:
        """Read what was told to have changed, and prices when others hold; the tenants that were read. Raises `Unavailable`."""
        if self._heard.has_prices or time.monotonic() >= self._prices_turn_at:
            self._read_prices()
        names = self._heard.names()
        if not names:
            return frozenset()
        try:
            tenants = [tenant_id for (tenant_id,) in fetch_all(self._pool, _TENANTS_OF, {"names": names})]
            found = self._read(_OF_TENANTS, (tenants,))
            weights = dict(fetch_all(self._pool, _WEIGHTS_OF, (tenants,)))
        except Unavailable:
            for name in names:
                self._heard.tell(LIMIT_CHANNEL, name)
            raise
        for tenant_id in tenants:
            self._replace(tenant_id, found.get(tenant_id, ()))
            if tenant_id in weights:
                self._weights[tenant_id] = weights[tenant_id]
            else:
                self._weights.pop(tenant_id, None)
        return frozenset(tenants)

    def read_all(self, *, rest: float) -> None:
        """
        Read everything page by page, and after each what has changed meanwhile; raises `Unavailable`.

        *rest*: to pause between pages, as a multiple of the time that one took.
        """
        self._read_prices()
        self._pools = {
            model: Pool(model=model, slots=slots, tokens_per_second=tokens_per_second)
            for model, slots, tokens_per_second in fetch_all(self._pool, _POOLS, ())
        }
        self._weights = dict(fetch_all(self._pool, _WEIGHTS, ()))
        before, after = self.current.tenants, ""
        seen: set[str] = set()
        while True:
            began = time.monotonic()
            end = fetch_all(self._pool, _PAGE_END, (after, PAGE_LIMITS))
            found = self._read(_PAGE, (after, end[0][0])) if end else self._read(_LAST_PAGE, (after,))
            for tenant_id, limits in found.items():
                self._replace(tenant_id, limits)
            seen.update(found)
            if not end:
                break
            after = end[0][0]
            time.sleep(rest * (time.monotonic() - began))
            # Newer than the pages, so whoever lost all limits since then is not given them again.
            seen |= self.read_changed()
        for tenant_id in before:
            if tenant_id not in seen:
                self._replace(tenant_id, ())

    def _read(self, query: LiteralString, arguments: tuple[Any, ...]) -> dict[str, list[Limit]]:
        return by_tenant(
            Limit(
                limit_id=limit_id, tenant_id=tenant_id, project_id=project_id, key_id=key_id, model=model,
                unit=Unit(unit), period=Period(period), amount=amount, burst=burst, effect=Effect(effect),
                on_store_error=OnStoreError(on_store_error), currency=currency,
            )
            for (
                limit_id, tenant_id, project_id, key_id, model, unit, period, amount, burst, effect, on_store_error,
                currency,
            ) in fetch_all(self._pool, query, arguments)
        )  # fmt: skip

    def _replace(self, tenant_id: str, limits: Sequence[Limit]) -> None:
        for limit in self.current.of(tenant_id):
            self._by_id.pop(limit.limit_id, None)
            self._modes[limit.on_store_error] -= 1
        for limit in limits:
            self._by_id[limit.limit_id] = limit
            self._modes[limit.on_store_error] += 1
        self.current.replace(tenant_id, limits)

    def _read_prices(self) -> None:
        self._heard.has_prices = False
        try:
            began = time.monotonic()
            [(turn_seconds,)] = fetch_all(self._pool, _PRICES_TURN, ())
            rows = fetch_all(self._pool, _PRICES, ())
        except Unavailable:
            self._heard.has_prices = True
            raise
        prices: dict[tuple[str, str | None], Price] = {}
        for model, tenant_id, currency, input_, output, cached, reasoning, minimum, meter, each, tiers in rows:
            prices[model, tenant_id] = Price(
                currency=currency, input_nano=input_, output_nano=output, cached_nano=cached, reasoning_nano=reasoning, minimum_nano=minimum,
                meter=meter, each_nano=each,
                tiers=tuple(Tier(**{name: tier[name] for name in _TIER_FIELDS}) for tier in tiers),
            )
        self._prices = prices
        self._prices_turn_at = math.inf if turn_seconds is None else began + turn_seconds


def _moment(us: int) -> datetime:
    return datetime.fromtimestamp(us // 1_000_000, tz=UTC)
