# SPDX-License-Identifier: Apache-2.0
"""Spell the dialects that every kind of engine spells alike: Responses, Messages, embeddings, rerank, images, speech."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterator
from struct import pack
from typing import Final

from .turns import Frame, Json, Turn, with_usage

ERROR_TEXT: Final = "injected error"
_ITEM: Final = "msg_0"


def event(name: str, payload: Json, usage: Json | None = None, *, tokens: int = 0) -> Frame:
    """Make an event whose name is also its type."""
    return Frame({"type": name} | payload, name, tokens, usage)


def response(turn: Turn, status: str, usage: Json | None) -> Json:
    """Spell a Responses object; it has output once it is over and well."""
    output = []
    if status in ("completed", "incomplete"):
        part: Json = {"type": "output_text", "text": turn.text, "annotations": [], "logprobs": None}
        output = [{"id": _ITEM, "type": "message", "role": "assistant", "status": "completed", "content": [part]}]
    return {
        "id": turn.response_id,
        "object": "response",
        "created_at": turn.created,
        "model": turn.ask.model,
        "status": status,
        "error": {"code": "server_error", "message": ERROR_TEXT} if status == "failed" else None,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "output": output,
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "usage": usage,
    }


def response_status(turn: Turn) -> str:
    """Say how a response ends."""
    return "incomplete" if turn.faults.finish == "length" else "completed"


def response_stream(turn: Turn) -> Iterator[Frame]:
    """Stream a response; only its last event has usage."""
    for number, frame in enumerate(_response_events(turn)):
        yield frame._replace(data=frame.data | {"sequence_number": number})  # type: ignore[operator]


def _response_events(turn: Turn) -> Iterator[Frame]:
    at: Json = {"item_id": _ITEM, "output_index": 0, "content_index": 0}
    part: Json = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    item: Json = {"id": _ITEM, "type": "message", "role": "assistant", "status": "in_progress", "content": []}
    yield event("response.created", {"response": response(turn, "in_progress", None)})
    yield event("response.in_progress", {"response": response(turn, "in_progress", None)})
    yield event("response.output_item.added", {"output_index": 0, "item": item})
    yield event("response.content_part.added", at | {"part": part})
    for piece in turn.pieces():
        yield event("response.output_text.delta", at | {"delta": piece.text, "logprobs": []}, tokens=piece.tokens)
    full = part | {"text": turn.text}
    item |= {"status": "completed", "content": [full]}
    yield event("response.output_text.done", at | {"text": turn.text, "logprobs": []})
    yield event("response.content_part.done", at | {"part": full})
    yield event("response.output_item.done", {"output_index": 0, "item": item})
    usage, status = turn.usage(turn.tokens, "final"), response_status(turn)
    yield event(f"response.{status}", {"response": response(turn, status, usage)}, usage)


def message(turn: Turn, usage: Json | None, *, is_over: bool) -> Json:
    """Spell an Anthropic message; while it runs it has no content and no reason to stop."""
    payload: Json = {"id": turn.response_id, "type": "message", "role": "assistant", "model": turn.ask.model}
    content = [{"type": "text", "text": turn.text}] if is_over else []
    payload |= {"content": content, "stop_reason": stop_reason(turn) if is_over else None, "stop_sequence": None}
    return with_usage(payload, usage)


def stop_reason(turn: Turn) -> str:
    """Say why a message ends."""
    return "max_tokens" if turn.faults.finish == "length" else "end_turn"


def message_stream(turn: Turn, *, running_usage: bool) -> Iterator[Frame]:
    """Stream a message; the truth is in its message_delta."""
    usage = turn.usage(0, "first")
    yield event("message_start", {"message": message(turn, usage, is_over=False)}, usage)
    yield event("content_block_start", {"index": 0, "content_block": {"type": "text", "text": ""}})
    for piece in turn.pieces():
        usage = turn.usage(piece.so_far, "running") if running_usage else None
        payload = with_usage({"index": 0, "delta": {"type": "text_delta", "text": piece.text}}, usage)
        yield event("content_block_delta", payload, usage, tokens=piece.tokens)
    yield event("content_block_stop", {"index": 0})
    usage = turn.usage(turn.tokens, "final")
    stop = {"stop_reason": stop_reason(turn), "stop_sequence": None}
    yield event("message_delta", with_usage({"delta": stop}, usage), usage)
    yield event("message_stop", {})


def message_error(status: int, text: str) -> Json:
    """Spell an error the way Anthropic does."""
    word = {400: "invalid_request_error", 404: "not_found_error"}.get(status, "api_error")
    return {"type": "error", "error": {"type": word, "message": text}}


def embeddings(turn: Turn, usage: Json | None) -> Json:
    """Make small vectors, no two alike."""
    ask, data = turn.ask, []
    for index in range(ask.vectors):
        vector = [(index + 1) / (place + 2) for place in range(ask.vector_size)]
        packed = b64encode(pack(f"<{ask.vector_size}f", *vector)).decode() if ask.vectors_as_base64 else vector
        data.append({"index": index, "object": "embedding", "embedding": packed})
    head = {"id": turn.response_id, "object": "list", "created": turn.created, "model": ask.model}
    return with_usage(head | {"data": data}, usage)


def rerank(turn: Turn, usage: Json | None) -> Json:
    """Rank documents in the order in which they came, as vLLM spells it; what was billed as Cohere does."""
    results = [
        {"index": index, "document": {"text": str(text)}, "relevance_score": 1 / (index + 1)}
        for index, text in enumerate(turn.ask.documents)
    ]
    billed = {"meta": {"billed_units": {"search_units": turn.faults.searches}}} if turn.faults.searches else {}
    return with_usage({"id": turn.response_id, "model": turn.ask.model, "results": results} | billed, usage)


def images(turn: Turn, usage: Json | None) -> Json:
    """Make images of which nobody has to see anything; their prompt is told again, as some engines do."""
    image = {"b64_json": b64encode(turn.text.encode()).decode(), "revised_prompt": turn.text}
    return with_usage({"created": turn.created, "data": [image] * turn.ask.choices}, usage)


def speech(turn: Turn) -> bytes:
    """Make as much sound as there is to be said."""
    return b"\xff\xfb" + b"\x00" * (32 * turn.ask.characters)
