# SPDX-License-Identifier: Apache-2.0
"""
Know every knob: what it is called, what it takes, what it does.

A knob that is unknown or wrongly set is refused by name: a misspelt fault must not pass as no fault.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

import orjson

#: The request header that carries knobs, as a JSON object.
HEADER: Final = "x-fake-engine"


class BadKnob(ValueError):
    """The knobs can not be read; the text names the one at fault."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """How one answer departs from a prompt and correct one; the defaults depart in nothing."""

    chunk_ms: float = 0
    tokens_per_chunk: int = 1
    first_ms: float = 0
    split: int = 0
    coalesce: bool = False
    crlf: bool | str = False
    comments: bool = False
    multiline: bool = False
    usage: str | dict[str, Any] | None = None
    cached: int = 0
    reasoning: int = 0
    error_before: int = 0
    error_after: int | None = None
    reset_after: int | None = None
    stall_after: int | None = None
    gzip: bool = False
    fake_usage_text: bool = False
    same_id: bool = False
    repeat_id: bool | None = None
    big_event: int = 0
    finish: str = "length"

    def unary_milliseconds(self, chunks: int) -> float:
        """Say how long an answer in one piece takes: as long as its stream would."""
        return self.first_ms + self.chunk_ms * max(chunks - 1, 0)

    def breaks_at(self, chunks: int) -> str | None:
        """Name the break due once so many content chunks are out, if one is."""
        for name in ("error", "reset", "stall"):
            if getattr(self, f"{name}_after") == chunks:
                return name
        return None


class Knob(NamedTuple):
    """What a knob takes and what it does."""

    takes: str
    accepts: Callable[[Any], bool]
    does: str


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= 2**31


def _is_milliseconds(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value <= 3_600_000  # type: ignore[operator]


def _is_flag(value: object) -> bool:
    return type(value) is bool


_COUNT = "a whole number from 0"
_MILLISECONDS = "milliseconds, up to an hour"
_FLAG = "true or false"
_USAGES: Final = ("missing", "zero", "negative", "nan", "huge", "lower")

KNOBS: Final[dict[str, Knob]] = {
    "chunk_ms": Knob(_MILLISECONDS, _is_milliseconds, "wait between two content chunks"),
    "tokens_per_chunk": Knob("a whole number from 1", lambda v: _is_count(v) and v >= 1, "tokens in one content chunk"),
    "first_ms": Knob(_MILLISECONDS, _is_milliseconds, "wait before the first byte"),
    "split": Knob(_COUNT, _is_count, "write the stream in pieces of N bytes across events, 0 is one write per event"),
    "coalesce": Knob(_FLAG, _is_flag, "write the whole stream at once, when it is complete"),
    "crlf": Knob('true, false or "cr"', lambda v: _is_flag(v) or v == "cr", "end lines with CR LF, or CR alone"),
    "comments": Knob(_FLAG, _is_flag, "an SSE comment before each event"),
    "multiline": Knob(_FLAG, _is_flag, "spread the JSON over several data: lines"),
    "usage": Knob(
        f"an object, or one of {', '.join(_USAGES)}",
        lambda v: isinstance(v, dict) or v in _USAGES,
        "what is reported instead of the truth; `lower` goes down while running and ends at half",
    ),
    "cached": Knob(_COUNT, _is_count, "prompt tokens reported as cached"),
    "reasoning": Knob(_COUNT, _is_count, "the first N tokens of each choice are reasoning"),
    "error_before": Knob("a status from 400 to 599", lambda v: _is_count(v) and 400 <= v <= 599, "answer with it"),
    "error_after": Knob(_COUNT, _is_count, "after N content chunks send an error in the stream and end it"),
    "reset_after": Knob(_COUNT, _is_count, "after N content chunks reset the connection"),
    "stall_after": Knob(_COUNT, _is_count, "after N content chunks hang until the client goes away"),
    "gzip": Knob(_FLAG, _is_flag, "compress the answer, asked or not"),
    "fake_usage_text": Knob(_FLAG, _is_flag, "the words look like usage, frames, braces and quotes"),
    "same_id": Knob(_FLAG, _is_flag, "every answer has the same id"),
    "repeat_id": Knob(_FLAG, _is_flag, "the answer's id holds the client's x-request-id (vLLM does, unless false)"),
    "big_event": Knob(_COUNT, _is_count, "pad the first content delta to N bytes"),
    "finish": Knob('"length" or "stop"', lambda v: v in ("length", "stop"), "why the answer ends"),
}


def read_faults(text: str | None, base: Faults) -> Faults:
    """
    Read knobs over the defaults given on the command line.

    >>> read_faults('{"split": 7}', Faults(chunk_ms=5)).chunk_ms
    5
    """
    if text is None:
        return base
    try:
        knobs = orjson.loads(text)
    except orjson.JSONDecodeError as exc:
        raise BadKnob(f"{HEADER} is not JSON: {exc}") from exc
    if not isinstance(knobs, dict):
        raise BadKnob(f"{HEADER} is not a JSON object")
    for name, value in knobs.items():
        if name not in KNOBS:
            raise BadKnob(f"unknown knob `{name}`")
        if not KNOBS[name].accepts(value):
            raise BadKnob(f"knob `{name}` takes {KNOBS[name].takes}, not {value!r}")
    return replace(base, **knobs)
