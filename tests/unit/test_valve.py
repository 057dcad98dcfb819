# SPDX-License-Identifier: Apache-2.0
"""The valve: what passes, what is weighed, and how a stream ends that may not go on."""

from __future__ import annotations

import json
from typing import Any

import pytest

from metering.core import valve as module
from metering.core.valve import EVENT_BYTES_MAX, Stop, Valve
from tests.conformance.streams import PROMPT_TOKENS, documents, events, stream
from tests.fake_engine.asks import Path
from tests.fake_engine.faults import Faults
from tests.fake_engine.kinds import KINDS

DIALECTS = {
    Path.CHAT: "openai.chat", Path.COMPLETIONS: "openai.completions", Path.RESPONSES: "openai.responses",
    Path.MESSAGES: "anthropic.messages",
}  # fmt: skip
STOP = Stop(code="insufficient_quota", message="Used up.")


def made(path: str, *, held: int, choices: int = 1) -> Valve:
    """A valve whose prompt is held at what it is."""
    return Valve(dialect=DIALECTS[path], choices=choices, held_input=PROMPT_TOKENS, held=held)


def through(valve: Valve, body: bytes, *, size: int) -> tuple[bytes, bool]:
    """What comes out of *body* in pieces of *size* bytes, and whether all of it did."""
    passed = b""
    for start in range(0, len(body), size):
        for event in valve.events(body[start : start + size]):
            weighed = valve.weigh(event)
            if not valve.passes(weighed) and weighed.generates:
                return passed + valve.ending(STOP), False
            passed += valve.let(weighed)
    return passed + b"".join(valve.let(valve.weigh(event)) for event in valve.rest()), True


@pytest.mark.parametrize("faults", [Faults(), Faults(crlf=True), Faults(crlf="cr"), Faults(comments=True), Faults(multiline=True)], ids=["lf", "crlf", "cr", "comments", "multiline"])
@pytest.mark.parametrize("size", [1, 7, 10_000])
@pytest.mark.parametrize("path", DIALECTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_that_is_held_whole_passes_byte_by_byte_as_it_came(kind: str, path: str, size: int, faults: Faults) -> None:
    """Nothing is changed, however it is cut into pieces; the sum is the engine's."""
    answer = stream(kind, path, usage="running", tokens=9, faults=faults)
    valve = made(path, held=100)

    passed, is_whole = through(valve, answer.body, size=size)

    assert (answer.body, True) == (passed, is_whole)
    assert 9 == valve.delivered


@pytest.mark.parametrize("usage", ["running", "final"])
@pytest.mark.parametrize("path", DIALECTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_ends_before_what_is_not_held(kind: str, path: str, usage: str) -> None:
    """With running usage to the token; without, never later."""
    answer = stream(kind, path, usage=usage, tokens=30)
    valve = made(path, held=10)

    passed, is_whole = through(valve, answer.body, size=50)

    content = [document for document in documents(passed) if module._generated_bytes(document)]
    assert not is_whole
    assert len(content) == valve.delivered <= valve.held
    assert valve.weight <= 10
    if valve.is_reported:
        assert 10 == valve.delivered


def test_the_ends_of_all_dialects() -> None:
    """What was begun is closed, the code is told, the counts are those of what was delivered."""
    ends = {}
    for path in DIALECTS:
        valve = made(path, held=6)
        passed, _ = through(valve, stream("dynamo", path, usage="running", tokens=30).body, size=64)
        ends[path] = passed, valve.delivered
    told = {"code": "insufficient_quota", "message": "Used up."}

    for path in (Path.CHAT, Path.COMPLETIONS):
        body, delivered = ends[path]
        finish, usage = documents(body)[-2:]
        assert ("[DONE]", ["length"], told) == (events(body)[-1][1], [c["finish_reason"] for c in finish["choices"]], finish["peaje"])
        assert ([], PROMPT_TOKENS, delivered) == (usage["choices"], usage["usage"]["prompt_tokens"], usage["usage"]["completion_tokens"])
        assert documents(body)[0]["id"] == finish["id"] == usage["id"]
    body, delivered = ends[Path.MESSAGES]
    assert ["content_block_stop", "message_delta", "message_stop"] == [name for name, _ in events(body)[-3:]]
    assert ({"stop_reason": "max_tokens", "stop_sequence": None}, told, delivered) == (
        documents(body)[-2]["delta"], documents(body)[-2]["peaje"], documents(body)[-2]["usage"]["output_tokens"],
    )  # fmt: skip
    body, delivered = ends[Path.RESPONSES]
    last = documents(body)[-1]
    assert ("response.incomplete", "incomplete", told, delivered) == (
        last["type"], last["response"]["status"], last["response"]["peaje"], last["response"]["usage"]["output_tokens"],
    )  # fmt: skip
    assert [n for n, _ in enumerate(documents(body))] == [document["sequence_number"] for document in documents(body)]


def test_each_choice_that_had_not_finished_is_finished() -> None:
    """One that had is left as it was."""
    valve = made(Path.CHAT, held=100, choices=3)
    chunks: list[dict[str, Any]] = [
        {"index": 0, "delta": {"content": "a"}, "finish_reason": None}, {"index": 1, "delta": {"content": "b"}, "finish_reason": "stop"},
        {"index": 2, "delta": {"content": "c"}, "finish_reason": None},
    ]  # fmt: skip
    for chunk in chunks:
        valve.let(valve.weigh(b"data: " + json.dumps({"id": "x", "choices": [chunk]}).encode() + b"\n\n"))

    [finish, _] = documents(valve.ending(STOP))

    assert [0, 2] == [choice["index"] for choice in finish["choices"]]


def test_many_tokens_in_an_event_without_usage_are_weighed_by_their_bytes() -> None:
    """An engine that sends forty at a time is not let through for one; billed is an event for a token."""
    answer = stream("vllm", Path.MESSAGES, tokens=400, faults=Faults(tokens_per_chunk=40))
    valve = made(Path.MESSAGES, held=100)

    passed, is_whole = through(valve, answer.body, size=1000)

    text = "".join(d["delta"]["text"] for d in documents(passed) if d["type"] == "content_block_delta")
    assert not is_whole
    assert len(text.encode()) <= 4 * 100


@pytest.mark.parametrize(("size", "passes_whole"), [(EVENT_BYTES_MAX, False), (EVENT_BYTES_MAX + 1, True)])
def test_an_event_without_an_end_waits_no_longer_than_the_bound(size: int, passes_whole: bool) -> None:
    """Beyond it, what has come is weighed by its bytes."""
    valve = made(Path.CHAT, held=10)

    found = list(valve.events(b"x" * size))

    assert passes_whole == bool(found)
    assert passes_whole != bool(list(valve.rest()))
    if found:
        assert not valve.passes(valve.weigh(found[0]))


@pytest.mark.parametrize(
    "data",
    [b"[DONE]", b'{"choices": 7}', b'{"usage": [], "choices": [null, 3]}', b'{"usage": {"completion_tokens": -5}}',
     b'{"usage": {"completion_tokens": true, "prompt_tokens": "9"}}'],
)  # fmt: skip
def test_what_no_engine_should_send_passes_and_breaks_nothing(data: bytes) -> None:
    """It is the client's to judge, and it does not count."""
    valve = made(Path.CHAT, held=10)

    weighed = valve.weigh(b"data: " + data + b"\n\n")

    assert valve.passes(weighed)
    assert b"data: " + data + b"\n\n" == valve.let(weighed)
    assert 0 == valve.weight


@pytest.mark.parametrize("data", [b"{" + b"x" * 39, b"[" + b"1," * 19 + b"]", b'{"a":' * 8])
def test_what_cannot_be_read_is_weighed_by_its_bytes(data: bytes) -> None:
    """It may hold anything, and it goes to the client."""
    valve = made(Path.CHAT, held=10)

    weighed = valve.weigh(b"data: " + data + b"\n\n")

    assert (10, True) == (weighed.weight, weighed.generates)
    assert valve.passes(weighed)


def test_a_token_that_ends_within_a_character_is_read() -> None:
    """Half of a pair, escaped, is no JSON for some parsers."""
    valve = made(Path.CHAT, held=10)
    event = b'data: {"choices":[{"index":0,"delta":{"content":"\\ud83d"}}],"usage":{"prompt_tokens":5,"completion_tokens":7}}\n\n'

    weighed = valve.weigh(event)

    assert (7, True) == (weighed.weight, weighed.is_reported)


def test_a_prompt_that_was_estimated_too_low_is_held_before_anything_passes() -> None:
    """The first event in which the engine says what the prompt has."""
    valve = Valve(dialect="openai.chat", choices=1, held_input=3, held=10)
    [first, *_] = stream("vllm", Path.CHAT, usage="running").pieces

    weighed = valve.weigh(first)

    assert not valve.passes(weighed)
    assert PROMPT_TOKENS == valve.input_to_hold(weighed)
