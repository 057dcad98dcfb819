# SPDX-License-Identifier: Apache-2.0
"""A stream ends where its hard budget ends: in the caller's dialect, billed for what was delivered."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anthropic
import httpx
import openai
import pytest
import redis

from ratelimit.adapters.counters import StoredCounters
from tests.dataplane.installation import VISIBLE_SECONDS, Installation, Tenant, chat

pytestmark = pytest.mark.express("on", "off")

MESSAGES = [{"role": "user", "content": "one two three"}]


@pytest.fixture(scope="module")
def limited(road: Installation) -> Any:
    """Tenants with a monthly number of tokens that acts."""

    def make(name: str, tokens: int) -> Tenant:
        caller = road.new_tenant(name)
        answer = road.control("PUT", f"/v1/tenants/{caller.tenant_id}/limits", json={"monthly_tokens": tokens})
        assert answer.status_code == 200, answer.text
        time.sleep(1.0)  # the promise is one second
        return caller

    return make


#: A model server that has not said everything before it can be stopped.
SLOW = {"x-fake-engine": '{"chunk_ms": 2}'}


def counters_of(road: Installation) -> redis.Redis:
    """The installation's counter store."""
    return redis.Redis(
        unix_socket_path=str(road.home / "run/valkey.sock"),
        password=(road.home / "secrets/valkey-password").read_text().strip(),
    )


def held_and_open(road: Installation, caller: Tenant) -> tuple[int, int]:
    """What the store holds for the caller, once nothing is under way (or the time for it is over)."""
    store = counters_of(road)
    deadline = time.monotonic() + VISIBLE_SECONDS
    while True:
        found = sum(int(store.hget(key, "held") or 0) for key in store.scan_iter(f"peaje:{{{caller.tenant_id}}}:*", _type="HASH"))
        under_way = store.zcard(f"peaje:{{{caller.tenant_id}}}:open")
        if (found, under_way) == (0, 0) or time.monotonic() > deadline:
            return found, under_way
        time.sleep(0.1)


def test_a_chat_stream_ends_as_length_with_a_code_and_is_billed_to_the_token(road: Installation, limited: Any) -> None:
    """The openai package sees an answer that was cut, and why; the bill is what was delivered; nothing stays held."""
    caller = limited("cut", 200)
    client = openai.OpenAI(base_url=f"{road.url}/v1", api_key=caller.key, max_retries=0)

    chunks = list(client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=1000, stream=True, extra_headers=SLOW))

    [row] = road.rows(caller, 1)
    assert "length" == chunks[-1].choices[0].finish_reason
    assert "insufficient_quota" == chunks[-1].model_extra["peaje"]["code"]
    assert [None] * len(chunks) == [chunk.usage for chunk in chunks]
    delivered = sum(bool(chunk.choices[0].delta.content) for chunk in chunks)
    assert (delivered, "budget_exhausted", "running", 200) == (row["output_tokens"], row["outcome"], row["basis"], row["status"])
    assert 200 == row["input_tokens"] + row["output_tokens"]
    assert (0, 0) == held_and_open(road, caller)
    assert "used up" in road.cli("explain", row["request_id"])["explanation"]
    assert road.truth()[row["request_id"]]["completion_tokens"] < 1000


def test_a_stream_that_nobody_can_weigh_does_not_pass(road: Installation, limited: Any) -> None:
    """An engine that encodes its answer unasked: the client is told in plain events, and no token of it is delivered or billed."""
    caller = limited("encoded", 200)

    answer = road.post(caller, json=chat("one two three", max_tokens=1000, stream=True), fault={"mislabel": True})

    [row] = road.rows(caller, 1)
    assert "content-encoding" not in answer.headers
    assert '"content":" ' not in answer.text
    assert "upstream_unavailable" in answer.text
    assert answer.text.endswith("data: [DONE]\n\n")
    assert (0, "counted") == (row["output_tokens"], row["basis"])
    assert (0, 0) == held_and_open(road, caller)


def test_completions_and_responses_end_in_their_own_way(road: Installation, limited: Any) -> None:
    """A last choice of no text; a response that is incomplete."""
    caller = limited("cut others", 200)
    client = openai.OpenAI(base_url=f"{road.url}/v1", api_key=caller.key, max_retries=0)

    chunks = list(client.completions.create(model="tiny", prompt="one two", max_tokens=500, stream=True))
    road.rows(caller, 1)
    assert (0, 0) == held_and_open(road, caller)
    other = limited("cut responses", 150)
    client = openai.OpenAI(base_url=f"{road.url}/v1", api_key=other.key, max_retries=0)
    events = list(client.responses.create(model="tiny", input="one two three", max_output_tokens=500, stream=True))

    assert "length" == chunks[-1].choices[0].finish_reason
    [row] = road.rows(caller, 1)
    assert 200 == row["input_tokens"] + row["output_tokens"]
    assert "response.incomplete" == events[-1].type
    assert "max_output_tokens" == events[-1].response.incomplete_details.reason
    assert "insufficient_quota" == events[-1].response.model_extra["peaje"]["code"]
    [row] = road.rows(other, 1)
    assert ("budget_exhausted", "counted") == (row["outcome"], row["basis"])
    assert sum(event.type == "response.output_text.delta" for event in events) == row["output_tokens"]
    assert row["input_tokens"] + row["output_tokens"] <= 150


def test_a_message_stream_ends_with_its_stop_and_is_billed(road: Installation, limited: Any) -> None:
    """The anthropic package closes the message by itself: max_tokens, and the code beside it."""
    caller = limited("cut message", 150)
    client = anthropic.Anthropic(base_url=road.url, api_key=caller.key, max_retries=0)

    events = list(client.messages.create(model="tiny", max_tokens=1000, messages=MESSAGES, stream=True))
    with limited_stream(road, limited("cut message helper", 150)) as stream:
        message = stream.get_final_message()

    [row] = road.rows(caller, 1)
    delta = events[-2]
    assert ["content_block_stop", "message_delta", "message_stop"] == [event.type for event in events[-3:]]
    assert "max_tokens" == delta.delta.stop_reason
    assert "insufficient_quota" == delta.model_extra["peaje"]["code"]
    assert sum(event.type == "content_block_delta" for event in events) == row["output_tokens"] == delta.usage.output_tokens
    assert "budget_exhausted" == row["outcome"]
    assert row["input_tokens"] + row["output_tokens"] <= 150
    assert ("max_tokens", 1) == (message.stop_reason, len(message.content))
    assert (0, 0) == held_and_open(road, caller)


def limited_stream(road: Installation, caller: Tenant) -> Any:
    """The anthropic package's own stream helper, which puts the message together."""
    client = anthropic.Anthropic(base_url=road.url, api_key=caller.key, max_retries=0)
    return client.messages.stream(model="tiny", max_tokens=1000, messages=MESSAGES)


def test_streams_that_share_the_last_tokens_never_deliver_more_than_there_are(road: Installation, limited: Any) -> None:
    """A dozen at once, each asking for more than there is: what all of them were given is the quota, to the token."""
    caller = limited("share", 1500)
    client = openai.OpenAI(base_url=f"{road.url}/v1", api_key=caller.key, max_retries=0)

    def read(_: int) -> int:
        try:
            chunks = list(
                client.chat.completions.create(
                    model="tiny", messages=MESSAGES, max_tokens=1600, stream=True, extra_headers=SLOW
                )
            )
        except openai.RateLimitError:
            return 0
        assert "length" == chunks[-1].choices[0].finish_reason
        return sum(bool(chunk.choices[0].delta.content) for chunk in chunks)

    with ThreadPoolExecutor(12) as pool:
        delivered = list(pool.map(read, range(12)))
    rows = road.rows(caller, sum(count > 0 for count in delivered))

    assert sorted(count for count in delivered if count) == sorted(row["output_tokens"] for row in rows)
    assert len(rows) > 1
    used = sum(row["input_tokens"] + row["output_tokens"] for row in rows)
    assert 1400 <= used <= 1500
    assert (0, 0) == held_and_open(road, caller)


def test_a_money_budget_ends_a_stream_where_it_is_spent(road: Installation) -> None:
    """A currency unit a token; what is billed is the budget or a token less."""
    caller = road.new_tenant("spent")
    price = {"model": "tiny", "input": "0", "output": "1000000", "tenant": caller.tenant_id}
    road.control("POST", "/v1/prices", json=price).raise_for_status()
    road.control("PUT", f"/v1/tenants/{caller.tenant_id}/limits", json={"monthly_budget": "40.00"}).raise_for_status()
    time.sleep(1.0)  # the promise is one second

    answer = road.post(caller, json=chat(max_tokens=300, stream=True))
    [row] = road.rows(caller, 1)

    assert answer.text.endswith("data: [DONE]\n\n")
    assert (40, 40_000_000_000, "budget_exhausted") == (row["output_tokens"], row["amount_nano"], row["outcome"])


def test_who_asked_for_usage_is_told_what_was_delivered(road: Installation, limited: Any) -> None:
    """The last chunk before the terminator has the counts that are billed."""
    caller = limited("told", 200)
    client = openai.OpenAI(base_url=f"{road.url}/v1", api_key=caller.key, max_retries=0)

    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=1000, stream=True, stream_options={"include_usage": True}
        )
    )

    [row] = road.rows(caller, 1)
    assert (row["input_tokens"], row["output_tokens"]) == (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens)


def test_options_that_only_metering_can_merge_end_a_stream_the_same_way(road: Installation, limited: Any) -> None:
    """Both of what metering is asked for, in one call: the body is shaped, and the stream ends where its quota does."""
    caller = limited("both", 200)
    client = openai.OpenAI(base_url=f"{road.url}/v1", api_key=caller.key, max_retries=0)
    options = {"stream_options": {"include_usage": False, "chunk_size": 1}}

    chunks = list(client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=1000, stream=True, extra_body=options))

    [row] = road.rows(caller, 1)
    assert "insufficient_quota" == chunks[-1].model_extra["peaje"]["code"]
    assert [None] * len(chunks) == [chunk.usage for chunk in chunks]
    assert ("budget_exhausted", "running", 200) == (row["outcome"], row["basis"], row["input_tokens"] + row["output_tokens"])
    assert road.truth()[row["request_id"]]["completion_tokens"] < 1000


def test_a_stream_that_ends_by_itself_or_is_left_is_none_of_this(road: Installation, limited: Any) -> None:
    """Held in slices near the limit, and read to its own end or left: billed as ever, nothing stays held."""
    caller, leaves = limited("near", 120), limited("leaves", 700)

    whole = road.post(caller, json=chat(max_tokens=90, stream=True))
    with httpx.stream(
        "POST", f"{road.url}/v1/chat/completions", json=chat(max_tokens=690, stream=True), timeout=60,
        headers={"authorization": f"Bearer {leaves.key}", "x-fake-engine": '{"chunk_ms": 20}'},
    ) as left:  # fmt: skip
        lines = left.iter_lines()
        for _ in range(10):
            next(lines)
    rows = [*road.rows(caller, 1), *road.rows(leaves, 1)]

    assert whole.text.endswith("data: [DONE]\n\n")
    assert [("ok", 90, "reported"), ("client_closed", "running")] == [
        (rows[0]["outcome"], rows[0]["output_tokens"], rows[0]["basis"]), (rows[1]["outcome"], rows[1]["basis"]),
    ]  # fmt: skip
    assert [(0, 0)] * 2 == [held_and_open(road, one) for one in (caller, leaves)]


def test_a_ratelimit_that_is_restarted_ends_no_stream(road: Installation, limited: Any) -> None:
    """A stream that needs its next slice in that moment waits for it."""
    caller = limited("patient", 1200)
    old: list[int] = []

    with httpx.stream(
        "POST", f"{road.url}/v1/chat/completions", json=chat(max_tokens=1180, stream=True), timeout=120,
        headers={"authorization": f"Bearer {caller.key}", "x-fake-engine": '{"chunk_ms": 5}'},
    ) as stream:  # fmt: skip
        assert 200 == stream.status_code
        text = ""
        for piece in stream.iter_text():
            text += piece
            if not old and text.count("data:") > 100:
                made_for = StoredCounters(counters_of(road)).epochs(caller.tenant_id, [stream.headers["x-request-id"]])
                old.append(road.kill("ratelimit"))
    road.wait_restarted("ratelimit", old[0])

    [row] = road.rows(caller, 1)
    assert text.endswith("data: [DONE]\n\n")
    assert row["output_tokens"] > 1000
    # Envoy said whose journal tells of it.
    assert [{"journal": "local"}] == road.sql("select distinct journal from journal_stream where epoch = %s", made_for[row["request_id"]])
    assert row["input_tokens"] + row["output_tokens"] <= 1200


def test_a_real_engine_s_streams_end_the_same_way(dynamo: Installation) -> None:
    """Dynamo's own events, chat and messages: cut, billed, and not a token more than there is."""
    outcomes = []
    for path in ("/v1/chat/completions", "/v1/messages"):
        caller = dynamo.new_tenant("cut")
        dynamo.control("PUT", f"/v1/tenants/{caller.tenant_id}/limits", json={"monthly_tokens": 500}).raise_for_status()
        time.sleep(1.0)  # the promise is one second
        answer = dynamo.post(caller, path, json=chat(max_tokens=2000, stream=True))
        [row] = dynamo.rows(caller, 1)
        outcomes.append((answer.status_code, "insufficient_quota" in answer.text, row["outcome"]))
        assert 0 < row["output_tokens"]
        assert row["input_tokens"] + row["output_tokens"] <= 500

    assert [(200, True, "budget_exhausted")] * 2 == outcomes
