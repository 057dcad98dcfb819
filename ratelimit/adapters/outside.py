# SPDX-License-Identifier: Apache-2.0
"""
Let quotas and budgets have what came into the ledger without passing by: usage that somebody has posted.

The store has every request that passed, most of them before the ledger does; the ledger has those and
what was posted. So a quota that has less used than the ledger is raised to it, which can be said any
number of times. Until the ledger has what the store already had, what was posted may be seen in part.
Only tenants for whom something was posted lately are looked at; buckets are about the present and are left.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Final, LiteralString, Protocol

import structlog
from psycopg_pool import ConnectionPool

from chassis.errors import Unavailable
from chassis.stores.postgres import fetch_all
from ratelimit.core.demand import Counter, Kind, counter
from ratelimit.core.limits import Limit

log = structlog.get_logger()

#: How long after it was posted usage is looked after: far beyond what a collector is behind, usually.
LATELY: Final = timedelta(hours=1)
_EVERY_SECONDS: Final = 10.0
_POSTED: Final[LiteralString] = """
select distinct tenant_id from external_usage where posted_at > %s order by 1
"""


class Counters(Protocol):
    """The part of `StoredCounters` that this needs."""

    def raise_used(self, name: str, spent: int) -> bool:
        """Raise a quota that is known."""


class Outside:
    """One pass over the quotas of tenants for whom something was posted."""

    def __init__(
        self, counters: Counters, pool: ConnectionPool, limits: Callable[[str], Sequence[Limit]], spent: Callable[[Counter], int]
    ) -> None:
        self._counters = counters
        self._pool = pool
        self._limits = limits
        self._spent = spent

    def run(self, now: datetime) -> int:
        """Raise what is below the ledger; how many quotas. Raises `Unavailable`."""
        raised = 0
        for (tenant_id,) in fetch_all(self._pool, _POSTED, (now - LATELY,)):
            for limit in self._limits(tenant_id):
                found = counter(limit, now=now)
                if found.kind is Kind.QUOTA and self._counters.raise_used(found.name, self._spent(found)):
                    raised += 1
                    log.info("quota_raised", tenant=tenant_id, limit_id=limit.limit_id)
        return raised


def look_for_ever(outside: Outside, clock: Callable[[], datetime]) -> None:
    """Look every ten seconds; a store that is away is asked again with the next."""
    while True:
        time.sleep(_EVERY_SECONDS)
        try:
            outside.run(clock())
        except Unavailable:
            log.warning("quotas_not_raised")
