# SPDX-License-Identifier: Apache-2.0
"""Limits of every kind, on the road: real Envoy, real store, real settles."""

from __future__ import annotations

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import redis

from tests.dataplane.installation import VISIBLE_SECONDS, Installation, Tenant, chat

pytestmark = pytest.mark.express("on", "off")

#: What Envoy did not settle is settled from the ledger: after half a minute, what never reached an engine after two.
SETTLED_SECONDS = 180.0


def limited(road: Installation, name: str, **numbers: Any) -> Tenant:
    """A tenant of a test's own with these limits, once they act."""
    caller = road.new_tenant(name)
    answer = road.control("PUT", f"/v1/tenants/{caller.tenant_id}/limits", json=numbers)
    assert answer.status_code == 200, answer.text
    time.sleep(1.0)  # the promise is one second
    return caller


def valkey(road: Installation) -> redis.Redis:
    """The installation's counter store."""
    return redis.Redis(
        unix_socket_path=str(road.home / "run/valkey.sock"),
        password=(road.home / "secrets/valkey-password").read_text().strip(),
    )


def _used(store: redis.Redis, caller: Tenant) -> int:
    """What all quotas and budgets of a tenant have as used."""
    return sum(int(store.hget(key, "used") or 0) for key in store.scan_iter(f"peaje:{{{caller.tenant_id}}}:*", _type="HASH"))


def remaining_tokens(road: Installation, caller: Tenant) -> int:
    """What the next answer says is left, that request's own hold included."""
    return int(road.post(caller, json=chat(max_tokens=1)).headers["x-ratelimit-remaining-tokens"])


def test_what_was_held_is_replaced_by_what_the_engine_counted(road: Installation) -> None:
    """A calendar quota of which too little is left to lend, after three exchanges: used is exactly the sum of their rows."""
    caller = limited(road, "settles", monthly_tokens=20_000)

    before = [road.post(caller, json=chat(max_tokens=900, stream=stream)) for stream in (False, True, False)]
    rows = road.rows(caller, 3)

    assert [200] * 3 == [answer.status_code for answer in before]
    used = sum(row["input_tokens"] + row["output_tokens"] for row in rows)
    assert 0 < used
    deadline = time.monotonic() + VISIBLE_SECONDS
    last = chat(max_tokens=1)
    while True:
        answer = road.post(caller, json=last)
        left = int(answer.headers["x-ratelimit-remaining-tokens"])
        held = -(-len(answer.request.content) * 2 // 5) + 1
        rows = road.rows(caller, 0)
        used = sum(row["input_tokens"] + row["output_tokens"] for row in rows)
        if left >= 20_000 - used - 2 * held or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    assert 20_000 - used - 2 * held <= left <= 20_000 - used


def test_a_concurrency_limit_is_exact_and_gives_back(road: Installation) -> None:
    """Forty at once with room for four: never more than four under way; afterwards four more pass."""
    caller = limited(road, "concurrency", concurrency=4)
    slow = {"chunk_ms": 100}

    def send(_: int) -> int:
        return road.post(caller, json=chat(max_tokens=20, stream=True), fault=slow).status_code

    with ThreadPoolExecutor(40) as pool:
        first = Counter(pool.map(send, range(40)))
    with ThreadPoolExecutor(4) as pool:
        second = Counter(pool.map(send, range(4)))

    assert 4 <= first[200] < 40
    assert 40 == first[200] + first[429]
    assert 4 == second[200]


def test_a_concurrency_refusal_says_when_to_ask_again(road: Installation) -> None:
    """429 in the caller's dialect, with retry-after."""
    caller = limited(road, "none at once", concurrency=1)

    with httpx.stream(
        "POST", f"{road.url}/v1/chat/completions", json=chat(max_tokens=30, stream=True), timeout=60,
        headers={"authorization": f"Bearer {caller.key}", "x-fake-engine": '{"chunk_ms": 100}'},
    ) as under_way:  # fmt: skip
        refused = road.post(caller, json=chat())
        assert 200 == under_way.status_code

    assert (429, "1") == (refused.status_code, refused.headers["retry-after"])
    assert "1 request at once" in refused.json()["error"]["message"]


def test_a_budget_is_spent_to_the_price_and_then_402_in_either_dialect(road: Installation) -> None:
    """A currency unit a token: what is billed never passes the budget; the refusal never reaches the model server."""
    caller = road.new_tenant("broke")
    price = {"model": "tiny", "input": "0", "output": "1000000", "tenant": caller.tenant_id}
    road.control("POST", "/v1/prices", json=price).raise_for_status()
    answer = road.control("PUT", f"/v1/tenants/{caller.tenant_id}/limits", json={"monthly_budget": "20.00"})
    assert answer.status_code == 200, answer.text
    time.sleep(1.0)  # the promise is one second

    answers = []
    while not answers or answers[-1].status_code == 200:
        answers.append(road.post(caller, json=chat(max_tokens=8)))
        rows = road.rows(caller, sum(answer.status_code == 200 for answer in answers))
        time.sleep(0.3)  # until Envoy has said what it used
        assert len(answers) < 20
    refused = answers[-1]
    anthropic = road.post(caller, "/v1/messages", json=chat(max_tokens=8))

    assert [1_000_000_000 * row["output_tokens"] for row in rows] == [row["amount_nano"] for row in rows]
    assert 12 <= sum(row["output_tokens"] for row in rows) <= 20
    assert (402, "insufficient_quota") == (refused.status_code, refused.json()["error"]["code"])
    assert "false" == refused.headers["x-should-retry"]
    assert int(refused.headers["retry-after"]) > 0
    body = anthropic.json()
    assert (402, "error", "billing_error") == (anthropic.status_code, body["type"], body["error"]["type"])
    assert refused.headers["x-request-id"] not in road.truth()


def test_a_hard_quota_holds_the_model_server_to_what_is_left(road: Installation) -> None:
    """The caller names no maximum, or one beyond the quota: the answer ends where the quota does."""
    caller = limited(road, "capped", monthly_tokens=2_000)

    answers = []
    while not answers or answers[-1].status_code == 200:
        answers.append(road.post(caller, json=chat(max_tokens=9_000 if len(answers) % 2 else None)))
        rows = road.rows(caller, sum(answer.status_code == 200 for answer in answers))
        time.sleep(0.3)  # until Envoy has said what it used
        assert len(answers) < 50

    assert 429 == answers[-1].status_code
    assert 0 < sum(row["input_tokens"] + row["output_tokens"] for row in rows) <= 2_000


def test_two_hundred_at_once_with_a_quota_for_one(road: Installation) -> None:
    """One passes; the others are told which quota it was; what one did not use admits no second beyond it."""
    body = chat(max_tokens=100)
    estimate = -(-len(httpx.Request("POST", "http://x", json=body).content) * 2 // 5)
    caller = limited(road, "one", monthly_tokens=estimate + 100)

    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda _: road.post(caller, json=body, fault={"chunk_ms": 100}), range(200)))
    statuses = Counter(answer.status_code for answer in answers)
    rows = road.rows(caller, statuses[200])

    assert 200 == statuses[200] + statuses[429]
    assert 1 <= statuses[200]
    assert sum(row["input_tokens"] + row["output_tokens"] for row in rows) <= estimate + 100
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert "per UTC month" in refused.json()["error"]["message"]
    assert int(refused.headers["retry-after"]) > 0


def test_two_hundred_at_once_with_money_for_one(road: Installation) -> None:
    """Of whatever passes, the sum of the bills is within the budget; all others are told that it is money they lack."""
    caller = road.new_tenant("last money")
    price = {"model": "tiny", "input": "0", "output": "1000000", "tenant": caller.tenant_id}
    road.control("POST", "/v1/prices", json=price).raise_for_status()
    road.control("PUT", f"/v1/tenants/{caller.tenant_id}/limits", json={"monthly_budget": "20.00"}).raise_for_status()
    time.sleep(1.0)  # the promise is one second

    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda _: road.post(caller, json=chat(max_tokens=20), fault={"chunk_ms": 300}), range(200)))
    statuses = Counter(answer.status_code for answer in answers)
    rows = road.rows(caller, statuses[200])

    assert 200 == statuses[200] + statuses[402]
    assert 1 <= statuses[200] == len(rows)
    assert 0 < sum(row["amount_nano"] for row in rows) <= 20_000_000_000
    assert {"insufficient_quota"} == {answer.json()["error"]["code"] for answer in answers if answer.status_code == 402}


def test_tiers_are_charged_whole_and_a_budget_holds_the_dearer_one(road: Installation) -> None:
    """
    Short and long prompts at once, some with reasoning that is dearer still, all within the bytes that reach the tier.

    The bills are each row's own and their sum fits; what the budget has as used in the end is that sum.
    """
    caller = road.new_tenant("tiers")
    road.cli(
        "prices", "set", "--model", "tiny", "--input", "1000", "--output", "1000", "--reasoning", "2000", "--tier", "10:input=8000,output=8000,reasoning=20000",
        "--tenant", caller.tenant_id,
    )  # fmt: skip
    # One currency unit is a thousand tokens at the card's own price.
    budget, token = 3_000_000_000, 1_000_000
    answer = road.control("PUT", f"/v1/tenants/{caller.tenant_id}/limits", json={"monthly_budget": "3.00"})
    assert answer.status_code == 200, answer.text
    time.sleep(1.0)  # the promise is one second

    def send(number: int) -> int:
        words = "toll " * (40 if number % 2 else 2)
        return road.post(caller, json=chat(words, max_tokens=8), fault={"chunk_ms": 20, "reasoning": 6 * (number % 3 == 0)}).status_code

    with ThreadPoolExecutor(16) as pool:
        statuses = Counter(pool.map(send, range(96)))
    rows = road.rows(caller, statuses[200])

    assert 96 == statuses[200] + statuses[402]
    assert {None, 10} == {row["tier_above_tokens"] for row in rows}
    for row in rows:
        is_long = row["input_tokens"] > 10
        assert (10 if is_long else None) == row["tier_above_tokens"]
        plain = row["input_tokens"] + row["output_tokens"] - row["reasoning_tokens"]
        assert token * (plain * 8 + row["reasoning_tokens"] * 20 if is_long else plain + row["reasoning_tokens"] * 2) == row["amount_nano"]
    assert {0, 6} == {row["reasoning_tokens"] for row in rows}
    spent = sum(row["amount_nano"] for row in rows)
    assert 0 < spent <= budget
    store = valkey(road)
    deadline = time.monotonic() + SETTLED_SECONDS
    while spent != (used := _used(store, caller)) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert spent == used


def test_a_shadow_limit_refuses_nobody(road: Installation) -> None:
    """It is written to the log instead."""
    caller = limited(road, "shadow", requests_per_minute=1, effect="shadow")

    statuses = [road.post(caller, json=chat()).status_code for _ in range(3)]

    assert [200] * 3 == statuses
    assert f'"tenant": "{caller.tenant_id}"'.replace(" ", "") in (road.home / "log/ratelimit.log").read_text().replace(" ", "")


@pytest.mark.express  # who is held to a number at once is always asked about
def test_a_killed_ratelimit_loses_no_limit_and_leaves_nothing_held(road: Installation) -> None:
    """Killed twice under load: never more than the limit, and what was not settled is, from the ledger."""
    caller = limited(road, "killed", daily_requests=60, concurrency=20, monthly_tokens=10_000_000)
    store = valkey(road)

    killed: list[int] = []

    def send(number: int) -> int:
        if number in (40, 100):
            killed.append(road.kill("ratelimit"))
        return road.post(caller, json=chat(max_tokens=5)).status_code

    with ThreadPoolExecutor(16) as pool:
        statuses = Counter(pool.map(send, range(160)))
    road.wait_restarted("ratelimit", killed[-1])
    rows = road.rows(caller, statuses[200])

    assert 0 < statuses[200] <= 60
    assert {200, 429, 503} >= set(statuses)
    assert statuses[200] <= len(rows) <= 60
    deadline = time.monotonic() + SETTLED_SECONDS
    open_key = f"peaje:{{{caller.tenant_id}}}:open"
    while store.zcard(open_key) and time.monotonic() < deadline:
        time.sleep(1.0)
    assert 0 == store.zcard(open_key)
    used = [
        int(store.hget(key, "used") or 0)
        for key in store.scan_iter(f"peaje:{{{caller.tenant_id}}}:*", _type="HASH")
    ]
    assert sorted([len(rows), sum(row["input_tokens"] + row["output_tokens"] for row in rows)]) == sorted(used)
