# SPDX-License-Identifier: Apache-2.0
"""
Settle what Envoy did not: the ledger is the second side from which an exchange may be settled.

Envoy sends a settle once and ignores the answer; it is lost when Envoy, this service or the store
dies in that moment. What the ledger has as ended is settled with the ledger's own counts. What the
ledger has never heard of, long after it was admitted, never reached a model server (its client was
gone before): it is given back whole, once the journal of its own Envoy has been read past it. What is
under way stays. Any number of processes may sweep.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Final, Protocol

import structlog

from chassis.errors import Unavailable
from chassis.stores.postgres import ReadPool, fetch_all
from ratelimit.adapters import metrics
from ratelimit.core.usage import Report

log = structlog.get_logger()

#: Younger reservations are Envoy's to settle; streams that ended have been settled by then.
AGE_MIN: Final = timedelta(seconds=30)
#: A start record is written at admission; if the journal has been read past this age without it, there is none.
ORPHAN_AGE_MIN: Final = timedelta(seconds=120)
#: Reservations looked at for one tenant in one sweep; the rest waits for the next.
_BATCH_MAX: Final = 200
_SWEEP_EVERY_SECONDS: Final = 10.0

_ENDED: Final = """
select request_id, input_tokens, output_tokens, cached_tokens, reasoning_tokens, quantity from usage_event where request_id = any(%s)
"""
_UNDER_WAY: Final = "select request_id from open_exchange where request_id = any(%s)"
#: Up to when the journal of each Envoy life has been read to its end. One that has nothing to say moves on with its
#: collector; one whose collector is away may hold a start record unread, and only what its own Envoy admitted waits
#: for it, at most until the lease ends. Not by the places in its files: one that was rotated is never read again.
#: Lives that took over from each other have one journal (contract.EPOCH_HEIR).
_READ_UNTIL: Final = """
select asked.epoch, min(read_until)
from unnest(%s::text[]) asked (epoch)
join (select epoch, journal from journal_stream union select epoch, journal from ended_life) life
    on split_part(life.epoch, '~', 1) = split_part(asked.epoch, '~', 1)
join journal_state using (journal)
group by asked.epoch
"""
#: For what does not know its Envoy: any journal may tell of it.
_ALL_READ_UNTIL: Final = "select min(read_until) from journal_state"


class Counters(Protocol):
    """The part of `StoredCounters` that a sweep needs."""

    def opened_before(self, tenant_id: str, moment_us: int, *, most: int) -> list[tuple[str, int]]:
        """Open reservations, oldest first."""

    def epochs(self, tenant_id: str, request_ids: Sequence[str]) -> dict[str, str]:
        """Whose journal tells of each."""

    def settle(self, *, tenant_id: str, request_id: str, report: Report) -> object | None:
        """Settle one; None if it is settled."""


class Sweep:
    """One pass over the open reservations of all tenants with limits, and of those in shared pools."""

    def __init__(self, counters: Counters, pool: ReadPool, tenants: Callable[[], Sequence[str]]) -> None:
        self._counters = counters
        self._pool = pool
        self._tenants = tenants
        #: Reservations found old in this pass.
        self._aged = 0

    def run(self, now: datetime) -> int:
        """Settle what is over; how many. *now* is compared with the store's own clock. Raises `Unavailable`."""
        self._aged = 0
        settled = sum(self._tenant(tenant_id, now) for tenant_id in self._tenants())
        metrics.SETTLED_BY_LEDGER.inc(settled)
        metrics.HELD_LONG.set(self._aged - settled)
        return settled

    def _tenant(self, tenant_id: str, now: datetime) -> int:
        aged = self._counters.opened_before(tenant_id, _microseconds(now - AGE_MIN), most=_BATCH_MAX)
        if not aged:
            return 0
        self._aged += len(aged)
        ids = [request_id for request_id, _ in aged]
        ended = {
            row[0]: Report(input=row[1], output=row[2], cached=row[3], reasoning=row[4], quantity=row[5])
            for row in fetch_all(self._pool, _ENDED, (ids,))
        }
        under_way = {row[0] for row in fetch_all(self._pool, _UNDER_WAY, (ids,))}
        unheard_of = [request_id for request_id in ids if request_id not in ended and request_id not in under_way]
        read_until = self._read_until(tenant_id, unheard_of)
        settled = 0
        for request_id, admitted_us in aged:
            report = ended.get(request_id)
            if report is None and request_id in read_until:
                unheard_of_us = _microseconds(min(now, read_until[request_id])) - admitted_us
                if unheard_of_us > ORPHAN_AGE_MIN.total_seconds() * 1_000_000:
                    report = Report(input=0, output=0, happened=False)
            if report is not None:
                settled += self._counters.settle(tenant_id=tenant_id, request_id=request_id, report=report) is not None
        if settled:
            log.info("settled_from_ledger", tenant=tenant_id, count=settled)
        return settled

    def _read_until(self, tenant_id: str, request_ids: Sequence[str]) -> dict[str, datetime]:
        """Up to when the journal that would tell of each has been read; nothing for one that nobody has read yet."""
        if not request_ids:
            return {}
        epochs = self._counters.epochs(tenant_id, request_ids)
        known = dict(fetch_all(self._pool, _READ_UNTIL, (sorted(set(epochs.values())),)))
        [(of_all,)] = fetch_all(self._pool, _ALL_READ_UNTIL, ())
        found = {request_id: known.get(epoch) if epoch else of_all for request_id, epoch in epochs.items()}
        return {request_id: moment for request_id, moment in found.items() if moment is not None}


def sweep_for_ever(sweep: Sweep, clock: Callable[[], datetime]) -> None:
    """Sweep every ten seconds; a store that is away is tried again with the next."""
    while True:
        time.sleep(_SWEEP_EVERY_SECONDS)
        try:
            sweep.run(clock())
        except Unavailable:
            log.warning("sweep_failed")


def _microseconds(moment: datetime) -> int:
    return int(moment.timestamp() * 1_000_000)
