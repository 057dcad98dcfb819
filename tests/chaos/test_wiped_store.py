# SPDX-License-Identifier: Apache-2.0
"""The counter store is emptied again and again under load: no bill changes, and nobody is refused. Minutes: only with --chaos."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from tests.chaos.storm import DISCONNECTS, TENANTS, Storm, judge
from tests.dataplane.installation import running
from tests.dataplane.test_limits import valkey

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(0)]

#: Far more often than a store is lost: most requests have what they hold wiped from under them sooner or later.
_BETWEEN_WIPES_SECONDS = 3.0
#: Of every kind that the store counts, none of which the storm comes near.
_LIMITS = {
    "requests_per_minute": 10_000_000, "tokens_per_minute": 1_000_000_000, "concurrency": 1000, "monthly_tokens": 100_000_000_000,
    "monthly_budget": "1000000.00",
}  # fmt: skip


def test_no_bill_changes_where_the_store_is_wiped(tmp_path: Path, pytestconfig: pytest.Config, capsys: pytest.CaptureFixture[str]) -> None:
    """Every row is what the engine's truth says, exactly; nobody comes near a limit, and nobody is told of one."""
    requests, seed = pytestconfig.getoption("wiped_requests"), pytestconfig.getoption("storm_seed")
    with running(tmp_path / "home", "--engine", "fake") as road:
        store = valkey(road)
        road.cli("prices", "set", "--model", "tiny", "--input", "1", "--output", "2", "--meter", "images", "--each", "0.04")
        tenants = [road.new_tenant("wiped") for _ in range(TENANTS)]
        for tenant in tenants:
            road.control("PUT", f"/v1/tenants/{tenant.tenant_id}/limits", json=_LIMITS).raise_for_status()
        storm = Storm(road=road, requests=requests, seed=seed, between=1.0, parts=(), tenants=tenants)
        over, wipes = threading.Event(), 0

        def wipe() -> None:
            nonlocal wipes
            while not over.wait(_BETWEEN_WIPES_SECONDS):
                store.flushall()
                wipes += 1

        wiping = threading.Thread(target=wipe)
        wiping.start()
        try:
            storm.rage()
        finally:
            over.set()
            wiping.join()
        report = judge(storm, storm.settled()) | {"wipes": wipes, "ledger": road.cli("ledger", "verify")["ok"]}
    with capsys.disabled():
        print(f"\n{json.dumps(report)}")

    assert {} == report["wrong"]
    assert 0 == report["inexact"]
    assert report["ledger"]
    assert wipes >= storm.seconds / _BETWEEN_WIPES_SECONDS / 2 > 1
    # Each has a row, so each was admitted: what was answered 500 or 503 the engine had failed or broken off.
    assert report["requests"] == report["rows"]
    assert {200, 500, 503} >= set(report["statuses"])
    assert report["disconnects"] > requests * DISCONNECTS / 4
