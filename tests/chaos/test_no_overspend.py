# SPDX-License-Identifier: Apache-2.0
"""A hundred thousand requests through Envoy and three ratelimit processes that die all the time: no limit is passed."""

from __future__ import annotations

import itertools
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from tests.dataplane.installation import Installation, Tenant, chat, running
from tests.dataplane.test_limits import SETTLED_SECONDS

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(3600)]

_REQUESTS = 100_000
_CLIENTS = 32
_BETWEEN_DEATHS_SECONDS = 4.0
#: Each binds long before the storm is over.
_LIMITS: dict[str, dict[str, Any]] = {
    "requests": {"daily_requests": _REQUESTS // 10},
    "concurrency": {"concurrency": 4},
    "tokens": {"monthly_tokens": _REQUESTS * 5},
    "money": {"monthly_budget": f"{_REQUESTS * 2}.00"},
}
#: Prompts whose tokens are more than was learned of prompts before them: the published bound.
_TOKENS_OVER_MAX = 0.01


def test_no_limit_is_passed_through_envoy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Requests and concurrency exactly, as the model server has seen them; tokens and money within the bound; nothing stays held."""
    seed = int(time.time())
    with running(
        tmp_path / "home", "--engine", "fake", "--restarts", "10000", environment={"PEAJE_RATELIMIT_PROCESSES": "3"}
    ) as road:
        callers = _callers(road)
        began = time.monotonic()
        statuses, deaths = _storm(road, callers, seed)
        seconds = time.monotonic() - began
        rows = {name: road.rows(caller, statuses[name][200]) for name, caller in callers.items()}
        left = _left_held(road, callers.values())
        truth = [one for one in road.truth().values() if one["outcome"] != "refused"]
        at_once = _most_at_once(one for one in truth if one["fairness_id"] == callers["concurrency"].tenant_id)
        report = json.dumps(
            {
                "seed": seed, "requests": _REQUESTS, "clients": _CLIENTS, "deaths": deaths, "seconds": round(seconds),
                "left_held": left, "at_once": at_once,
                "tenants": {
                    name: {
                        "limit": _LIMITS[name], "statuses": statuses[name], "rows": len(rows[name]),
                        "tokens": sum(row["input_tokens"] + row["output_tokens"] for row in rows[name]),
                        "output_tokens": sum(row["output_tokens"] for row in rows[name]),
                    }
                    for name in callers
                },
            }
        )  # fmt: skip
    with capsys.disabled():
        print(f"\n{report}")

    assert deaths >= 3, report
    assert {200, 402, 429, 503} >= {status for counted in statuses.values() for status in counted}, report
    assert all(counted[200] and counted[429] + counted[402] for counted in statuses.values()), report
    assert statuses["requests"][200] <= len(rows["requests"]) <= _LIMITS["requests"]["daily_requests"], report
    assert at_once <= _LIMITS["concurrency"]["concurrency"], report
    used = sum(row["input_tokens"] + row["output_tokens"] for row in rows["tokens"])
    assert used <= _LIMITS["tokens"]["monthly_tokens"] * (1 + _TOKENS_OVER_MAX), report
    assert sum(row["output_tokens"] for row in rows["money"]) <= float(_LIMITS["money"]["monthly_budget"]), report
    assert 0 == left, report


def _callers(road: Installation) -> dict[str, Tenant]:
    callers = {name: road.new_tenant(name) for name in _LIMITS}
    # A unit of currency an output token, so that an amount is a number of them.
    price = {"model": "tiny", "input": "0", "output": "1000000", "tenant": callers["money"].tenant_id}
    road.control("POST", "/v1/prices", json=price).raise_for_status()
    for name, caller in callers.items():
        # A store that a busy machine keeps for too long is no reason to count alone: only exact answers count here.
        limits = _LIMITS[name] | {"on_store_error": "deny"}
        road.control("PUT", f"/v1/tenants/{caller.tenant_id}/limits", json=limits).raise_for_status()
    time.sleep(1.0)  # the promise is one second
    return callers


def _storm(road: Installation, callers: dict[str, Tenant], seed: int) -> tuple[dict[str, Counter[int]], int]:
    statuses: dict[str, Counter[int]] = {name: Counter() for name in callers}
    lock, left, over = threading.Lock(), itertools.count(), threading.Event()
    deaths = 0

    def client(_: int) -> None:
        with httpx.Client(timeout=60) as session:
            while (number := next(left)) < _REQUESTS:
                order = random.Random(f"{seed}:{number}")
                name = order.choice(list(callers))
                body = chat("word " * order.randrange(1, 60), max_tokens=order.choice([1, 5, 20]), stream=order.random() < 0.3)
                headers = {"authorization": f"Bearer {callers[name].key}", "x-fake-engine": '{"chunk_ms": 1}'}
                answer = session.post(f"{road.url}/v1/chat/completions", json=body, headers=headers)
                with lock:
                    statuses[name][answer.status_code] += 1

    def killer() -> None:
        nonlocal deaths
        order = random.Random(seed)
        while not over.wait(_BETWEEN_DEATHS_SECONDS * order.uniform(0.5, 1.5)):
            parts = [part["name"] for part in road.status()["parts"] if part["name"].startswith("ratelimit") and part["pid"]]
            if parts:
                road.kill(order.choice(parts))
                deaths += 1

    dying = threading.Thread(target=killer)
    dying.start()
    with ThreadPoolExecutor(_CLIENTS) as pool:
        list(pool.map(client, range(_CLIENTS)))
    over.set()
    dying.join()
    return statuses, deaths


def _left_held(road: Installation, callers: Iterable[Tenant]) -> int:
    """Reservations that are still open once the ledger has had the time to settle what Envoy could not."""
    store = redis.Redis(
        unix_socket_path=str(road.home / "run/valkey.sock"),
        password=(road.home / "secrets/valkey-password").read_text().strip(),
    )
    names, deadline = [caller.tenant_id for caller in callers], time.monotonic() + 2 * SETTLED_SECONDS
    while (left := sum(store.zcard(f"peaje:{{{name}}}:open") for name in names)) and time.monotonic() < deadline:
        time.sleep(1.0)
    return left


def _most_at_once(exchanges: Iterable[dict[str, Any]]) -> int:
    """Of exchanges as the model server has seen them: how many it had under way at the same moment."""
    edges = sorted(
        edge for one in exchanges if one["ended_at"] for edge in ((one["started_at"], 1), (one["ended_at"], -1))
    )
    return max(itertools.accumulate((step for _, step in edges), initial=0))
