# SPDX-License-Identifier: Apache-2.0
"""What Lua does for pools: the server's own name for the model, and prompts that begin alike."""

from __future__ import annotations

import json

import pytest

from tests.conformance.road import prefix_of, rename


@pytest.mark.parametrize("name", ["m2", "org/llama-8b", 'a"b\\c', "%d%s", "x" * 200])
@pytest.mark.parametrize("body", ['{"model":"m","x":1}', '{ "x" : {"model":"m"}, "model" : "m" }', '{"model":"\\u006d"}'])
def test_a_renamed_body_differs_in_nothing_else(body: str, name: str) -> None:
    """As any JSON parser reads it."""
    renamed = rename(body.encode(), name)

    assert renamed is not None
    assert json.loads(body) | {"model": name} == json.loads(renamed)


def test_a_body_that_names_the_model_so_already_is_left_alone() -> None:
    """Byte for byte: nothing is written."""
    assert None is rename(b'{"model": "m"}', "m")


@pytest.mark.parametrize(
    ("dialect", "body"),
    [
        ("openai.chat", '{"model":"%s","messages":[{"role":"system","content":"%s"}]}'),
        ("openai.completions", '{"model":"%s","prompt":"%s"}'),
        ("openai.responses", '{"input":"elsewhere","model":"%s","instructions":"%s"}'),
        ("anthropic.messages", '{"messages":[],"model":"%s","system":"%s"}'),
    ],
)
def test_prompts_that_begin_alike_are_one_number(dialect: str, body: str) -> None:
    """Whatever stands before the prompt in the body; a byte within what is looked at makes another."""
    beginning = "You are a toll keeper. " * 4
    numbers = {prefix_of((body % (model, beginning + end)).encode(), dialect, 64) for model in ("a", "bb") for end in ("x", "y")}
    other = prefix_of((body % ("a", "We" + beginning)).encode(), dialect, 64)

    assert 1 == len(numbers)
    assert other not in numbers
    assert other.isdigit()


def test_the_bytes_that_are_looked_at_are_bounded() -> None:
    """At the bound, and not a byte beyond; a prompt that is shorter is looked at whole."""
    base = prefix_of(b'{"model":"m","prompt":"abcdefgh"}', "openai.completions", 5)

    assert base == prefix_of(b'{"model":"m","prompt":"abcdXXXX"}', "openai.completions", 5)
    assert base != prefix_of(b'{"model":"m","prompt":"abcXefgh"}', "openai.completions", 5)
    assert prefix_of(b'{"model":"m","prompt":"abc"}', "openai.completions", 4096).isdigit()
