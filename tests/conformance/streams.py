# SPDX-License-Identifier: Apache-2.0
"""Spell answers as each kind of model server does, with the fake engine's own builders."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from tests.fake_engine.asks import LIMIT_FIELDS, WITHOUT_OUTPUT, Path, read_ask
from tests.fake_engine.faults import Faults
from tests.fake_engine.kinds import KINDS
from tests.fake_engine.server import encode_event, encode_json
from tests.fake_engine.turns import Frame, Turn

#: Five words, so five tokens of prompt.
PROMPT = "how far is the bridge"
PROMPT_TOKENS = 5

_PROMPTS: dict[str, dict[str, Any]] = {
    Path.CHAT: {"messages": [{"role": "user", "content": PROMPT}]},
    Path.COMPLETIONS: {"prompt": PROMPT},
    Path.RESPONSES: {"input": PROMPT},
    Path.MESSAGES: {"messages": [{"role": "user", "content": PROMPT}]},
    Path.EMBEDDINGS: {"input": PROMPT},
    Path.RERANK: {"query": "how far", "documents": ["is the bridge"]},
    Path.IMAGES: {"prompt": PROMPT},
}
_LIMITS = {Path.RESPONSES: "max_output_tokens"}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer as bytes, the frames behind it, and the tokens it really holds."""

    body: bytes
    frames: tuple[Frame, ...]
    output: int

    @property
    def pieces(self) -> list[bytes]:
        """The answer as it comes over a quiet network: a piece for each event."""
        return [encode_event(frame, Faults()) for frame in self.frames]


def stream(
    kind: str, path: str, *, usage: str = "final", tokens: int = 3, choices: int = 1, faults: Faults | None = None
) -> Answer:
    """Stream an answer to a request that the gateway has shaped to report usage: "no", "final" or "running"."""
    faults = faults or Faults()
    turn = _turn(kind, path, faults, usage=usage, tokens=tokens, choices=choices, is_stream=True)
    frames = tuple(KINDS[kind].stream(turn))
    body = b"".join(encode_event(frame, faults) for frame in frames)
    return Answer(body=body, frames=frames, output=turn.tokens)


def whole(kind: str, path: str, *, tokens: int = 3, choices: int = 1, faults: Faults | None = None) -> Answer:
    """Answer in one piece."""
    faults = faults or Faults()
    turn = _turn(kind, path, faults, usage="no", tokens=tokens, choices=choices, is_stream=False)
    payload, _ = KINDS[kind].answer(turn)
    assert isinstance(payload, dict)
    return Answer(body=encode_json(payload, faults), frames=(), output=0 if path in WITHOUT_OUTPUT else turn.tokens)


def events(body: bytes) -> list[tuple[str | None, str]]:
    """Read server-sent events as a browser does: (event name, data) of each that has data."""
    lines = body.replace(b"\r\n", b"\n").replace(b"\r", b"\n").decode().split("\n")
    found: list[tuple[str | None, str]] = []
    name: str | None = None
    data: list[str] = []
    for line in lines:
        if line == "":
            if data:
                found.append((name, "\n".join(data)))
            name, data = None, []
            continue
        field, _, value = line.partition(":")
        if field == "event":
            name = value.removeprefix(" ")
        elif field == "data":
            data.append(value.removeprefix(" "))
    return found


def documents(body: bytes) -> list[Any]:
    """Parse the JSON of each event but the terminator."""
    return [json.loads(data) for _, data in events(body) if data.strip() != "[DONE]"]


def _turn(kind: str, path: str, faults: Faults, *, usage: str, tokens: int, choices: int, is_stream: bool) -> Turn:
    asked: dict[str, Any] = {"model": "tiny"} | _PROMPTS[path]
    if path in LIMIT_FIELDS:
        asked[_LIMITS.get(path, "max_tokens")] = tokens
    if path in (Path.CHAT, Path.COMPLETIONS, Path.IMAGES):
        asked["n"] = choices
    if is_stream:
        asked["stream"] = True
        if usage != "no" and path in (Path.CHAT, Path.COMPLETIONS):
            asked["stream_options"] = {"include_usage": True, "continuous_usage_stats": usage == "running"}
    return Turn(
        ask=read_ask(path, asked, empty_stream_options_ask=KINDS[kind].empty_stream_options_ask),
        faults=faults,
        response_id="answer-1",
        created=1_700_000_000,
        spell_usage=KINDS[kind].usage,
    )
