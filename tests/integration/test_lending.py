# SPDX-License-Identifier: Apache-2.0
"""The counters of the simulation of leases are those of the script: the same life, on a real store and in memory."""

from __future__ import annotations

from random import Random

import pytest

from bench.lending import Lender
from ratelimit.adapters import counters as adapter
from ratelimit.adapters.counters import connect
from ratelimit.core.lease import Lease
from ratelimit.core.limits import Unit
from ratelimit.core.usage import Report
from tests.integration.stores import PATIENCE_SECONDS
from tests.integration.test_counters import set_clock
from tests.integration.test_leases import Store, counter, demand


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_life_of_takes_leases_and_settles_is_the_same_in_both(counter_store: str, seed: int) -> None:
    """Verdict, lease, what is left of each bucket: four hundred steps, with leases given back late, twice, with a debt."""
    client = connect(counter_store, cluster=False, timeout_seconds=PATIENCE_SECONDS)
    store, lender, chance = Store(client), Lender(), Random(seed)
    settle = store.counters._settle.text.replace("redis.call('PEXPIRE',", "tostring(")
    store.counters._settle = adapter._script(settle)
    limits = (counter(store.tenant, amount=60), counter(store.tenant, Unit.TOKENS, amount=800, hits=10))
    out: list[Lease] = []
    under_way: list[str] = []
    lent = refused = 0

    for number in range(400):
        store.now += chance.choice([0, 1, 100_000, 400_000, 1_500_000, 7_000_000])
        asked = demand(store.tenant, number, *limits)
        wanted = chance.choice([0, 0, 3, 9])
        lease = Lease(lease_id=asked.request_id, requests=wanted, tokens=wanted * 10) if wanted else None
        held = chance.choice(out) if out and chance.random() < 0.5 else None
        back = held and Lease(
            lease_id=held.lease_id, requests=chance.randint(0, held.requests), tokens=chance.randint(-40, held.tokens)
        )

        stored = store.take(asked, lease=lease, back=back)
        ours = lender.take(asked, store.now, lease=lease, back=back)

        assert (stored.verdict, stored.lent) == (ours.verdict, ours.lent), number
        assert [r.remaining for r in stored.readings] == [r.remaining for r in ours.readings], number
        lent, refused = lent + stored.leased, refused + (not stored.admitted)
        out += [lease.of(stored.lent)] if lease is not None and stored.leased else []
        under_way += [asked.request_id] if stored.admitted else []
        if under_way and chance.random() < 0.5:
            request_id = under_way.pop(chance.randrange(len(under_way)))
            report = Report(input=9, output=chance.randrange(60))
            set_clock(client, store.now)
            store.counters.settle(tenant_id=store.tenant, request_id=request_id, report=report)
            lender.settle(request_id, report, store.now)

    assert lent > 3
    assert refused > 3
