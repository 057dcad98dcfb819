# SPDX-License-Identifier: Apache-2.0
"""
Repay the leases of quotas: what each was spent on is what the ledger has of it.

A request that passes on a lease is settled by nobody; its row says which lease it was. Once the journal of the lease's
own Envoy has been read past the lease's time, and none of its requests is under way, the rows are all that came of it:
that is used, and the rest of what was held is free again. Until then all of it is held, whatever is away and for
however long, so nothing is overspent. Any number of processes may repay.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final, LiteralString, Protocol

import structlog

from chassis.errors import Unavailable
from chassis.stores.postgres import ReadPool, fetch_all
from ratelimit.adapters import metrics
from ratelimit.adapters.counters import Loan, StoreRefused
from ratelimit.adapters.sweep import read_until_by_life
from ratelimit.core.limits import Unit

log = structlog.get_logger()

#: From when a lease was given until each of its requests has begun: a worker's time for it, and what the clocks of
#: Envoy, the collector and the store may differ.
SPENT_AFTER: Final = timedelta(seconds=15)
#: Leases of one tenant that are looked at in one pass; the rest waits for the next.
_BATCH_MAX: Final = 200
_EVERY_SECONDS: Final = 2.0
#: Leases that another process gave and did not live to repay are found by looking at all tenants, this often.
_ALL_EVERY_SECONDS: Final = 60.0
#: Beyond what the store's clock can be ahead.
_FAR_AHEAD: Final = timedelta(days=1)

_UNDER_WAY: Final = "select distinct lease_id from open_exchange where lease_id = any(%s)"
_SPENT: Final[LiteralString] = """
select lease_id, currency, request_count, input_tokens, output_tokens, cached_tokens, amount_nano from lease_use
where lease_id = any(%s)
"""


class Counters(Protocol):
    """The part of `StoredCounters` that this needs."""

    def lent_before(self, tenant_id: str, moment_us: int, *, most: int) -> list[tuple[str, int]]:
        """Leases that are not repaid, oldest first."""

    def lent(self, tenant_id: str, lease_ids: Sequence[str]) -> dict[str, Loan]:
        """What each is of."""

    def repay(self, tenant_id: str, lease_id: str, used: Mapping[str, int]) -> bool:
        """Replace what one holds by what was used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Out:
    tenant_id: str
    given_us: int
    loan: Loan


class Loans:
    """Leases of quotas that are out, and passes over them."""

    def __init__(self, counters: Counters, pool: ReadPool) -> None:
        self._counters = counters
        self._pool = pool
        self._lock = threading.Lock()
        self._tenants: set[str] = set()

    def given(self, *tenant_ids: str) -> None:
        """Take note that these tenants may have a lease; returns at once."""
        with self._lock:
            self._tenants.update(tenant_ids)

    def repay(self, now: datetime) -> int:
        """Repay what is over; how many. *now* is compared with the store's own clock. Raises `Unavailable`."""
        with self._lock:
            tenants, self._tenants = self._tenants, set()
        try:
            out = self._out(sorted(tenants), now)
            ended = self._ended(out)
            spent = self._spent(ended)
            for lease_id in ended:
                used = {name: spent[lease_id][unit, currency] for name, (unit, currency) in out[lease_id].loan.units.items()}
                self._repay(out[lease_id].tenant_id, lease_id, used)
        except Unavailable:
            self.given(*tenants)
            raise
        metrics.SETTLED_BY_LEDGER.inc(len(ended))
        if ended:
            log.debug("leases_repaid", count=len(ended))
        return len(ended)

    def _out(self, tenants: Sequence[str], now: datetime) -> dict[str, _Out]:
        """Leases whose time is over, by id; tenants that have others, or more, are looked at again."""
        found: dict[str, _Out] = {}
        spent_us = _microseconds(now - SPENT_AFTER)
        for tenant_id in tenants:
            # Whatever the store's clock says of them: all that are out.
            given = self._counters.lent_before(tenant_id, _microseconds(now + _FAR_AHEAD), most=_BATCH_MAX)
            if given:
                self.given(tenant_id)
            over = {lease_id: given_us for lease_id, given_us in given if given_us <= spent_us}
            loans = self._counters.lent(tenant_id, list(over)) if over else {}
            for lease_id, given_us in over.items():
                if lease_id in loans:
                    found[lease_id] = _Out(tenant_id=tenant_id, given_us=given_us, loan=loans[lease_id])
                else:
                    # Its time was over without word from the ledger: only the index still has it.
                    self._repay(tenant_id, lease_id, {})
        return found

    def _ended(self, out: Mapping[str, _Out]) -> list[str]:
        """Of the leases that are out those of which the ledger has every request."""
        # In this order: a request whose start was read is under way until its row is there.
        lives = read_until_by_life(self._pool, {it.loan.epoch for it in out.values()})
        read = [
            lease_id for lease_id, it in out.items()
            if it.loan.epoch in lives and _microseconds(lives[it.loan.epoch] - SPENT_AFTER) >= it.given_us
        ]  # fmt: skip
        under_way = {row[0] for row in fetch_all(self._pool, _UNDER_WAY, (read,))} if read else set()
        return [lease_id for lease_id in read if lease_id not in under_way]

    def _repay(self, tenant_id: str, lease_id: str, used: Mapping[str, int]) -> None:
        try:
            self._counters.repay(tenant_id, lease_id, used)
        except StoreRefused as exc:
            # One damaged key is in nobody else's way.
            metrics.STORE_REFUSED.inc()
            log.error("lease_not_repaid", tenant=tenant_id, reason=exc.message)

    def _spent(self, lease_ids: Sequence[str]) -> Mapping[str, Mapping[tuple[Unit, str], int]]:
        """Hits by lease, unit and currency; nothing of a lease that no request passed on."""
        found: defaultdict[str, defaultdict[tuple[Unit, str], int]] = defaultdict(lambda: defaultdict(int))
        rows = fetch_all(self._pool, _SPENT, (list(lease_ids),)) if lease_ids else []
        for lease_id, currency, requests, input_, output, cached, amount_nano in rows:
            of = found[lease_id]
            for unit, hits in (
                (Unit.REQUESTS, requests), (Unit.TOKENS, input_ + output), (Unit.INPUT_TOKENS, input_),
                (Unit.OUTPUT_TOKENS, output), (Unit.CACHED_TOKENS, cached),
            ):  # fmt: skip
                of[unit, ""] += hits
            of[Unit.MONEY, currency] += amount_nano
        return found


def repay_for_ever(loans: Loans, clock: Callable[[], datetime], tenants: Callable[[], Sequence[str]]) -> None:
    """Repay every two seconds; a store that is away is tried again with the next."""
    all_at = 0.0
    while True:
        if time.monotonic() >= all_at:
            loans.given(*tenants())
            all_at = time.monotonic() + _ALL_EVERY_SECONDS
        try:
            loans.repay(clock())
        except Unavailable:
            log.warning("leases_not_repaid")
        time.sleep(_EVERY_SECONDS)


def _microseconds(moment: datetime) -> int:
    return int(moment.timestamp() * 1_000_000)
