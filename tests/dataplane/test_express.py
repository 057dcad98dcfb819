# SPDX-License-Identifier: Apache-2.0
"""The express lane: nobody is asked, and nothing else is different."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import redis

from chassis.contract import EXPRESS_ENVIRONMENT
from tests.dataplane.installation import Installation, Tenant, chat
from tests.dataplane.test_limits import SETTLED_SECONDS, valkey

#: What extauth lets Envoy remember at the most.
REMEMBERED_SECONDS = 5.0
#: The written bound of a change on every path.
BOUND_SECONDS = 1.0


@pytest.fixture
def session(tenant: Tenant) -> Iterator[httpx.Client]:
    """One connection, so one of Envoy's workers, that remembers this key."""
    with httpx.Client(headers={"authorization": f"Bearer {tenant.key}"}, timeout=30) as client:
        yield client


def calls(road: Installation, cluster: str) -> int:
    """How many calls a service has had."""
    return road.stat(f"cluster.{cluster}.upstream_rq_total")


def post(session: httpx.Client, road: Installation, **fields: object) -> httpx.Response:
    """One chat request."""
    return session.post(f"{road.url}/v1/chat/completions", json=chat(**fields))


def settle_news(session: httpx.Client, road: Installation) -> int:
    """Post until a request has asked nobody; how often that was. With the lane off each one asks: once."""
    if os.environ.get(EXPRESS_ENVIRONMENT) == "off":
        post(session, road)
        return 1
    for posted in range(1, 51):
        before = road.asked_extauth()
        post(session, road)
        if road.asked_extauth() == before:
            return posted
        time.sleep(0.1)
    pytest.fail("every request is asked about")


@pytest.mark.express("on")
def test_a_caller_without_limits_is_asked_about_once(road: Installation, tenant: Tenant, session: httpx.Client) -> None:
    """Twenty requests of every kind, hardly a question, twenty rows with the engine's own numbers."""
    before, started = road.asked_extauth(), time.monotonic()

    answers = [post(session, road, stream=number % 2 == 0, max_tokens=3 + number) for number in range(20)]

    # Once, and again: when what is remembered is over, when the news of the new key and tenant are
    # said, and when they are said the second time.
    questions = road.asked_extauth() - before
    assert 1 <= questions <= 4 + (time.monotonic() - started) // REMEMBERED_SECONDS
    assert {200} == {answer.status_code for answer in answers}
    rows = {row["request_id"]: row for row in road.rows(tenant, 20)}
    truth = road.truth()
    for number, answer in enumerate(answers):
        row = rows[answer.headers["x-request-id"]]
        assert (3 + number, "reported", tenant.key_id) == (row["output_tokens"], row["basis"], row["key_id"])
        assert truth[row["request_id"]]["prompt_tokens"] == row["input_tokens"]
        assert '"usage":{' not in answer.text or number % 2 == 1


@pytest.mark.express("off")
def test_without_the_lane_every_request_is_asked_about(road: Installation, tenant: Tenant, session: httpx.Client) -> None:
    """The switch switches: nobody is remembered, and each request has its row."""
    before = road.asked_extauth()

    answers = [post(session, road) for _ in range(6)]

    assert [200] * 6 == [answer.status_code for answer in answers]
    assert before + 6 == road.asked_extauth()
    assert {answer.headers["x-request-id"] for answer in answers} == {row["request_id"] for row in road.rows(tenant, 6)}


def test_a_stream_that_the_caller_cuts_is_billed_to_what_was_delivered(
    road: Installation, tenant: Tenant, session: httpx.Client
) -> None:
    """As on the way with questions."""
    posted = settle_news(session, road)
    headers = {"x-fake-engine": '{"chunk_ms": 20}'}
    seen = 0
    with session.stream(
        "POST", f"{road.url}/v1/chat/completions", json=chat(stream=True, max_tokens=500), headers=headers
    ) as answer:
        for line in answer.iter_lines():
            seen += '"content":" ' in line
            if seen == 7:
                break

    row = next(r for r in road.rows(tenant, posted + 1) if r["request_id"] == answer.headers["x-request-id"])
    assert ("client_closed", "running") == (row["outcome"], row["basis"])
    assert 7 <= row["output_tokens"] < 500


def test_another_spelling_of_the_credential_is_asked_about(road: Installation, session: httpx.Client, tenant: Tenant) -> None:
    """What was remembered of one header's exact text says nothing about another's."""
    settle_news(session, road)
    before = road.asked_extauth()

    wrong = tenant.key[:-1] + ("A" if tenant.key[-1] != "A" else "B")
    answers = [
        session.post(f"{road.url}/v1/chat/completions", json=chat(), headers={"authorization": f"Bearer {wrong}"}),
        session.post(f"{road.url}/v1/chat/completions", json=chat(), headers={"x-api-key": wrong}),
        session.post(f"{road.url}/v1/chat/completions", json=chat() | {"model": "other"}),
        httpx.post(f"{road.url}/v1/chat/completions", json=chat(), headers=[
            ("authorization", f"Bearer {tenant.key}"), ("authorization", f"Bearer {wrong}"),
        ]),
    ]  # fmt: skip

    assert [401, 400, 404, 401] == [answer.status_code for answer in answers]
    assert before + 4 == road.asked_extauth()


@pytest.mark.parametrize("change", ["revoked", "suspended"])
def test_a_change_ends_what_is_remembered(road: Installation, tenant: Tenant, session: httpx.Client, change: str) -> None:
    """Within the bound, on a connection whose worker has just let the key pass."""
    settle_news(session, road)

    if change == "revoked":
        road.control("POST", f"/v1/keys/{tenant.key_id}/revoke").raise_for_status()
    else:
        road.control("PATCH", f"/v1/tenants/{tenant.tenant_id}", json={"state": "suspended"}).raise_for_status()
    until = time.monotonic() + BOUND_SECONDS
    while time.monotonic() < until:
        post(session, road)

    answer = post(session, road)
    assert (401, 403)[change == "suspended"] == answer.status_code


def test_a_limit_that_is_set_binds_a_caller_who_had_none(road: Installation, tenant: Tenant, session: httpx.Client) -> None:
    """Within the bound it counts; what passed before is not counted against it."""
    settle_news(session, road)

    road.set_limits(tenant.tenant_id, rpm=2)
    time.sleep(BOUND_SECONDS)

    assert [200, 200, 429] == [post(session, road).status_code for _ in range(3)]


@pytest.mark.express("on")
def test_a_caller_far_from_its_limits_is_lent_to(road: Installation, tenant: Tenant, session: httpx.Client) -> None:
    """A hundred requests, few questions; the headers count down, and the ledger has every token."""
    road.set_limits(tenant.tenant_id, rpm=10_000, tpm=1_000_000)
    settle_news(session, road)
    before = calls(road, "ratelimit")

    answers = [post(session, road, stream=number % 2 == 0) for number in range(100)]

    assert {200} == {answer.status_code for answer in answers}
    # A lease that was spent asks for twice as much: 2, 4, 8 ... Each question settles too, and what
    # is remembered ends after five seconds.
    assert calls(road, "ratelimit") - before < 60
    left = [int(answer.headers["x-ratelimit-remaining-requests"]) for answer in answers]
    assert {"10000"} == {answer.headers["x-ratelimit-limit-requests"] for answer in answers}
    assert all(9_000 < requests < 10_000 for requests in left)
    assert all("x-ratelimit-remaining-tokens" in answer.headers for answer in answers)
    assert {answer.headers["x-request-id"] for answer in answers} <= {row["request_id"] for row in road.rows(tenant, 101)}


@pytest.mark.express("on")
@pytest.mark.parametrize(
    "limits", [{"requests_per_minute": 10_000}, {"tokens_per_minute": 1_000_000}, {"monthly_budget": "100000.00"}, {"monthly_requests": 10**6}]
)
def test_whatever_a_caller_is_limited_by_each_answer_is_read(road: Installation, limits: dict[str, int | str]) -> None:
    """Of limits that are told in other headers, or in none, the answer that brings a lease is metered as any other."""
    caller = road.new_tenant("one-limit")
    road.control("PUT", f"/v1/tenants/{caller.tenant_id}/limits", json=limits).raise_for_status()
    time.sleep(1.0)  # the promise is one second

    with httpx.Client(headers={"authorization": f"Bearer {caller.key}"}, timeout=30) as client:
        statuses = {post(client, road, stream=number % 3 == 2).status_code for number in range(12)}

    assert {200} == statuses
    assert {"reported"} == {row["basis"] for row in road.rows(caller, 12)}
    assert "express" not in "".join(line for line in (road.home / "log/envoy.log").read_text().splitlines() if "[lua]" in line)


@pytest.mark.express("on")
def test_a_caller_far_from_its_budgets_is_lent_to_and_the_ledger_repays(road: Installation, tenant: Tenant) -> None:
    """A month's requests, tokens and money: few questions, and in the end each has used what the rows say, to the nano-unit."""
    road.control(
        "POST", "/v1/prices", json={"model": "tiny", "input": "3", "output": "7", "tenant": tenant.tenant_id}
    ).raise_for_status()
    limits = {"monthly_requests": 10**6, "monthly_tokens": 10**9, "monthly_budget": "100000.00"}
    road.control("PUT", f"/v1/tenants/{tenant.tenant_id}/limits", json=limits).raise_for_status()
    time.sleep(1.0)  # the promise is one second
    with httpx.Client(headers={"authorization": f"Bearer {tenant.key}"}, timeout=30) as client:
        posted = settle_news(client, road)
        before = calls(road, "ratelimit")
        answers = [post(client, road, max_tokens=None if number % 2 else 9, stream=number % 3 == 0) for number in range(90)]

        assert {200} == {answer.status_code for answer in answers}
        assert calls(road, "ratelimit") - before < 60
        held = [int(answer.headers["x-ratelimit-remaining-tokens"]) for answer in answers]
        assert all(10**9 // 2 < left < 10**9 for left in held)
        # One that leaves in the middle is billed what it was given, and so much is used.
        with client.stream("POST", f"{road.url}/v1/chat/completions", json=chat(stream=True, max_tokens=50)) as cut:
            next(cut.iter_bytes())
    rows = road.rows(tenant, posted + 91)
    assert posted + 91 == len(rows)
    expected = sorted([len(rows), sum(it["input_tokens"] + it["output_tokens"] for it in rows), sum(it["amount_nano"] for it in rows)])

    store = valkey(road)
    deadline = time.monotonic() + SETTLED_SECONDS
    # A lease that was asked for ahead and never spent is repaid later than those that were.
    settled = [expected, [0, 0, 0], [0, 0, 0]]
    while settled != (levels := [_levels(store, tenant, field) for field in ("used", "held", "lent")]) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert settled == levels


def _levels(store: redis.Redis, caller: Tenant, field: str) -> list[int]:
    """That field of each quota and budget of a tenant, in order of size."""
    names = [name for name in store.scan_iter(f"peaje:{{{caller.tenant_id}}}:*", _type="HASH") if store.hexists(name, "used")]
    return sorted(int(store.hget(name, field) or 0) for name in names)


def test_leases_of_several_workers_never_overdraw_a_limit(road: Installation, tenant: Tenant) -> None:
    """Sixteen connections at once, more requests than the limit has: what passes is the limit and what drained meanwhile."""
    limit = 300
    road.set_limits(tenant.tenant_id, rpm=limit)
    headers = {"authorization": f"Bearer {tenant.key}"}
    started = time.monotonic()

    def send(_: int) -> list[int]:
        with httpx.Client(headers=headers, timeout=30) as client:
            return [post(client, road).status_code for _ in range(30)]

    with ThreadPoolExecutor(16) as pool:
        statuses = Counter(status for found in pool.map(send, range(16)) for status in found)

    drained = (time.monotonic() - started) * limit / 60
    assert {200, 429} == set(statuses)
    assert statuses[200] <= limit + drained
    # Unspent leases are the only thing that others miss: at most half of the bucket, in practice far less.
    assert statuses[200] >= limit / 2


@pytest.mark.express("on")
def test_who_is_near_a_limit_is_recognised_and_decided_exactly(road: Installation, tenant: Tenant, session: httpx.Client) -> None:
    """Extauth is asked about once, ratelimit each time, and the limit holds to the request."""
    road.set_limits(tenant.tenant_id, rpm=10)
    answers = [post(session, road)]
    before = road.asked_extauth()

    answers += [post(session, road) for _ in range(11)]

    assert road.asked_extauth() - before <= 3
    assert [200] * 10 + [429] * 2 == [answer.status_code for answer in answers]


def test_the_credential_is_nowhere_in_the_journal(road: Installation, tenant: Tenant, session: httpx.Client) -> None:
    """The worker's memory holds it; nothing that it writes does."""
    road.rows(tenant, settle_news(session, road))

    assert all(tenant.key not in path.read_text() for path in (road.home / "journal").iterdir())
