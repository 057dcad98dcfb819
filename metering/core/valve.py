# SPDX-License-Identifier: Apache-2.0
"""
Let a stream pass for as long as what it delivers is held; write the end of one that may not go on.

Knows the events of each dialect. Must not know who holds what: it says what an event would make of the
sum, and its caller asks. An event is weighed before it passes, so what was not held is not delivered.

Two sums, because not every engine counts as it goes. *delivered* is the engine's running usage or, where it
sends none, one token an event: what is billed. *weight* is what has to be held: the same usage or, where there
is none, a token for each four bytes of generated text, so that an engine which puts more than one into an
event is not let through for nothing.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import orjson

#: An event that is longer passes whole, weighed by its bytes; engines send a few KB.
EVENT_BYTES_MAX: Final = 1 << 20
#: Choices of one answer that are kept apart; the gate lets no more through for one prompt.
CHOICES_MAX: Final = 128
_BYTES_PER_TOKEN: Final = 4
_EVENT_END: Final = re.compile(rb"\r?\n\r?\n|\r\r")
#: Members of a delta that nobody generated.
_NOT_GENERATED: Final = frozenset({"role", "type", "id", "index"})

Json = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighed:
    """One event, and the sums as they would be with it."""

    event: bytes
    document: Json | None
    input: int
    delivered: int
    weight: int
    #: Whether it holds anything that was generated: what does not may always pass.
    generates: bool
    is_reported: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """Why a stream ends before its end, as its caller is told."""

    code: str
    message: str


class Valve:
    """One stream. *held_input* and *held* are the tokens that its admission holds."""

    def __init__(self, *, dialect: str, choices: int, held_input: int, held: int) -> None:
        self._dialect = dialect
        self._choices = choices
        self.held_input = held_input
        self.held = held
        #: As the engine says; 0 until it has.
        self.input = 0
        self.delivered = 0
        self.weight = 0
        #: Whether `delivered` is the engine's own count, as of the last event that held anything.
        self.is_reported = False
        self._pending = b""
        self._last: Json = {}
        self._response: Json = {}
        self._open: dict[int, None] = {}

    def events(self, piece: bytes) -> Iterator[bytes]:
        """Whole events of what has come so far; an unfinished one waits for its end."""
        text, start = self._pending + piece, 0
        # A separator that was split has up to three bytes in what waited.
        searched = max(0, len(self._pending) - 3)
        self._pending = b""
        while found := _EVENT_END.search(text, searched):
            yield text[start : found.end()]
            start = searched = found.end()
        rest = text[start:]
        if len(rest) > EVENT_BYTES_MAX:
            yield rest
        else:
            self._pending = rest

    def rest(self) -> Iterator[bytes]:
        """What waited in vain for its end."""
        rest, self._pending = self._pending, b""
        if rest:
            yield rest

    def weigh(self, event: bytes) -> Weighed:
        """What *event* would make of the sums; it changes nothing."""
        data = _data(event)
        document = _document(data)
        if document is None:
            # What cannot be read may hold anything.
            tokens = 0 if data in (b"", b"[DONE]") else math.ceil(len(data) / _BYTES_PER_TOKEN)
            return self._weighed(event, None, input_=0, delivered=tokens, weight=tokens)
        usage, size = _usage(document), _generated_bytes(document)
        told = _count(usage, "completion_tokens", "output_tokens")
        input_ = _count(usage, "prompt_tokens", "input_tokens") + _cached_beside(usage)
        if told and self._choices == 1:
            return self._weighed(
                event, document, input_=input_, delivered=told - self.delivered if size else 0, weight=told - self.weight,
                generates=size > 0, is_reported=True,
            )  # fmt: skip
        weight = max(math.ceil(size / _BYTES_PER_TOKEN), told - self.weight)
        return self._weighed(event, document, input_=input_, delivered=int(size > 0), weight=weight, generates=size > 0)

    def passes(self, weighed: Weighed) -> bool:
        """Whether what is held pays for it."""
        return weighed.weight <= self.held and weighed.input <= self.held_input

    def input_to_hold(self, weighed: Weighed) -> int:
        """Prompt tokens that a renewal for it asks for: the engine's count, once it is one."""
        # What opens a message may be a guess that only its end corrects.
        if self._dialect == "anthropic.messages" or not weighed.input:
            return max(weighed.input, self.held_input)
        return weighed.input

    def let(self, weighed: Weighed) -> bytes:
        """Take note of an event that goes on to the client."""
        self.input, self.delivered, self.weight = weighed.input, weighed.delivered, weighed.weight
        if weighed.generates:
            self.is_reported = weighed.is_reported
        if weighed.document is not None:
            self._note(weighed.document)
        return weighed.event

    def ending(self, stop: Stop) -> bytes:
        """The rest of the stream: what was begun is closed, why it ends is told, and then its terminator."""
        told = {"code": stop.code, "message": stop.message}
        match self._dialect:
            case "anthropic.messages":
                return self._message_ending(told)
            case "openai.responses":
                return self._response_ending(told)
        return self._choices_ending(told)

    def _weighed(
        self,
        event: bytes,
        document: Json | None,
        *,
        input_: int,
        delivered: int,
        weight: int,
        generates: bool = True,
        is_reported: bool = False,
    ) -> Weighed:
        # Engines have been seen to count backwards; what has passed has passed.
        return Weighed(
            event=event, document=document, input=max(input_, self.input), delivered=self.delivered + max(0, delivered),
            weight=self.weight + max(0, weight), generates=generates and weight > 0, is_reported=is_reported,
        )  # fmt: skip

    def _note(self, document: Json) -> None:
        self._last = document
        for choice in _choices(document):
            index = choice.get("index", 0)
            if not isinstance(index, int):
                continue
            if len(self._open) < CHOICES_MAX:
                self._open[index] = None
            if choice.get("finish_reason"):
                self._open.pop(index, None)
        match document.get("type"):
            case "content_block_start" if isinstance(document.get("index"), int):
                self._open = {document["index"]: None}
            case "content_block_stop":
                self._open = {}
            case "response.created" | "response.in_progress" if isinstance(document.get("response"), dict):
                self._response = document["response"]

    def _choices_ending(self, told: Json) -> bytes:
        is_chat = self._dialect == "openai.chat"
        # Of its envelope whatever the engine writes into each chunk: id, object, created, model.
        envelope = {name: value for name, value in self._last.items() if name not in ("choices", "usage")}
        body: Json = {"delta": {}} if is_chat else {"text": ""}
        choices = [{"index": index, **body, "logprobs": None, "finish_reason": "length"} for index in self._open or (0,)]
        usage = {
            "prompt_tokens": self._input_told, "completion_tokens": self.delivered,
            "total_tokens": self._input_told + self.delivered,
        }  # fmt: skip
        # The usage chunk is hidden on the way from who did not ask for it.
        return b"".join(
            b"data: %b\n\n" % text
            for text in (
                _bytes(envelope | {"choices": choices, "peaje": told}),
                _bytes(envelope | {"choices": [], "usage": usage}),
                b"[DONE]",
            )
        )

    def _message_ending(self, told: Json) -> bytes:
        usage = {"input_tokens": self._input_told, "output_tokens": self.delivered}
        stop = {"stop_reason": "max_tokens", "stop_sequence": None}
        events: list[Json] = [{"type": "content_block_stop", "index": index} for index in self._open]
        events += [{"type": "message_delta", "delta": stop, "usage": usage, "peaje": told}, {"type": "message_stop"}]
        return b"".join(_event(event) for event in events)

    def _response_ending(self, told: Json) -> bytes:
        usage = {
            "input_tokens": self._input_told, "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": self.delivered, "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self._input_told + self.delivered,
        }  # fmt: skip
        response = self._response | {
            "status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}, "usage": usage, "peaje": told,
        }  # fmt: skip
        number = self._last.get("sequence_number")
        sequence = {"sequence_number": number + 1} if isinstance(number, int) else {}
        return _event({"type": "response.incomplete", **sequence, "response": response})

    @property
    def _input_told(self) -> int:
        return self.input or self.held_input


def _data(event: bytes) -> bytes:
    """The data lines of an event, joined; all of an event that was cut for its length."""
    if len(event) > EVENT_BYTES_MAX:
        return event
    return b"\n".join(line[5:].removeprefix(b" ") for line in event.splitlines() if line.startswith(b"data:")).strip()


def _document(data: bytes) -> Json | None:
    """The JSON object in *data*, None if it is none."""
    if not data.startswith(b"{") or len(data) > EVENT_BYTES_MAX:
        return None
    try:
        document = orjson.loads(data)
    except orjson.JSONDecodeError:
        # Half a character, escaped: engines send it where a token ends within one.
        try:
            document = json.loads(data)
        except (ValueError, RecursionError):
            return None
    return document if isinstance(document, dict) else None


def _usage(document: Json) -> Mapping[str, Any]:
    for holder in (document, document.get("message"), document.get("response")):
        usage = holder.get("usage") if isinstance(holder, dict) else None
        if isinstance(usage, dict):
            return usage
    return {}


def _count(usage: Mapping[str, Any], *names: str) -> int:
    for name in names:
        value = usage.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return 0


def _cached_beside(usage: Mapping[str, Any]) -> int:
    """Anthropic counts cached tokens beside the input, OpenAI inside it."""
    return _count(usage, "cache_read_input_tokens") + _count(usage, "cache_creation_input_tokens")


def _choices(document: Json) -> list[Json]:
    choices = document.get("choices")
    return [choice for choice in choices if isinstance(choice, dict)] if isinstance(choices, list) else []


def _generated_bytes(document: Json) -> int:
    if "choices" in document:
        return sum(_bytes_of(choice.get("delta")) + _bytes_of(choice.get("text")) for choice in _choices(document))
    kind = document.get("type")
    # Anthropic's message_delta is about the message, and what a response repeats when a part is done is no more of it.
    is_delta = isinstance(kind, str) and (kind == "content_block_delta" or (kind.startswith("response.") and kind.endswith(".delta")))
    return _bytes_of(document.get("delta")) if is_delta else 0


def _bytes_of(value: object) -> int:
    match value:
        case str():
            return len(value.encode("utf-8", "surrogatepass"))
        case dict():
            return sum(_bytes_of(inner) for name, inner in value.items() if name not in _NOT_GENERATED)
        case list():
            return sum(map(_bytes_of, value))
    return 0


def _event(document: Json) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (document["type"].encode(), _bytes(document))


def _bytes(document: Json) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()
