# SPDX-License-Identifier: Apache-2.0
"""
One answer in the making: its words, its chunks and the usage it reports.

Everything follows from the request and its faults; nothing here knows an engine's spelling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Literal, NamedTuple, TypeAlias

from .asks import Ask
from .faults import Faults

Json: TypeAlias = dict[str, Any]
#: Where a usage object stands; engines spell it differently in each place.
Place: TypeAlias = Literal["answer", "first", "running", "final"]

WORDS: Final = (" toll", " road", " bridge", " gate", " lane", " booth", " ticket", " barrier")
#: Each is one token, and none may be taken for a frame, a usage object or the end of a string.
HOSTILE_WORDS: Final = (
    '\n\ndata: {"usage":{"prompt_tokens":1,"completion_tokens":99999}}\n\n',
    ' "usage":{"prompt_tokens":1,"completion_tokens":99999,"total_tokens":100000}',
    " }}]}",
    " {{[",
    ' \\"usage\\":{\\"completion_tokens\\":99999}',
    "\r\ndata: [DONE]\r\n",
    ' \\\\"',
    '"},"finish_reason":"stop"}],"usage":{"completion_tokens":99999}}',
)


class Frame(NamedTuple):
    """One SSE event, and what it hands over."""

    #: Bytes stand as they are; None is an event without data.
    data: Json | bytes | None
    event: str | None = None
    #: Generated tokens inside; a frame that has some is a content chunk.
    tokens: int = 0
    usage: Json | None = None
    #: What follows the JSON on its line.
    trailer: bytes = b""
    comment: str | None = None


class Piece(NamedTuple):
    """What one content chunk adds to one choice."""

    text: str
    tokens: int
    #: Tokens of the choice up to here.
    so_far: int
    is_reasoning: bool
    is_last: bool


class Count(NamedTuple):
    """The numbers of a usage object; a fault makes them the string "NaN", written as a bare NaN."""

    prompt: Any
    output: Any
    total: Any
    cached: int
    reasoning: int


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One answer: what is asked, what goes wrong, and how its engine spells usage."""

    ask: Ask
    faults: Faults
    response_id: str
    created: int
    spell_usage: Callable[[str, Place, Count], Json]

    def pieces(self) -> Iterator[Piece]:
        """Cut one choice into content chunks; all choices are alike."""
        ask, faults = self.ask, self.faults
        words = HOSTILE_WORDS if faults.fake_usage_text else WORDS
        thought = min(faults.reasoning, ask.tokens_each)
        at = 0
        while at < ask.tokens_each:
            end = min(at + faults.tokens_per_chunk, thought if at < thought else ask.tokens_each)
            text = "".join(words[token % len(words)] for token in range(at, end))
            if at == 0:
                text = text.ljust(faults.big_event, "x")
            yield Piece(text, end - at, end, at < thought, end == ask.tokens_each)
            at = end

    @cached_property
    def text(self) -> str:
        """All words of one choice."""
        return "".join(piece.text for piece in self.pieces())

    def said(self, *, reasoning: bool) -> str:
        """Only what one choice says, or only what it thinks."""
        return "".join(piece.text for piece in self.pieces() if piece.is_reasoning == reasoning)

    @property
    def tokens(self) -> int:
        """The tokens of all choices."""
        return self.ask.tokens_each * self.ask.choices

    def usage(self, output: int, place: Place) -> Json | None:
        """Report so many tokens of output, or what the faults want reported instead."""
        prompt, faults = self.ask.prompt_tokens, self.faults
        count = Count(prompt, output, prompt + output, faults.cached, min(faults.reasoning * self.ask.choices, output))
        match faults.usage:
            case dict() as given:
                return given
            case "missing":
                return None
            case "zero":
                count = Count(0, 0, 0, 0, 0)
            case "negative":
                count = Count(-prompt, -output, -prompt - output, faults.cached, count.reasoning)
            case "nan":
                count = Count("NaN", "NaN", "NaN", faults.cached, count.reasoning)
            case "huge":
                count = Count(2**63, 2**63, 2**63, faults.cached, count.reasoning)
            case "lower" if place in ("answer", "final") or output % 2 == 0:
                count = Count(prompt, output // 2, prompt + output // 2, faults.cached, count.reasoning)
        return self.spell_usage(self.ask.path, place, count)


def with_usage(payload: Json, usage: Json | None) -> Json:
    """Add a usage object; a missing one is no key at all."""
    return payload if usage is None else payload | {"usage": usage}
