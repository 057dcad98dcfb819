# SPDX-License-Identifier: Apache-2.0
"""The two readers of a stream, Envoy's script and metering's valve, over the same streams: the same counts, however it is cut."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from metering.core.valve import Valve
from tests.conformance.road import read_answer
from tests.conformance.streams import PROMPT_TOKENS, Answer, stream
from tests.fake_engine.asks import Path
from tests.fake_engine.faults import Faults

KINDS = ("vllm", "dynamo", "trtllm")
DIALECTS = {
    Path.CHAT: "openai.chat", Path.COMPLETIONS: "openai.completions", Path.RESPONSES: "openai.responses",
    Path.MESSAGES: "anthropic.messages",
}  # fmt: skip
_PLENTY = 1_000_000


def generated(chance: random.Random) -> tuple[str, int, Answer]:
    """A stream as some engine would send it: its path and choices, and what it is."""
    path = chance.choice(list(DIALECTS))
    choices = chance.choice((1, 1, 2, 3)) if path in (Path.CHAT, Path.COMPLETIONS) else 1
    faults = Faults(
        crlf=chance.choice((False, False, True, "cr")), comments=chance.random() < 0.2, multiline=chance.random() < 0.2,
        fake_usage_text=chance.random() < 0.3, reasoning=chance.choice((0, 0, 2)) if path == Path.CHAT else 0,
    )
    usage, tokens = chance.choice(("no", "final", "running")), chance.randint(1, 20)
    return path, choices, stream(chance.choice(KINDS), path, usage=usage, tokens=tokens, choices=choices, faults=faults)


def pieces(body: bytes, chance: random.Random) -> Iterator[bytes]:
    """*body*, cut anywhere: mostly near the ends of its events, sometimes byte by byte."""
    largest = chance.choice((1, 3, 40, 400, 4000))
    start = 0
    while start < len(body):
        end = start + chance.randint(1, largest)
        yield body[start:end]
        start = end


def weighed(dialect: str, choices: int, cut: list[bytes]) -> tuple[int, bytes]:
    """What the valve counts of a stream that it lets pass whole, and what passes."""
    valve = Valve(dialect=dialect, choices=choices, held_input=PROMPT_TOKENS, held=_PLENTY)
    passed = b"".join(valve.let(valve.weigh(event)) for piece in cut for event in valve.events(piece))
    passed += b"".join(valve.let(valve.weigh(event)) for event in valve.rest())
    return valve.delivered, passed


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=[pytest.mark.chaos, pytest.mark.timeout(1800)])])
def test_both_readers_count_the_same_of_any_stream_in_any_pieces(count: int) -> None:
    """What the engine produced: its own count where it says one, a frame a token where it does not; and every byte passes."""
    for seed in range(count):
        chance = random.Random(seed)
        path, choices, answer = generated(chance)
        cut = list(pieces(answer.body, chance))

        reading = read_answer("events", "running", cut)
        delivered, passed = weighed(DIALECTS[path], choices, cut)

        counted = reading.frames if reading.seen == "none" else reading.output
        assert (answer.output, answer.output) == (counted, delivered), f"seed {seed}: {path}"
        assert (answer.body, answer.body) == (reading.sent, passed), f"seed {seed}: {path}"
