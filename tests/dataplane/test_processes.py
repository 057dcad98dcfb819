# SPDX-License-Identifier: Apache-2.0
"""Several processes of a service: all of them work, and one that is killed costs nobody a request."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.dataplane.installation import Installation, Tenant, chat

CLIENTS = 4
#: Requests that pass before a kill and after it, so that it falls into load.
PASSED_MIN = 100


@pytest.fixture
def asking(fleet: Installation) -> Tenant:
    """A tenant whose every request is asked about: its key is good at one address, which Envoy does not remember."""
    tenant = fleet.new_tenant("asking", rpm=1_000_000)
    made = fleet.control(
        "POST", f"/v1/tenants/{tenant.tenant_id}/keys", json={"name": "here", "allowed_cidrs": ["127.0.0.0/8"]}
    ).json()
    fleet.issued.append(made["key"])
    return Tenant(tenant_id=tenant.tenant_id, key_id=made["key_id"], key=made["key"])


def asked(fleet: Installation) -> dict[str, int]:
    """Calls that Envoy has made to each process of extauth and ratelimit."""
    answer = httpx.get(f"http://127.0.0.1:{fleet.admin_port}/clusters", params={"format": "json"}).json()
    return {
        Path(host["address"]["pipe"]["path"]).stem: sum(int(stat.get("value", 0)) for stat in host["stats"] if stat["name"] == "rq_total")
        for cluster in answer["cluster_statuses"]
        if cluster["name"] in ("extauth", "ratelimit")
        for host in cluster["host_statuses"]
    }


def test_processes_killed_under_load_cost_no_request(fleet: Installation, asking: Tenant) -> None:
    """Calls under way go to another one; the dead get none until they are back, and then their share."""
    killed = ("extauth", "ratelimit-3")
    statuses: list[int] = []
    stop = threading.Event()

    def client(_: int) -> None:
        with httpx.Client(headers={"authorization": f"Bearer {asking.key}"}, timeout=30) as session:
            while not stop.is_set():
                statuses.append(session.post(f"{fleet.url}/v1/chat/completions", json=chat(max_tokens=1)).status_code)

    def wait_until_passed(count: int) -> None:
        goal, deadline = len(statuses) + count, time.monotonic() + 30
        while len(statuses) < goal and time.monotonic() < deadline:
            time.sleep(0.02)
        assert goal <= len(statuses)

    before = asked(fleet)
    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(client, number) for number in range(CLIENTS)]
        try:
            wait_until_passed(PASSED_MIN)
            shares = {process: calls - before[process] for process, calls in asked(fleet).items()}
            pids = [fleet.kill(part) for part in killed]
            for part, pid in zip(killed, pids, strict=True):
                fleet.wait_restarted(part, pid)
            back = asked(fleet)
            wait_until_passed(PASSED_MIN)
        finally:
            stop.set()
        for one in clients:
            one.result()

    assert {200} == set(statuses)
    # Of two that are picked at random the less busy one is asked: none is left out.
    assert min(shares.values()) > PASSED_MIN / len(shares) / 4, shares
    after = asked(fleet)
    assert [] == [part for part in killed if after[part] <= back[part]]


def test_status_shows_each_process(fleet: Installation) -> None:
    """By name, ready, with a pid of its own."""
    parts = {part["name"]: part for part in fleet.status()["parts"]}

    several = ["extauth", "extauth-2", "ratelimit", "ratelimit-2", "ratelimit-3", "metering"]
    assert several == [name for name in parts if name.partition("-")[0] in ("extauth", "ratelimit", "metering")]
    assert {"ready"} == {parts[name]["state"] for name in several}
    assert len(several) == len({parts[name]["pid"] for name in several})
