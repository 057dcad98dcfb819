# SPDX-License-Identifier: Apache-2.0
"""Unmodified client libraries with a base URL and a key."""

from __future__ import annotations

import anthropic
import httpx
import openai
import pytest

from tests.dataplane.installation import Installation, Tenant, chat

MESSAGES = [{"role": "user", "content": "one two three"}]


@pytest.fixture(params=["road", "dynamo"])
def place(request: pytest.FixtureRequest, express_lane: str) -> Installation:
    """The fake engine and the real one must look the same to a client."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def caller(place: Installation) -> Tenant:
    """A fresh tenant there."""
    return place.new_tenant("client")


@pytest.fixture
def client(place: Installation, caller: Tenant) -> openai.OpenAI:
    """The openai package as anybody uses it."""
    return openai.OpenAI(base_url=f"{place.url}/v1", api_key=caller.key, max_retries=0)


def test_chat_answers_and_is_billed_as_the_client_was_told(
    place: Installation, caller: Tenant, client: openai.OpenAI
) -> None:
    """The usage in the answer is the usage on the bill."""
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=7)

    [row] = place.rows(caller, 1)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (row["input_tokens"], row["output_tokens"])
    assert ("reported", "ok", "openai.chat", "tiny") == (row["basis"], row["outcome"], row["dialect"], row["model"])


def test_a_stream_without_include_usage_shows_no_usage_and_is_billed(
    place: Installation, caller: Tenant, client: openai.OpenAI
) -> None:
    """What the gateway asked of the engine stays between the two."""
    chunks = list(client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=9, stream=True))

    [row] = place.rows(caller, 1)
    assert all(chunk.choices for chunk in chunks)
    assert [None] * len(chunks) == [chunk.usage for chunk in chunks]
    assert (9, "reported") == (row["output_tokens"], row["basis"])


def test_a_stream_with_include_usage_shows_it_once_at_the_end(
    place: Installation, caller: Tenant, client: openai.OpenAI
) -> None:
    """Who asks for the usage frame gets it, and no other."""
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=9, stream=True, stream_options={"include_usage": True}
        )
    )

    [row] = place.rows(caller, 1)
    told = [chunk.usage for chunk in chunks if chunk.usage is not None]
    assert [] == chunks[-1].choices
    assert [(row["input_tokens"], row["output_tokens"])] == [(u.prompt_tokens, u.completion_tokens) for u in told]


def test_completions_streamed_and_not(place: Installation, caller: Tenant, client: openai.OpenAI) -> None:
    """The older dialect has the same meter."""
    whole = client.completions.create(model="tiny", prompt="one two", max_tokens=4)
    streamed = list(client.completions.create(model="tiny", prompt="one two", max_tokens=6, stream=True))

    rows = place.rows(caller, 2)
    assert whole.usage is not None
    assert [4, 6] == [row["output_tokens"] for row in rows]
    assert all(chunk.choices for chunk in streamed)


def test_the_list_of_models_names_what_the_caller_may_use(
    place: Installation, caller: Tenant, client: openai.OpenAI
) -> None:
    """GET /v1/models is answered by the gateway, not by one of the engines."""
    assert ["tiny"] == [model.id for model in client.models.list()]


def test_embeddings_are_billed_by_input(road: Installation) -> None:
    """No output tokens; the prompt counts."""
    caller = road.new_tenant("embed")
    client = openai.OpenAI(base_url=f"{road.url}/v1", api_key=caller.key, max_retries=0)

    answer = client.embeddings.create(model="tiny", input=["one two three", "four"])

    [row] = road.rows(caller, 1)
    assert 2 == len(answer.data)
    assert (4, 0, "reported") == (row["input_tokens"], row["output_tokens"], row["basis"])


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_responses_are_billed(place: Installation, caller: Tenant, client: openai.OpenAI, streamed: bool) -> None:
    """The Responses dialect reports usage unasked, inside its closing event."""
    answer = client.responses.create(model="tiny", input="one two three", max_output_tokens=6, stream=streamed)
    if streamed:
        list(answer)

    [row] = place.rows(caller, 1)
    assert (6, "reported", "openai.responses") == (row["output_tokens"], row["basis"], row["dialect"])


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_anthropic_messages_with_its_own_client(place: Installation, caller: Tenant, streamed: bool) -> None:
    """x-api-key instead of a bearer token; the truth is in the last message_delta."""
    client = anthropic.Anthropic(base_url=place.url, api_key=caller.key, max_retries=0)

    answer = client.messages.create(model="tiny", max_tokens=6, messages=MESSAGES, stream=streamed)
    if streamed:
        list(answer)

    [row] = place.rows(caller, 1)
    assert (6, "reported", "anthropic.messages") == (row["output_tokens"], row["basis"], row["dialect"])


def test_the_model_server_never_sees_the_key(road: Installation, tenant: Tenant) -> None:
    """Credentials end at the gateway; the client's request id does too."""
    answer = road.post(tenant, json=chat(), headers={"x-request-id": "mine"})

    assert "mine" != answer.headers["x-request-id"]
    assert "mine" not in road.truth()
    assert answer.headers["x-request-id"] in road.truth()


def test_health_follows_the_services(road: Installation) -> None:
    """Open to load balancers, without a key, whatever they ask with it."""
    assert [200, 200] == [httpx.get(f"{road.url}{path}").status_code for path in ("/health", "/health?from=balancer")]
