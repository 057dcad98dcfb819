# SPDX-License-Identifier: Apache-2.0
"""Reading usage from streams: every engine, every dialect, every way in which bytes may arrive."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest

from tests.conformance.road import bytewise, first_difference, read_answer
from tests.conformance.streams import PROMPT_TOKENS, documents, events, stream
from tests.fake_engine.asks import Path
from tests.fake_engine.faults import Faults
from tests.fake_engine.server import encode_event

KINDS = ("vllm", "dynamo", "trtllm")
#: Dialects in which a caller can ask for usage, so in which it may have to be hidden.
ASKING = (Path.CHAT, Path.COMPLETIONS)
OTHERS = (Path.RESPONSES, Path.MESSAGES)
#: Ways in which an engine or a network may bend a stream without changing what it says.
BENT = {
    "plain": Faults(),
    "crlf": Faults(crlf=True),
    "cr": Faults(crlf="cr"),
    "comments": Faults(comments=True),
    "multiline": Faults(multiline=True),
    "multiline_crlf": Faults(multiline=True, crlf=True),
    "hostile_text": Faults(fake_usage_text=True),
    "reasoning_and_cache": Faults(reasoning=2, cached=3),
}


def is_usage_frame(document: dict) -> bool:
    """Tell whether *document* is the closing frame that only carries usage."""
    return document.get("choices") == [] and isinstance(document.get("usage"), dict)


def without_usage(document: dict) -> dict:
    """Leave out the usage member, wherever it stands."""
    return {key: value for key, value in document.items() if key != "usage"}


@pytest.mark.parametrize("bend", BENT)
@pytest.mark.parametrize(("kind", "path"), list(itertools.product(KINDS, ASKING + OTHERS)))
def test_counts_are_the_engines_own(kind: str, path: str, bend: str) -> None:
    """The counts of a complete stream are what the engine really produced, however it spells them."""
    answer = stream(kind, path, tokens=4, faults=BENT[bend])

    reading = read_answer("events", "running", [answer.body])

    assert (answer.output, "final", None) == (reading.output, reading.seen, reading.anomaly)
    if not (path == Path.MESSAGES and BENT[bend].cached):
        assert reading.input == PROMPT_TOKENS
    assert reading.total == reading.input + reading.output


@pytest.mark.parametrize("wants", ["no", "final"])
@pytest.mark.parametrize("bend", BENT)
@pytest.mark.parametrize(("kind", "path"), list(itertools.product(KINDS, ASKING)))
def test_a_split_anywhere_changes_nothing(kind: str, path: str, bend: str, wants: str) -> None:
    """Counts, seen and bytes sent on are the same for every cut in two or around one byte, and byte by byte."""
    # The number of cuts grows with the length, and so does the cost of each.
    answer = stream(kind, path, usage="running", tokens=1, faults=BENT[bend])

    assert first_difference("events", wants, answer.body) == 0
    assert read_answer("events", wants, [answer.body]) == read_answer("events", wants, bytewise(answer.body))


@pytest.mark.parametrize("bend", ["plain", "crlf", "comments", "hostile_text"])
@pytest.mark.parametrize(("kind", "path"), list(itertools.product(KINDS, OTHERS)))
def test_a_split_anywhere_changes_nothing_in_other_dialects(kind: str, path: str, bend: str) -> None:
    """Responses and Messages pass byte for byte and count the same for every cut."""
    answer = stream(kind, path, tokens=1, faults=BENT[bend])

    assert first_difference("events", "running", answer.body) == 0
    assert read_answer("events", "running", bytewise(answer.body)).sent == answer.body


@pytest.mark.parametrize("usage", ["final", "running"])
@pytest.mark.parametrize("bend", BENT)
@pytest.mark.parametrize(("kind", "path"), list(itertools.product(KINDS, ASKING)))
def test_a_caller_who_did_not_ask_sees_no_usage(kind: str, path: str, bend: str, usage: str) -> None:
    """With "no" there is no usage object and no empty frame, and every other frame says what it said."""
    answer = stream(kind, path, usage=usage, faults=BENT[bend])

    sent = read_answer("events", "no", [answer.body]).sent

    expected = [without_usage(d) for d in documents(answer.body) if not is_usage_frame(d)]
    assert expected == [without_usage(d) for d in documents(sent)]
    assert not any(isinstance(d.get("usage"), dict) or d["choices"] == [] for d in documents(sent))
    assert "[DONE]" in events(sent)[-1][1]


@pytest.mark.parametrize("usage", ["final", "running"])
@pytest.mark.parametrize("bend", BENT)
@pytest.mark.parametrize(("kind", "path"), list(itertools.product(KINDS, ASKING)))
def test_a_caller_who_asked_sees_exactly_the_final_frame(kind: str, path: str, bend: str, usage: str) -> None:
    """With "final" the one usage object is that of the closing frame, as the engine wrote it."""
    answer = stream(kind, path, usage=usage, faults=BENT[bend])

    sent = documents(read_answer("events", "final", [answer.body]).sent)

    assert [d for d in documents(answer.body) if is_usage_frame(d)] == [d for d in sent if isinstance(d.get("usage"), dict)]
    assert list(map(without_usage, documents(answer.body))) == list(map(without_usage, sent))


@pytest.mark.parametrize("bend", BENT)
@pytest.mark.parametrize(("kind", "path"), list(itertools.product(KINDS, ASKING)))
def test_a_caller_who_asked_for_running_usage_gets_every_byte(kind: str, path: str, bend: str) -> None:
    """With "running" the stream passes unchanged."""
    answer = stream(kind, path, usage="running", faults=BENT[bend])

    assert answer.body == read_answer("events", "running", bytewise(answer.body)).sent


@pytest.mark.parametrize("wants", ["no", "final"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_cut_short_keeps_what_was_seen(kind: str, wants: str) -> None:
    """After k frames the counts are those of frame k, and the basis is running, not final."""
    pieces = stream(kind, Path.CHAT, usage="running", tokens=8).pieces

    reading = read_answer("events", wants, pieces[:5])

    assert (PROMPT_TOKENS, "running") == (reading.input, reading.seen)
    assert json.loads(pieces[4].removeprefix(b"data: "))["usage"]["completion_tokens"] == reading.output


def test_what_was_cut_mid_event_still_reaches_a_caller_who_hides_nothing() -> None:
    """A stream that passes unchanged loses no byte when the engine dies in the middle of an event."""
    body = stream("dynamo", Path.RESPONSES).body[:-20]

    assert body == read_answer("events", "running", bytewise(body)).sent


def test_several_choices_count_together() -> None:
    """n choices are charged, each of them."""
    answer = stream("vllm", Path.CHAT, tokens=3, choices=4)

    assert read_answer("events", "no", [answer.body]).output == 12


@pytest.mark.parametrize("kind", KINDS)
def test_frames_are_counted_when_the_engine_never_says(kind: str) -> None:
    """Without usage nothing is seen; each frame with content is a token, roles and ends are none."""
    answer = stream(kind, Path.CHAT, usage="no", tokens=6)

    reading = read_answer("events", "no", [answer.body])

    assert (None, "none", 0) == (reading.output, reading.seen, reading.total)
    assert 6 == reading.frames
    assert answer.body == reading.sent


@pytest.mark.parametrize("bend", BENT)
@pytest.mark.parametrize(("kind", "path"), list(itertools.product(KINDS, (*ASKING, Path.RESPONSES))))
def test_of_a_stream_that_is_cut_before_any_usage_the_frames_are_its_tokens(kind: str, path: str, bend: str) -> None:
    """Cut after each event: what was delivered is what is counted, however it was spelled."""
    faults = replace(BENT[bend], reasoning=2)
    answer = stream(kind, path, usage="no", tokens=6, faults=faults)
    delivered, body = 0, b""
    for frame in answer.frames:
        if frame.usage is not None:
            break
        body, delivered = body + encode_event(frame, faults), delivered + frame.tokens

        assert delivered == read_answer("events", "no", [body]).frames
    assert 6 == delivered


@pytest.mark.parametrize(
    ("data", "frames"),
    [
        ({"choices": [{"delta": {"role": "assistant", "content": ""}}]}, 0),
        ({"choices": [{"delta": {}, "finish_reason": "stop"}]}, 0),
        ({"choices": [{"delta": {"content": None}}]}, 0),
        ({"choices": [{"delta": {"content": '"'}}]}, 1),
        ({"choices": [{"delta": {"tool_calls": [{"function": {"arguments": "{"}}]}}]}, 1),
        ({"choices": [{"delta": {"reasoning": "hm"}}]}, 1),
        ({"type": "content_block_delta", "delta": {"type": "text_delta", "text": "hi"}}, 1),
        ({"type": "content_block_delta", "delta": {"type": "input_json_delta", "partial_json": "{"}}, 1),
        ({"type": "content_block_start", "content_block": {"type": "text", "text": ""}}, 0),
        ({"type": "ping"}, 0),
        ({"type": "response.output_text.delta", "delta": "hi"}, 1),
        ({"type": "response.output_text.done", "text": "hi there"}, 0),
        ({"error": {"message": "no", "content": "no"}}, 0),
    ],
)
def test_only_frames_with_generated_text_count(data: dict, frames: int) -> None:
    """A role, an end, a ping and a summary of what came before are none."""
    for spelled in (json.dumps(data), json.dumps(data, separators=(",", ":")), json.dumps(data | {"usage": None})):
        assert frames == read_answer("events", "no", [f"data: {spelled}\n\n".encode()]).frames


@pytest.mark.parametrize(
    ("fault", "expected"),
    [("zero", (0, 0, None)), ("negative", (-1, -1, None)), ("nan", (-1, -1, None)), ("huge", (-1, -1, None))],
)
def test_an_impossible_count_reads_as_impossible(fault: str, expected: tuple) -> None:
    """Zero stays zero; what no token count can be is -1, for the collector to flag."""
    answer = stream("vllm", Path.CHAT, faults=Faults(usage=fault))

    reading = read_answer("events", "no", [answer.body])

    assert expected == (reading.input, reading.output, reading.anomaly)
    assert reading.total == 0


@pytest.mark.parametrize("number", ["1e999", "0x10", "-1", "true", '"7"', "[7]", "9007199254740994", "1.5.2", "nan"])
def test_a_count_that_is_no_number_reads_as_impossible(number: str) -> None:
    """Whatever stands where a count should be, the other count still counts."""
    body = f'data: {{"choices":[],"usage":{{"prompt_tokens":{number},"completion_tokens":7}}}}\n\n'.encode()

    reading = read_answer("events", "no", [body])

    assert (-1, 7) == (reading.input, reading.output)


def test_usage_that_falls_is_flagged() -> None:
    """An engine that takes back what it said is an anomaly."""
    answer = stream("dynamo", Path.CHAT, usage="running", tokens=6, faults=Faults(usage="lower"))

    assert read_answer("events", "no", [answer.body]).anomaly == "decreased"


@pytest.mark.parametrize("usage", ["{}", '{"total_tokens":5}', '{"prompt_tokens":null}'])
def test_usage_without_counts_is_hidden_all_the_same(usage: str) -> None:
    """A usage object that says nothing was still not asked for."""
    body = f'data: {{"choices":[],"usage":{usage}}}\n\n'.encode()

    reading = read_answer("events", "no", [body])

    assert (b"", "none") == (reading.sent, reading.seen)


@pytest.mark.parametrize(
    ("name", "delta"),
    [
        ("text", {"content": '"usage":{"prompt_tokens":1,"completion_tokens":999}'}),
        ("frame", {"content": '\n\ndata: {"choices":[],"usage":{"completion_tokens":999}}\n\n'}),
        ("word", {"content": "usage"}),
        ("tool_arguments", {"tool_calls": [{"function": {"arguments": '{"usage":{"completion_tokens":999}}'}}]}),
        ("deeper", {"extra": {"usage": {"prompt_tokens": 1, "completion_tokens": 999}}}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_looks_like_usage_is_not_usage(name: str, delta: dict) -> None:
    """Only the frame's own member counts, not text, tool arguments or deeper objects."""
    del name
    frame = b"data: " + json.dumps({"choices": [{"index": 0, "delta": delta}]}).encode() + b"\n\n"

    reading = read_answer("events", "no", [frame])

    frames = 0 if "extra" in delta else 1
    assert (None, "none", frames, frame) == (reading.output, reading.seen, reading.frames, reading.sent)


@pytest.mark.parametrize(
    "document",
    [
        '{"usage":{"prompt_tokens":5,"completion_tokens":2},"id":"a","choices":[{"index":0}]}',
        '{"id":"a", "usage" : {"prompt_tokens":5,"completion_tokens":2} ,"choices":[{"index":0}]}',
        '{"id":"a","choices":[{"index":0}],"usage":{"prompt_tokens":5,"completion_tokens":2}}',
    ],
    ids=["first", "middle", "last"],
)
def test_usage_is_cut_out_wherever_it_stands(document: str) -> None:
    """The frame stays JSON, without its usage."""
    sent = read_answer("events", "no", [f"data: {document}\n\n".encode()]).sent

    assert [{"id": "a", "choices": [{"index": 0}]}] == documents(sent)


def test_everything_in_one_piece_reads_like_one_by_one() -> None:
    """A coalesced stream and one that comes event by event are the same stream."""
    answer = stream("dynamo", Path.CHAT, usage="running", tokens=20)

    assert read_answer("events", "no", [answer.body]) == read_answer("events", "no", answer.pieces)


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_a_stream_that_omits_its_last_blank_line_still_ends(end: bytes) -> None:
    """The terminator never waits for a line end that may not come."""
    body = b'data: {"choices":[{"index":0}]}\n\ndata: [DONE]' + end

    assert body == read_answer("events", "no", [body]).sent
    assert body == read_answer("events", "no", bytewise(body)).sent


def test_a_broken_event_passes_and_is_flagged() -> None:
    """What cannot be read is sent on as it is, with an anomaly, and reading goes on."""
    broken = b'data: {"usage":{"prompt_tokens":1,\n\n'
    closing = b'data: {"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":2}}\n\n'

    reading = read_answer("events", "no", [broken + closing])

    assert (broken, "invalid", 2) == (reading.sent, reading.anomaly, reading.output)


def test_an_event_longer_than_the_bound_passes_unread() -> None:
    """One byte more than the bound without an end passes on, flagged; up to the bound is held and read."""
    bound = 1_048_576
    opening = b'data: {"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":2},"x":"'
    fitting = opening + b"x" * (bound - len(opening))
    end = b'"}\n\n'

    held, passed = read_answer("events", "no", [fitting, end]), read_answer("events", "no", [fitting + b"x", end])

    assert (2, b"", None) == (held.output, held.sent, held.anomaly)
    assert (None, fitting + b"x" + end, "event_too_large") == (passed.output, passed.sent, passed.anomaly)


@pytest.mark.timeout(10)
@pytest.mark.parametrize("filler", [b" ", b"\\\\", b",", b'\\"', b"[", b"\\u0020"], ids=repr)
def test_hostile_text_costs_no_more_than_its_length(filler: bytes) -> None:
    """A long run of anything in an answer is read in linear time: the reader runs on Envoy's own threads."""
    run = filler * (500_000 // len(filler))
    body = b'data: {"usage":null,"choices":[{"text":"' + run + b'"}]}\n\n'

    reading = read_answer("events", "no", [body])

    assert (body, 1) == (reading.sent, reading.frames)
