# SPDX-License-Identifier: Apache-2.0
"""Keys change while they are in use: a rotation costs no request."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.dataplane.installation import Installation, Tenant, chat

pytestmark = pytest.mark.express("on", "off")

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
