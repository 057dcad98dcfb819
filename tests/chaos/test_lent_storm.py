# SPDX-License-Identifier: Apache-2.0
"""Everything but the counter store dies while quotas are lent: in the end each has used what the ledger has, and holds nothing."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.chaos.storm import CONNECTIONS, PARTS, Storm, judge
from tests.dataplane.installation import Installation, Tenant, running
from tests.dataplane.test_limits import valkey

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1800)]

_REQUESTS = 12_000
_BETWEEN_DEATHS_SECONDS = 2.0
_REQUESTS_PER_ENVOY_DEATH = 2_000
_TENANTS = 5
#: Reservations of an Envoy that was killed are settled by the ledger too, those that nobody ever heard of after two minutes.
_REPAID_SECONDS = 400.0
#: Far away for most of the storm; the last tenant's are used up in it.
_FAR = {"monthly_requests": 10**6, "monthly_tokens": 10**9, "monthly_budget": "1000000.00"}
_NEAR = {"monthly_requests": 1_200, "monthly_tokens": 10**9, "monthly_budget": "0.50"}


@pytest.mark.parametrize("with_envoy", [False, True], ids=["services", "envoy"])
def test_what_was_used_of_each_quota_is_what_the_ledger_has(tmp_path: Path, with_envoy: bool) -> None:
    """
    Requests, tokens and nano-units, after each service died again and again.

    An Envoy that is killed may have settled what its journal lost the end of: then somewhat more was used than is billed,
    of each request that was under way at the most; never less.
    """
    parts = tuple(part for part in PARTS if part != "valkey" and (with_envoy or part != "envoy"))
    with running(tmp_path / "home", "--engine", "fake", "--restarts", "100000") as road:
        storm = Storm(
            road=road, requests=_REQUESTS, seed=5, between=_BETWEEN_DEATHS_SECONDS,
            requests_per_envoy_death=_REQUESTS_PER_ENVOY_DEATH, parts=parts,
        )  # fmt: skip
        storm.tenants = [_limited(road, **(_NEAR if number == _TENANTS - 1 else _FAR)) for number in range(_TENANTS)]
        time.sleep(1.0)  # the promise is one second
        storm.rage()
        rows = storm.settled()
        report = judge(storm, rows)
        expected = {tenant.tenant_id: _billed(rows, tenant) for tenant in storm.tenants}
        found = _used_in_the_end(valkey(road), expected)
        print(report | {"leased_share": _leased_share(road), "billed": expected, "used": found})

        assert {} == report["wrong"]
        assert _leased_share(road) > 0.3
        requests, _, money = expected[storm.tenants[-1].tenant_id]
        assert requests <= _NEAR["monthly_requests"]
        assert money <= 500_000_000
        if not with_envoy:
            assert expected == found
        for tenant_id, (requests, tokens, money) in expected.items():
            used_requests, used_tokens, used_money = found[tenant_id]
            assert requests <= used_requests <= requests + CONNECTIONS * storm.deaths["envoy"]
            assert tokens <= used_tokens
            assert money <= used_money


def _billed(rows: list[dict[str, Any]], tenant: Tenant) -> tuple[int, int, int]:
    own = [row for row in rows if row["tenant"] == tenant.tenant_id]
    return len(own), sum(row["input_tokens"] + row["output_tokens"] for row in own), sum(row["amount_nano"] or 0 for row in own)


def _used_in_the_end(store: redis.Redis, expected: dict[str, tuple[int, int, int]]) -> dict[str, tuple[int, ...]]:
    """What each tenant's quotas have used, once they hold nothing."""
    deadline = time.monotonic() + _REPAID_SECONDS
    while True:
        found = {tenant_id: _levels(store, tenant_id) for tenant_id in expected}
        if not any(level.get(b"held") or level.get(b"lent") for levels in found.values() for level in levels):
            break
        assert time.monotonic() < deadline, found
        time.sleep(1)
    # Requests are fewer than tokens, and those than nano-units.
    return {tenant_id: tuple(sorted(level[b"used"] for level in levels)) for tenant_id, levels in found.items()}


def _levels(store: redis.Redis, tenant_id: str) -> list[dict[bytes, int]]:
    names = [name for name in store.scan_iter(f"peaje:{{{tenant_id}}}:*", _type="HASH") if store.hexists(name, "used")]
    return [{key: int(value) for key, value in store.hgetall(name).items()} for name in names]


def _limited(road: Installation, **limits: int | str) -> Tenant:
    tenant = road.new_tenant("lent")
    price = {"model": "tiny", "input": "1", "output": "7", "tenant": tenant.tenant_id}
    road.control("POST", "/v1/prices", json=price).raise_for_status()
    road.control("PUT", f"/v1/tenants/{tenant.tenant_id}/limits", json=limits).raise_for_status()
    return tenant


def _leased_share(road: Installation) -> float:
    [row] = road.sql("select (select sum(request_count) from lease_use) / (select count(*) from usage_event)::float8 as share")
    return float(row["share"] or 0)
