# SPDX-License-Identifier: Apache-2.0
"""
Know every knob: what it is called, what it takes, what it does.

A knob that is unknown or wrongly set is refused by name: a misspelt fault must not pass as no fault.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final, NamedTuple

import orjson

#: The request header that carries knobs, as a JSON object.
HEADER: Final = "x-fake-engine"
FALSE_USAGES: Final = ("missing", "zero", "negative", "nan", "huge", "lower")


class BadKnob(ValueError):
    """The knobs can not be read; the text names the one at fault."""


class Takes(NamedTuple):
    """The values a knob takes, in words and as a test."""

    words: str
    accepts: Callable[[Any], bool]


COUNT: Final = Takes("a whole number from 0", lambda v: type(v) is int and 0 <= v < 2**31)
SIZE: Final = Takes("a whole number from 1", lambda v: type(v) is int and 1 <= v < 2**31)
MILLISECONDS: Final = Takes("milliseconds, up to an hour", lambda v: type(v) in (int, float) and 0 <= v <= 3_600_000)
FLAG: Final = Takes("true or false", lambda v: type(v) is bool)
STATUS: Final = Takes("a status from 400 to 599", lambda v: type(v) is int and 400 <= v <= 599)
LINE_END: Final = Takes('true, false or "cr"', lambda v: type(v) is bool or v == "cr")
USAGE: Final = Takes(
    f"an object, or one of {', '.join(FALSE_USAGES)}",
    lambda v: v in FALSE_USAGES if type(v) is str else type(v) is dict,
)
FINISH: Final = Takes("length or stop", lambda v: v in ("length", "stop"))


def _knob(default: Any, takes: Takes, does: str) -> Any:
    return field(default=default, metadata={"takes": takes, "does": does})


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """How one answer departs from a prompt and correct one; the defaults depart in nothing."""

    chunk_ms: float = _knob(0, MILLISECONDS, "wait between two content chunks")
    first_ms: float = _knob(0, MILLISECONDS, "wait before the first byte")
    tokens_per_chunk: int = _knob(1, SIZE, "tokens in one content chunk")
    finish: str = _knob("length", FINISH, "why the answer ends")
    cached: int = _knob(0, COUNT, "prompt tokens reported as cached")
    reasoning: int = _knob(0, COUNT, "the first N tokens of each choice are reasoning")
    usage: str | dict[str, Any] | None = _knob(None, USAGE, "what is reported; `lower` falls, ends at half")
    split: int = _knob(0, COUNT, "write the stream in pieces of N bytes, across events")
    coalesce: bool = _knob(False, FLAG, "write the whole stream at once, when it is complete")
    crlf: bool | str = _knob(False, LINE_END, "end the lines of the stream with CR LF, or with CR alone")
    comments: bool = _knob(False, FLAG, "an SSE comment before each event")
    multiline: bool = _knob(False, FLAG, "spread the JSON of an event over several data: lines")
    big_event: int = _knob(0, COUNT, "pad the first content delta to N bytes")
    fake_usage_text: bool = _knob(False, FLAG, "the words look like usage, frames, braces and quotes")
    searches: int = _knob(0, COUNT, "rerank says that N searches were billed")
    gzip: bool = _knob(False, FLAG, "compress the answer, asked or not")
    mislabel: bool = _knob(False, FLAG, "say that the answer is encoded as br, which it is not")
    same_id: bool = _knob(False, FLAG, "every answer has the same id")
    repeat_id: bool | None = _knob(None, FLAG, "the id holds the client's x-request-id; vLLM does unless false")
    error_before: int = _knob(0, STATUS, "answer with this error at once")
    error_after: int | None = _knob(None, COUNT, "after N content chunks send an error in the stream and end it")
    reset_after: int | None = _knob(None, COUNT, "after N content chunks reset the connection")
    stall_after: int | None = _knob(None, COUNT, "after N content chunks hang until the client goes away")

    def break_due(self, chunks: int) -> str | None:
        """Name the break that is due after so many content chunks, if one is."""
        due = {self.error_after: "error", self.reset_after: "reset", self.stall_after: "stall"}
        return due.get(chunks)

    def break_in_unary(self) -> str | None:
        """Name the break of an answer in one piece, of which no chunk is ever out."""
        breaks = {"error": self.error_after, "reset": self.reset_after, "stall": self.stall_after}
        return next((name for name, after in breaks.items() if after is not None), None)


KNOBS: Final = {knob.name: knob.metadata for knob in fields(Faults)}


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
        if not KNOBS[name]["takes"].accepts(value):
            raise BadKnob(f"knob `{name}` takes {KNOBS[name]['takes'].words}, not {value!r}")
    return replace(base, **knobs)
