# SPDX-License-Identifier: Apache-2.0
"""Reading usage from answers in one piece of JSON, whatever stands before, behind or inside."""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conformance.road import bytewise, first_difference, read_answer
from tests.conformance.streams import PROMPT_TOKENS, whole
from tests.fake_engine.asks import Path
from tests.fake_engine.faults import Faults

KINDS = ("vllm", "dynamo", "trtllm")
PATHS = (Path.CHAT, Path.COMPLETIONS, Path.RESPONSES, Path.MESSAGES, Path.EMBEDDINGS, Path.RERANK, Path.IMAGES)
#: What an answer is read for besides tokens.
METERS = {Path.RERANK: "searches", Path.IMAGES: "images"}
USAGE = {"prompt_tokens": 5, "completion_tokens": 7}
DECOY = {"prompt_tokens": 900, "completion_tokens": 900}
SAYS = '"usage":{"prompt_tokens":900,"completion_tokens":900}'

#: Any JSON, with decoys more often than chance would have them.
_ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.sampled_from(["usage", SAYS, '\\"', "{"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["usage", "a", "choices"]) | st.text(max_size=4), inner, max_size=3),
    max_leaves=12,
)


@pytest.mark.parametrize("faults", [Faults(), Faults(fake_usage_text=True, reasoning=1, cached=2)], ids=["plain", "hostile"])
@pytest.mark.parametrize(("kind", "path"), list(itertools.product(KINDS, PATHS)))
def test_counts_are_the_engines_own(kind: str, path: str, faults: Faults) -> None:
    """The counts of an answer are what the engine produced, and the answer passes unchanged."""
    answer = whole(kind, path, tokens=9, faults=faults)

    reading = read_answer("object", "running", [answer.body], METERS.get(path))

    assert (answer.output, "final", None) == (reading.output or 0, reading.seen, reading.anomaly)
    if not (path == Path.MESSAGES and faults.cached):
        assert reading.input == PROMPT_TOKENS
    assert answer.body == reading.sent


@pytest.mark.parametrize(("kind", "path"), list(itertools.product(KINDS, PATHS)))
def test_a_split_anywhere_changes_nothing(kind: str, path: str) -> None:
    """The counts are the same for every cut in two or around one byte, and byte by byte."""
    body = whole(kind, path, tokens=2, faults=Faults(fake_usage_text=True)).body

    assert first_difference("object", "running", body, METERS.get(path)) == 0
    assert read_answer("object", "running", [body], METERS.get(path)) == read_answer("object", "running", bytewise(body), METERS.get(path))


@pytest.mark.parametrize(
    "document",
    [
        {"usage": USAGE, "choices": []},
        {"choices": [{"message": {"content": SAYS}}], "usage": USAGE},
        {"choices": [{"message": {"tool_calls": [{"function": {"arguments": json.dumps({"usage": DECOY})}}]}}], "usage": USAGE},
        {"nested": {"usage": DECOY}, "usage": USAGE, "after": {"usage": DECOY}},
        {"choices": [{"usage": DECOY}, {"usage": DECOY}], "usage": USAGE},
        {"text": "usage", "x": DECOY, "usage": USAGE},
        {"text": "\\", "usage": USAGE, "x": '\\"'},
        {"usage_details": DECOY, "my_usage": DECOY, "usage": USAGE, "usag": DECOY},
        {"usage": USAGE, "choices": [{"text": SAYS * 100}]},
    ],
    ids=["first", "text", "tool_arguments", "deeper", "in_choices", "as_value", "backslashes", "similar_keys", "long"],
)
def test_only_the_top_levels_own_usage_counts(document: dict[str, Any]) -> None:
    """What looks like usage in text, in tool arguments or one level down is none."""
    body = json.dumps(document).encode()

    assert first_difference("object", "running", body) == 0
    reading = read_answer("object", "running", [body])
    assert (5, 7, "final") == (reading.input, reading.output, reading.seen)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(before=_ANY, after=_ANY, usage=st.booleans(), piece=st.integers(1, 40), indent=st.sampled_from([None, 2]))
def test_any_answer_reads_as_python_reads_it(before: Any, after: Any, usage: bool, piece: int, indent: int | None) -> None:
    """Whatever surrounds it, the counts are those of the top-level usage object, or none."""
    document = {"before": before} | ({"usage": USAGE} if usage else {}) | {"after": after}
    body = json.dumps(document, indent=indent).encode()

    reading = read_answer("object", "running", [body[i : i + piece] for i in range(0, len(body), piece)])

    expected = (5, 7, "final") if usage else (None, None, "none")
    assert expected == (reading.input, reading.output, reading.seen)


def test_a_large_embedding_is_read_to_its_end() -> None:
    """Usage after megabytes of numbers is found, over any pieces."""
    numbers = random.Random(1)
    data = [{"embedding": [numbers.uniform(-1, 1) for _ in range(1536)]} for _ in range(40)]
    body = json.dumps({"object": "list", "data": data, "usage": {"prompt_tokens": 321, "total_tokens": 321}}).encode()

    reading = read_answer("object", "running", [body[i : i + 16_384] for i in range(0, len(body), 16_384)])

    assert (321, None, 321, "final") == (reading.input, reading.output, reading.total, reading.seen)


@pytest.mark.parametrize("usage", ["null", "[]", "7", '"none"', "{}"])
def test_an_answer_without_counts_is_not_seen(usage: str) -> None:
    """Whatever else stands where the usage should be, nothing is made up."""
    reading = read_answer("object", "running", [b'{"usage":' + usage.encode() + b',"a":{"prompt_tokens":3}}'])

    assert (None, None, "none", 0) == (reading.input, reading.output, reading.seen, reading.total)


def test_a_usage_object_beyond_any_size_is_flagged() -> None:
    """The captured object is bounded: what never closes is given up and flagged."""
    pieces = [b'{"usage":{"prompt_tokens":1,"x":"', *[b"y" * 1000] * 40, b'"}}']

    reading = read_answer("object", "running", pieces)

    assert ("invalid", "none") == (reading.anomaly, reading.seen)


def test_an_answer_cut_short_has_no_counts() -> None:
    """Half a usage object is none."""
    reading = read_answer("object", "running", [b'{"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":7'])

    assert (None, "none") == (reading.output, reading.seen)


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ({"input_tokens": 5, "output_tokens": 7}, (5, 7, None)),
        ({"input_tokens": 5, "output_tokens": 7, "cache_read_input_tokens": 3}, (8, 7, 3)),
        ({"input_tokens": 5, "output_tokens": 7, "cache_creation_input_tokens": 2, "cache_read_input_tokens": 3}, (10, 7, 3)),
        ({"prompt_tokens": 5, "completion_tokens": 7, "prompt_tokens_details": {"cached_tokens": 3}}, (5, 7, 3)),
        ({"input_tokens": 5, "output_tokens": 7, "input_tokens_details": {"cached_tokens": 3}}, (5, 7, 3)),
        ({"prompt_tokens": 5, "completion_tokens": 7, "prompt_tokens_details": None}, (5, 7, None)),
        ({"prompt_tokens": 0, "completion_tokens": 0}, (0, 0, None)),
    ],
    ids=["anthropic", "cache_read", "cache_write", "openai", "responses", "null_details", "zero"],
)
def test_cached_tokens_stand_beside_or_inside_the_input(usage: dict[str, Any], expected: tuple) -> None:
    """Anthropic counts them beside, OpenAI inside; the input read is always the whole."""
    reading = read_answer("object", "running", [json.dumps({"usage": usage}).encode()])

    assert expected == (reading.input, reading.output, reading.cached)


IMAGE = {"b64_json": "aGk=", "revised_prompt": SAYS}


@pytest.mark.parametrize(
    ("document", "images"),
    [
        ({"created": 1, "data": [IMAGE]}, 1),
        ({"created": 1, "data": [IMAGE, IMAGE, {"url": "https://x/y"}], "usage": {"input_tokens": 5, "output_tokens": 7}}, 3),
        ({"data": []}, 0),
        ({"created": 1}, 0),
        ({"data": [{"inner": {"data": [IMAGE, IMAGE]}, "list": [{}, {}]}]}, 1),
        ({"other": [IMAGE, IMAGE], "data": [IMAGE], "more": [{}]}, 1),
        ({"data": {"data": [IMAGE]}}, 0),
        ({"data": ["data", "{}", [{}]]}, 0),
        ({"x": "data", "y": [IMAGE], "z": {"data": [IMAGE]}}, 0),
    ],
    ids=["one", "three", "none", "no_list", "nested", "beside", "no_array", "no_objects", "as_value"],
)
def test_each_image_of_an_answer_is_counted_and_nothing_else(document: dict[str, Any], images: int) -> None:
    """Objects of the top level's own list `data`, however the answer is cut."""
    body = json.dumps(document).encode()

    assert images == read_answer("object", "running", [body], "images").quantity
    assert first_difference("object", "running", body, "images") == 0


def test_an_image_counts_as_its_first_byte_passes() -> None:
    """A caller who leaves within it has had it: it was made by then."""
    reading = read_answer("object", "running", [b'{"created":1,"data":[{"b64_json":"aa'], "images")

    assert (1, "none") == (reading.quantity, reading.seen)


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"results": [], "usage": {"total_tokens": 9}}, (9, None)),
        ({"results": [], "usage": {"prompt_tokens": 8, "total_tokens": 9}}, (8, None)),
        ({"results": [], "meta": {"api_version": {"version": "1"}, "billed_units": {"search_units": 2}}}, (None, 2)),
        ({"meta": {"billed_units": {"search_units": 1}}, "results": [{"meta": {"billed_units": {"search_units": 9}}}], "usage": {"total_tokens": 9}}, (9, 1)),
        ({"meta": {"billed_units": {"search_units": -1}}}, (None, -1)),
        ({"meta": {"billed_units": {"input_tokens": 3}}}, (None, None)),
        ({"meta": {"billed_units": [{"search_units": 2}]}}, (None, None)),
        ({"meta": "billed_units", "x": {"billed_units": {"search_units": 2}}}, (None, None)),
    ],
    ids=["total", "prompt", "cohere", "both", "negative", "other_units", "no_object", "as_value"],
)  # fmt: skip
def test_a_rerank_says_its_tokens_or_its_searches(document: dict[str, Any], expected: tuple[int | None, int | None]) -> None:
    """As vLLM and Jina say it, and as Cohere does; of neither anything is made up."""
    body = json.dumps(document).encode()

    reading = read_answer("object", "running", [body], "searches")

    assert expected == (reading.input, reading.quantity)
    assert first_difference("object", "running", body, "searches") == 0


def test_what_is_a_meter_of_one_dialect_is_nothing_to_another() -> None:
    """A chat that says what a reranker says of its searches has none."""
    body = json.dumps({"usage": USAGE | {"total_tokens": 12}, "meta": {"billed_units": {"search_units": 2}}, "data": [{}]}).encode()

    assert read_answer("object", "running", [body]).quantity is None


def test_the_last_event_of_speech_has_its_usage() -> None:
    """Sound as events ends with what it used."""
    events = (
        b'data: {"type":"speech.audio.delta","audio":"aGk="}\n\n'
        b'data: {"type":"speech.audio.done","usage":{"input_tokens":5,"output_tokens":7,"total_tokens":12}}\n\n'
    )

    reading = read_answer("events", "running", [events])

    assert (5, 7, "final", events) == (reading.input, reading.output, reading.seen, reading.sent)
