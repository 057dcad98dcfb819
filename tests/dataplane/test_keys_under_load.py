# SPDX-License-Identifier: Apache-2.0
"""Keys change while they are in use: rotation costs no request, revocation ends all of them within its bound."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx

from tests.dataplane.installation import Installation, Tenant, chat

#: The written bound of a revocation, whatever is lost on the way.
REVOKED_SECONDS_MAX = 5.0
CLIENTS = 8


def test_a_rotation_under_load_costs_no_request(road: Installation, tenant: Tenant) -> None:
    """Eight clients go over to the new key at their own pace within the overlap; both work meanwhile."""
    current, stop = {"key": tenant.key}, threading.Event()
    statuses: list[int] = []

    def client(number: int) -> None:
        mine = tenant.key
        with httpx.Client(timeout=60) as session:
            for turn in range(10_000):
                if stop.is_set():
                    return
                # Each looks for the new key at a turn of its own.
                if turn % (5 + number) == 0:
                    mine = current["key"]
                answer = session.post(
                    f"{road.url}/v1/chat/completions", json=chat(max_tokens=1), headers={"authorization": f"Bearer {mine}"}
                )
                statuses.append(answer.status_code)

    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(client, number) for number in range(CLIENTS)]
        key_ids = [tenant.key_id]
        for _ in range(3):
            time.sleep(0.7)
            rotated = road.control("POST", f"/v1/keys/{key_ids[-1]}/rotate", json={"overlap": "1h"}).json()
            road.issued.append(rotated["key"])
            key_ids.append(rotated["key_id"])
            current["key"] = rotated["key"]
        time.sleep(0.7)
        stop.set()
        for one in clients:
            one.result()

    assert {200} == set(statuses)
    used = {row["key_id"] for row in road.rows(tenant, len(statuses))}
    assert set(key_ids) == used


def test_a_revoked_key_under_load_is_dead_within_the_bound(
    road: Installation, record_property: Callable[[str, object], None]
) -> None:
    """On connections of several clients to every worker; once it is dead no worker lets it pass again."""
    seconds = sorted(_revoke_under_load(road, road.new_tenant(f"revoked-{number}")) for number in range(10))

    record_property("revocation_seconds_worst", round(seconds[-1], 3))
    record_property("revocation_seconds_median", round(seconds[len(seconds) // 2], 3))
    assert seconds[-1] <= REVOKED_SECONDS_MAX


def _revoke_under_load(road: Installation, tenant: Tenant) -> float:
    """Seconds from the control API's answer to the last request that any of four clients got through."""
    stop = threading.Event()
    passed: list[float] = []
    refused: list[float] = []

    def client(_: int) -> None:
        with httpx.Client(headers={"authorization": f"Bearer {tenant.key}"}, timeout=60) as session:
            while not stop.is_set():
                began = time.monotonic()
                status = session.post(f"{road.url}/v1/chat/completions", json=chat(max_tokens=1)).status_code
                (passed if status == 200 else refused).append(began)
                assert status in (200, 401)

    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(client, number) for number in range(4)]
        time.sleep(0.6)
        road.control("POST", f"/v1/keys/{tenant.key_id}/revoke").raise_for_status()
        revoked = time.monotonic()
        time.sleep(1.5)
        stop.set()
        for one in clients:
            one.result()

    assert refused
    assert passed
    return max(0.0, max(passed) - revoked)
