# SPDX-License-Identifier: Apache-2.0
"""The counter store stalls and dies under real Envoy: each limit follows its written mode, nobody reads a 500."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.dataplane.installation import VISIBLE_SECONDS, Installation, Tenant, chat

MODES = ("local", "allow", "deny")
#: Requests a day for each of the three tenants.
_LIMIT = 12
#: As long as the longest stall that is promised to be survived.
_STALL_SECONDS = 5.0


def ask(road: Installation, callers: dict[str, Tenant], times: int) -> dict[str, Counter[int]]:
    """Statuses that the tenants of the modes get, four requests at a time."""
    with ThreadPoolExecutor(4) as pool:
        return {
            mode: Counter(pool.map(lambda _, caller=caller: road.post(caller, json=chat()).status_code, range(times)))
            for mode, caller in callers.items()
        }


@pytest.mark.parametrize("fault", [signal.SIGSTOP, signal.SIGKILL], ids=["stalled", "killed"])
def test_each_limit_follows_its_mode_while_the_store_is_away(road: Installation, fault: signal.Signals) -> None:
    """Allow serves all, deny none (503), local no more than the limit beside what was used; afterwards all are exact."""
    callers = {mode: road.new_tenant(f"{mode}-{fault.name.lower()}") for mode in MODES}
    for mode, caller in callers.items():
        limits = {"requests_per_day": _LIMIT, "on_store_error": mode}
        road.control("PUT", f"/v1/tenants/{caller.tenant_id}/limits", json=limits).raise_for_status()
    time.sleep(1.0)  # the promise is one second
    before = ask(road, callers, 2)
    pid, struck_at = road.pid("valkey"), time.monotonic()

    os.kill(pid, fault)
    try:
        # A killed store is back at once, as good as new; a stalled one stays away all the while.
        during = ask(road, callers, _LIMIT + 8)
        time.sleep(max(0.0, _STALL_SECONDS - (time.monotonic() - struck_at)) if fault is signal.SIGSTOP else 0.0)
    finally:
        if fault is signal.SIGSTOP:
            os.kill(pid, signal.SIGCONT)
    if fault is signal.SIGKILL:
        road.wait_restarted("valkey", pid)
    deadline = time.monotonic() + VISIBLE_SECONDS
    while road.post(callers["deny"], json=chat()).status_code == 503 and time.monotonic() < deadline:
        time.sleep(0.2)
    after = ask(road, callers, _LIMIT + 8)

    assert {mode: Counter({200: 2}) for mode in MODES} == before
    assert {200, 429, 503} >= {status for counted in (*during.values(), *after.values()) for status in counted}
    assert 0 == during["local"][503] + after["local"][503]
    assert 0 < during["local"][200] <= 2 * _LIMIT
    if fault is signal.SIGSTOP:
        assert _LIMIT == during["local"][200]
        assert Counter({200: _LIMIT + 8}) == during["allow"]
        # Four that were under way when it stalled are answered as the rest: not at all.
        assert Counter({503: _LIMIT + 8}) == during["deny"]
    # Two limits' worth in all: what the store counted, and what this process gave out alone.
    assert before["local"][200] + during["local"][200] + after["local"][200] <= 2 * _LIMIT
    assert before["deny"][200] + during["deny"][200] + after["deny"][200] <= _LIMIT
    assert all(after[mode][429] > 0 for mode in MODES)
