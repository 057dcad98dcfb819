# SPDX-License-Identifier: Apache-2.0
"""The express lane: nobody is asked, and nothing else is different."""

from __future__ import annotations

import time
from collections.abc import Iterator

import httpx
import pytest

from tests.dataplane.installation import Installation, Tenant, chat

#: What extauth lets Envoy remember at the most.
REMEMBERED_SECONDS = 5.0
#: The written bound of a change on every path.
BOUND_SECONDS = 1.0


@pytest.fixture
def session(tenant: Tenant) -> Iterator[httpx.Client]:
    """One connection, so one of Envoy's workers, that remembers this key."""
    with httpx.Client(headers={"authorization": f"Bearer {tenant.key}"}, timeout=30) as client:
        yield client


def post(session: httpx.Client, road: Installation, **fields: object) -> httpx.Response:
    """One chat request."""
    return session.post(f"{road.url}/v1/chat/completions", json=chat(**fields))


def settle_news(session: httpx.Client, road: Installation) -> int:
    """Post until a request has asked nobody; how often that was."""
    for posted in range(1, 51):
        before = road.asked_extauth()
        post(session, road)
        if road.asked_extauth() == before:
            return posted
        time.sleep(0.1)
    pytest.fail("every request is asked about")


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


def test_the_credential_is_nowhere_in_the_journal(road: Installation, tenant: Tenant, session: httpx.Client) -> None:
    """The worker's memory holds it; nothing that it writes does."""
    settle_news(session, road)
    road.rows(tenant, 2)

    assert all(tenant.key not in path.read_text() for path in (road.home / "journal").iterdir())
