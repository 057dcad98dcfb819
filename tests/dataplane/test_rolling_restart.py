# SPDX-License-Identifier: Apache-2.0
"""A process of each kind is asked to end, one after another, under load: nobody is refused, nothing is lost."""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.dataplane.installation import VISIBLE_SECONDS, Installation, chat

CLIENTS = 4
#: Requests that must pass after each process is back.
PASSED_MIN = 20
#: One of each kind: its siblings are asked meanwhile, where it has any.
PARTS = ("extauth", "ratelimit", "metering", "collector", "events", "beacon", "control")


@pytest.mark.chaos
def test_each_process_ends_in_order_and_nobody_notices(fleet: Installation) -> None:
    """Requests of both kinds, asked about each time; as many rows as answers, each told by the engine."""
    tenant = fleet.new_tenant("rolling")
    fleet.control("PUT", f"/v1/tenants/{tenant.tenant_id}/limits", json={"monthly_tokens": 1_000_000_000}).raise_for_status()
    time.sleep(1.0)  # the promise is one second
    statuses: list[int] = []
    stop = threading.Event()

    def client(number: int) -> None:
        with httpx.Client(headers={"authorization": f"Bearer {tenant.key}"}, timeout=30) as session:
            while not stop.is_set():
                body = chat(max_tokens=3, stream=number % 2 == 0)
                statuses.append(session.post(f"{fleet.url}/v1/chat/completions", json=body).status_code)

    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(client, number) for number in range(CLIENTS)]
        try:
            for part in PARTS:
                _restart(fleet, part)
                _wait_for(statuses, len(statuses) + PASSED_MIN)
        finally:
            stop.set()
        for one in clients:
            one.result()

    assert {200} == set(statuses)
    rows = fleet.rows(tenant, len(statuses))
    assert len(statuses) == len(rows)
    assert {("reported", "ok")} == {(row["basis"], row["outcome"]) for row in rows}


def _restart(fleet: Installation, part: str) -> None:
    """Ask it to end, and wait for the next one as the supervisor tells of it: no request of ours helps it up."""
    pid = fleet.pid(part)
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + 2 * VISIBLE_SECONDS
    while time.monotonic() < deadline:
        [found] = [one for one in fleet.status()["parts"] if one["name"] == part]
        if found["pid"] not in (None, pid) and found["state"] == "ready":
            return
        time.sleep(0.1)
    raise AssertionError(f"{part} did not come back")


def _wait_for(statuses: list[int], count: int) -> None:
    deadline = time.monotonic() + VISIBLE_SECONDS
    while len(statuses) < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)
