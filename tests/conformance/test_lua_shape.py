# SPDX-License-Identifier: Apache-2.0
"""Asking the engine for usage: the tap's splice and metering's parser make the same request of the same body."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metering.core.shape import Running, ask_for_usage
from tests.conformance.road import ask_in_lua, module, read_request

DIALECT = "openai.chat"
BODIES = [
    '{"model":"m","stream":true}',
    ' \r\n{ "model" : "m" , "stream" : true }\n',
    '{"stream":true,"model":"m","stream_options":null}',
    '{"stream_options":{},"stream":true,"model":"m"}',
    '{"model":"m","stream":true,"stream_options":{"include_usage":false}}',
    '{"model":"m","stream":true,"stream_options": {"include_usage" : true} }',
    '{"model":"m","stream":true,"stream_options":{"continuous_usage_stats":true}}',
    '{"model":"m","stream":true,"stream_options":{"include_usage":true,"continuous_usage_stats":null}}',
    # The key in other letters, and its name as text of a message: neither is the member itself twice.
    '{"model":"m","stream":true,"stream\\u005foptions":{"include_usage":false}}',
    '{"model":"m","stream":true,"messages":[{"role":"user","content":"\\"stream_options\\":null"}]}',
    '{"model":"m","stream":true,"messages":[{"stream_options":null}]}',
]


@pytest.mark.parametrize("running", Running, ids=lambda running: running.name)
@pytest.mark.parametrize("body", BODIES)
def test_a_splice_makes_the_document_that_the_parser_makes(body: str, running: Running) -> None:
    """Same document, and nothing of it twice; an option that is off is as one that is not there."""
    shaped = unique(ask_in_lua(body.encode(), DIALECT, running))

    assert effective(unique(ask_for_usage(body.encode(), running))) == effective(shaped)
    assert shaped["stream_options"]["include_usage"] is True


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ('{"include_usage":true,"vendor":1}', "service"),
        ('{"include_usage":"yes"}', "service"),
        ('{"include_usage":{"a":1}}', "service"),
        ('"all"', "no"),
        ("[]", "no"),
        ("1", "no"),
    ],
)
def test_what_a_splice_would_lose_is_left_to_the_parser_or_the_engine(options: str, shape: str) -> None:
    """A vendor's own option is merged by metering; options that are no object get the engine's own error."""
    body = f'{{"model":"m","stream":true,"stream_options":{options}}}'.encode()

    assert shape == (read_request(body, DIALECT)[0] or {})["shape"]
    assert ask_in_lua(body, DIALECT, Running.ASK) is None


_TEXT = st.text(max_size=12)
_OPTIONS = st.none() | st.dictionaries(
    st.sampled_from(["include_usage", "continuous_usage_stats"]), st.none() | st.booleans()
)
_REST = st.dictionaries(_TEXT.map(lambda name: f"x{name}"), _TEXT | st.integers() | st.lists(_TEXT), max_size=4)


@settings(max_examples=300, deadline=None)
@given(rest=_REST, options=_OPTIONS, has_options=st.booleans(), separators=st.sampled_from([(",", ":"), (" , ", " : ")]))
def test_any_request_keeps_what_it_had(
    rest: dict[str, Any], options: dict[str, bool | None] | None, has_options: bool, separators: tuple[str, str]
) -> None:
    """Every other member is untouched, whatever it holds."""
    document = {**rest, "model": "m", "stream": True} | ({"stream_options": options} if has_options else {})
    body = json.dumps(document, separators=separators).encode()

    shaped = effective(unique(ask_in_lua(body, DIALECT, Running.LEAVE)))

    asked = (options or {}).get("continuous_usage_stats") if has_options else None
    assert {"include_usage"} | ({"continuous_usage_stats"} if asked else set()) == set(shaped.pop("stream_options"))
    document.pop("stream_options", None)
    assert document == shaped


def effective(document: dict[str, Any]) -> dict[str, Any]:
    """Leave out the options that are off."""
    options = {name: value for name, value in document["stream_options"].items() if value}
    return document | {"stream_options": options}


@pytest.mark.parametrize(
    ("dialect", "body", "expected"),
    [
        ("openai.chat", {}, {"max_tokens": 50}),
        ("openai.chat", {"max_tokens": None}, {"max_tokens": 50}),
        ("openai.chat", {"max_tokens": 51}, {"max_tokens": 50}),
        ("openai.chat", {"max_tokens": 50}, None),
        ("openai.chat", {"max_tokens": 1}, None),
        ("openai.chat", {"max_completion_tokens": 900}, {"max_completion_tokens": 50}),
        ("openai.chat", {"max_completion_tokens": 900, "max_tokens": 900}, {"max_completion_tokens": 50, "max_tokens": 50}),
        ("openai.chat", {"max_tokens": None, "max_completion_tokens": 7}, None),
        ("openai.completions", {"max_tokens": 9_999_999}, {"max_tokens": 50}),
        ("openai.responses", {}, {"max_output_tokens": 50}),
        ("openai.responses", {"max_tokens": 900}, {"max_output_tokens": 50, "max_tokens": 900}),
        ("anthropic.messages", {"max_tokens": 900}, {"max_tokens": 50}),
        ("openai.embeddings", {}, None),
    ],
)
def test_output_is_held_to_the_cap(dialect: str, body: dict[str, Any], expected: dict[str, Any] | None) -> None:
    """What is asked for beyond it, or not said, becomes the cap; what is within it is left alone."""
    document = {"model": "m", "messages": [{"content": '"max_tokens":900'}], **body}

    capped = module("shape")[b"cap_output"](json.dumps(document).encode(), dialect.encode(), 50)

    if expected is None:
        assert capped is None
    else:
        assert {**document, **expected} == unique(capped)


def unique(body: bytes | None) -> dict[str, Any]:
    """Parse *body*, refusing a member that is there twice."""

    def pairs(members: list[tuple[str, Any]]) -> dict[str, Any]:
        assert len(members) == len({name for name, _ in members})
        return dict(members)

    assert body is not None
    document = json.loads(body, object_pairs_hook=pairs)
    assert isinstance(document, dict)
    return document
