# SPDX-License-Identifier: Apache-2.0
"""
Spell ids, chat, completions, usage and errors the way each kind of engine does.

vLLM and Dynamo after recordings of 0.32 and 1.6, TensorRT-LLM after its source. The order of keys
follows the engine; null fields that nobody reads are left out.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from http import HTTPStatus
from typing import Final

from . import dialects
from .asks import Path
from .dialects import ERROR_TEXT
from .faults import Faults
from .turns import Count, Frame, Json, Piece, Place, Turn, with_usage

DONE: Final = Frame(b"[DONE]")
_ERROR_WORDS: Final = {400: "BadRequestError", 404: "NotFoundError"}


class Kind:
    """What all kinds share, and the questions each answers in its own way."""

    name: str
    owner: str
    health: Json | None = None
    metrics_path = "/metrics"
    stream_headers = "content-type: text/event-stream\r\n"
    #: An unknown field in a request is an error; `own_fields` are known to this kind alone.
    is_strict = True
    own_fields: frozenset[str] = frozenset()
    stream_options_need_stream = True
    empty_stream_options_ask = True
    repeats_request_id = False
    #: Running usage adds up all choices; else it is that of the chunk's choice alone.
    sums_running_usage = False
    runs_usage_in_messages = False
    ends_every_stream_with_done = False
    reasoning_field = "reasoning_content"
    message_prefix = "msg_"
    #: Name, labels and the counter behind it, a line for each model.
    metrics: tuple[tuple[str, str, str], ...]
    echoes_request_id = False

    def new_id(self, path: str, *, stream: bool) -> str:
        """Make the part of an id that comes after its prefix."""
        return uuid.uuid4().hex

    def response_id(self, path: str, faults: Faults, request_id: str | None, *, stream: bool) -> str:
        """Name an answer."""
        prefixes = {
            Path.CHAT: "chatcmpl-",
            Path.COMPLETIONS: "cmpl-",
            Path.RESPONSES: "resp_",
            Path.EMBEDDINGS: "embd-",
            Path.RERANK: "rerank-",
        }
        prefix = prefixes.get(path, self.message_prefix)
        if faults.same_id:
            return prefix + "0" * 16
        repeats = self.repeats_request_id if faults.repeat_id is None else faults.repeat_id
        return prefix + (request_id if repeats and request_id else self.new_id(path, stream=stream))

    def error(self, status: int, text: str, field: str | None = None) -> Json:
        """Spell an error outside Anthropic's path."""
        raise NotImplementedError

    def no_model(self, model: str, models: list[str]) -> str:
        """Say that there is no such model."""
        return f"The model `{model}` does not exist. Valid aliases: {', '.join(models)}."

    def unknown_field(self, name: str) -> str:
        """Say that a field is not known."""
        return f"Extra inputs are not permitted: {name}"

    def usage(self, path: str, place: Place, count: Count) -> Json:
        """Spell a usage object."""
        match path:
            case Path.RESPONSES:
                usage: Json = {"input_tokens": count.prompt, "input_tokens_details": {"cached_tokens": count.cached}}
                usage |= {"output_tokens": count.output, "output_tokens_details": {"reasoning_tokens": count.reasoning}}
                return usage | {"total_tokens": count.total}
            case Path.MESSAGES:
                return self.messages_usage(place, count)
            case Path.EMBEDDINGS | Path.RERANK:
                return {"prompt_tokens": count.prompt, "total_tokens": count.prompt}
            case Path.IMAGES:
                usage = {"total_tokens": count.total, "input_tokens": count.prompt, "output_tokens": count.output}
                return usage | {"input_tokens_details": {"text_tokens": count.prompt, "image_tokens": 0}}
        return self.openai_usage(path, place, count)

    def messages_usage(self, place: Place, count: Count) -> Json:
        """Spell usage for Anthropic's path."""
        raise NotImplementedError

    def openai_usage(self, path: str, place: Place, count: Count) -> Json:
        """Spell usage for chat and completions."""
        usage = {"prompt_tokens": count.prompt, "total_tokens": count.total, "completion_tokens": count.output}
        return usage | {"prompt_tokens_details": {"cached_tokens": count.cached}}

    def envelope(self, turn: Turn, choices: list[Json], usage: Json | None, place: Place) -> Json:
        """Wrap choices and usage into an answer or a chunk."""
        name = {Path.CHAT: "chat.completion", Path.COMPLETIONS: "text_completion"}[turn.ask.path]
        if turn.ask.path == Path.CHAT and place != "answer":
            name = "chat.completion.chunk"
        payload = {"id": turn.response_id, "object": name, "created": turn.created, "model": turn.ask.model}
        return with_usage(payload | {"choices": choices}, usage)

    def choice(self, turn: Turn, index: int, piece: Piece | None) -> Json:
        """Spell a whole choice, or one piece of it."""
        finish = turn.faults.finish if piece is None or piece.is_last else None
        return {"index": index} | self.body(turn, piece) | {"logprobs": None, "finish_reason": finish}

    def body(self, turn: Turn, piece: Piece | None) -> Json:
        """Spell the text of a choice."""
        if turn.ask.path == Path.COMPLETIONS:
            return {"text": piece.text if piece else turn.text}
        if piece:
            return {"delta": {self.reasoning_field if piece.is_reasoning else "content": piece.text}}
        message = {"role": "assistant", "content": turn.said(reasoning=False), "refusal": None}
        thought = turn.said(reasoning=True)
        return {"message": message | ({self.reasoning_field: thought} if thought else {})}

    def openings(self, turn: Turn) -> Iterator[Frame]:
        """Come before the first token of a chat: the role."""
        raise NotImplementedError

    def closings(self, turn: Turn) -> Iterator[Frame]:
        """Come between the last token and the usage."""
        yield from ()

    def openai_stream(self, turn: Turn) -> Iterator[Frame]:
        """Stream chat or completions."""
        ask, produced = turn.ask, 0
        if ask.path == Path.CHAT:
            yield from self.openings(turn)
        for piece in turn.pieces():
            for index in range(ask.choices):
                produced += piece.tokens
                usage = self.running_usage(turn, produced if self.sums_running_usage else piece.so_far)
                payload = self.envelope(turn, [self.choice(turn, index, piece)], usage, "running")
                yield Frame(payload, tokens=piece.tokens, usage=usage)
        yield from self.closings(turn)
        usage = turn.usage(turn.tokens, "final") if ask.include_usage else None
        if usage is not None:
            yield Frame(self.envelope(turn, [], usage, "final"), usage=usage)
        yield DONE

    def running_usage(self, turn: Turn, output: int) -> Json | None:
        """Report usage along the way, if asked."""
        return turn.usage(output, "running") if turn.ask.continuous_usage else None

    def error_frames(self) -> Iterator[Frame]:
        """End a stream of chat or completions with an error."""
        yield Frame(self.error(500, ERROR_TEXT))
        yield DONE

    # --- What the server asks ------------------------------------------------------------------

    def error_answer(self, path: str, status: int, text: str, field: str | None) -> Json:
        """Spell an error."""
        return dialects.message_error(status, text) if path == Path.MESSAGES else self.error(status, text, field)

    def answer(self, turn: Turn) -> tuple[Json | bytes, Json | None]:
        """Answer in one piece; also give the usage inside."""
        usage = turn.usage(turn.tokens, "answer")
        match turn.ask.path:
            case Path.RESPONSES:
                return dialects.response(turn, dialects.response_status(turn), usage), usage
            case Path.MESSAGES:
                return dialects.message(turn, usage, is_over=True), usage
            case Path.EMBEDDINGS:
                return dialects.embeddings(turn, usage), usage
            case Path.RERANK:
                return dialects.rerank(turn, usage), usage
            case Path.IMAGES:
                return dialects.images(turn, usage), usage
            case Path.SPEECH:
                return dialects.speech(turn), None
        choices = [self.choice(turn, index, None) for index in range(turn.ask.choices)]
        return self.envelope(turn, choices, usage, "answer"), usage

    def stream(self, turn: Turn) -> Iterator[Frame]:
        """Answer in a stream."""
        match turn.ask.path:
            case Path.RESPONSES:
                yield from dialects.response_stream(turn)
            case Path.MESSAGES:
                yield from dialects.message_stream(turn, running_usage=self.runs_usage_in_messages)
            case _:
                yield from self.openai_stream(turn)
                return
        if self.ends_every_stream_with_done:
            yield DONE

    def broken_end(self, turn: Turn, produced: int) -> Iterator[Frame]:
        """End a stream with an error, after so many tokens."""
        match turn.ask.path:
            case Path.RESPONSES:
                usage = turn.usage(produced, "final")
                yield dialects.event("response.failed", {"response": dialects.response(turn, "failed", usage)}, usage)
            case Path.MESSAGES:
                yield Frame(dialects.message_error(500, ERROR_TEXT), "error")
            case _:
                yield from self.error_frames()
                return
        if self.ends_every_stream_with_done:
            yield DONE


class Vllm(Kind):
    """vLLM, with --enable-prompt-tokens-details."""

    name, owner = "vllm", "vllm"
    stream_headers = "content-type: text/event-stream; charset=utf-8\r\n"
    is_strict = False
    repeats_request_id = True
    reasoning_field = "reasoning"
    message_prefix = "chatcmpl-"
    metrics = (
        ("vllm:prompt_tokens_total", 'engine="0",model_name="{}"', "prompt"),
        ("vllm:generation_tokens_total", 'engine="0",model_name="{}"', "output"),
        ("vllm:request_success_total", 'engine="0",finished_reason="length",model_name="{}"', "finished"),
        ("vllm:request_success_total", 'engine="0",finished_reason="abort",model_name="{}"', "client_closed"),
        ("vllm:num_requests_running", 'engine="0",model_name="{}"', "running"),
    )

    def new_id(self, path: str, *, stream: bool) -> str:
        return uuid.uuid4().hex[:16]

    def error(self, status: int, text: str, field: str | None = None) -> Json:
        word = _ERROR_WORDS.get(status, "InternalServerError")
        return {"error": {"message": text, "type": word, "param": field, "code": status}}

    def usage(self, path: str, place: Place, count: Count) -> Json:
        usage = super().usage(path, place, count)
        return usage | {"completion_tokens": 0, "prompt_tokens_details": None} if path == Path.EMBEDDINGS else usage

    def messages_usage(self, place: Place, count: Count) -> Json:
        usage = {"input_tokens": count.prompt, "output_tokens": count.output}
        cache = {"cache_creation_input_tokens": 0, "cache_read_input_tokens": count.cached}
        return usage if place == "first" else usage | cache

    def openai_usage(self, path: str, place: Place, count: Count) -> Json:
        usage = super().openai_usage(path, place, count)
        details = {"reasoning_tokens": count.reasoning} if count.reasoning else None
        if place == "running":
            # Its running usage says nothing of the cache.
            del usage["prompt_tokens_details"]
        elif path == Path.CHAT or place == "answer":
            usage["prompt_tokens_details"] |= {"created_cache_tokens": 0}
        return usage if place == "final" and not details else usage | {"completion_tokens_details": details}

    def envelope(self, turn: Turn, choices: list[Json], usage: Json | None, place: Place) -> Json:
        payload = super().envelope(turn, choices, usage, place)
        return payload if place == "running" else payload | {"system_fingerprint": "vllm-0.32.0-6036ccde"}

    def choice(self, turn: Turn, index: int, piece: Piece | None) -> Json:
        return super().choice(turn, index, piece) | {"stop_reason": None, "token_ids": None}

    def openings(self, turn: Turn) -> Iterator[Frame]:
        usage = self.running_usage(turn, 0)
        for index in range(turn.ask.choices):
            delta = {"role": "assistant", "content": ""}
            choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
            payload = self.envelope(turn, [choice], usage, "running")
            yield Frame(payload | {"prompt_token_ids": None, "prompt_text": None}, usage=usage)


class Dynamo(Kind):
    """NVIDIA Dynamo, with --enable-anthropic-api."""

    name, owner = "dynamo", "nvidia"
    health: Json | None = {"status": "healthy", "endpoints": [], "instances": []}
    stream_headers = "content-type: text/event-stream\r\ncache-control: no-cache\r\n"
    own_fields = frozenset({"nvext"})
    stream_options_need_stream = False
    empty_stream_options_ask = False
    sums_running_usage = True
    runs_usage_in_messages = True
    ends_every_stream_with_done = True
    echoes_request_id = True
    metrics = (
        ("dynamo_frontend_input_sequence_tokens_sum", 'model="{}"', "prompt"),
        ("dynamo_frontend_output_sequence_tokens_sum", 'model="{}"', "output"),
        ("dynamo_frontend_output_tokens_total", 'model="{}"', "output"),
        ("dynamo_frontend_requests_total", 'model="{}",status="success"', "finished"),
        ("dynamo_frontend_model_cancellation_total", 'model="{}"', "client_closed"),
        ("dynamo_frontend_inflight_requests", 'model="{}"', "running"),
    )

    def new_id(self, path: str, *, stream: bool) -> str:
        return uuid.uuid4().hex if path in (Path.RESPONSES, Path.MESSAGES) else str(uuid.uuid4())

    def error(self, status: int, text: str, field: str | None = None) -> Json:
        return {"message": text, "type": HTTPStatus(status).phrase, "code": status}

    def no_model(self, model: str, models: list[str]) -> str:
        return "Model not found"

    def unknown_field(self, name: str) -> str:
        return f"Validation: Unsupported parameter(s): `{name}`"

    def error_frames(self) -> Iterator[Frame]:
        yield Frame(None, "error", comment=ERROR_TEXT)

    def messages_usage(self, place: Place, count: Count) -> Json:
        if place == "first":
            # An estimate: Dynamo knows the truth only at the end.
            guess = count.prompt * 3 // 5 if isinstance(count.prompt, int) else count.prompt
            return {"input_tokens": guess, "output_tokens": 0, "cache_creation_input_tokens": 0}
        usage = {"input_tokens": count.prompt, "output_tokens": count.output, "cache_creation_input_tokens": 0}
        usage |= {"cache_read_input_tokens": count.cached} if count.cached else {}
        return usage | {"total_tokens": count.total} if place == "running" else usage

    def openai_usage(self, path: str, place: Place, count: Count) -> Json:
        details = {"audio_tokens": None} if path == Path.COMPLETIONS else {}
        usage = {"prompt_tokens": count.prompt, "completion_tokens": count.output, "total_tokens": count.total}
        usage |= {"prompt_tokens_details": details | {"cached_tokens": count.cached}}
        reasoning = {"completion_tokens_details": {"reasoning_tokens": count.reasoning}} if count.reasoning else {}
        return usage | reasoning

    def envelope(self, turn: Turn, choices: list[Json], usage: Json | None, place: Place) -> Json:
        plain = super().envelope(turn, choices, usage, place)
        payload = {name: plain[name] for name in ("id", "choices", "created", "model")}
        if turn.ask.path == Path.COMPLETIONS:
            return payload | {"system_fingerprint": None, "object": plain["object"], "usage": usage}
        return with_usage(payload | {"object": plain["object"]}, usage)

    def choice(self, turn: Turn, index: int, piece: Piece | None) -> Json:
        body = self.body(turn, piece)
        if turn.ask.path == Path.COMPLETIONS:
            return body | {"index": index} | ({} if piece else {"finish_reason": turn.faults.finish})
        if piece and piece.so_far == piece.tokens:
            body["delta"]["role"] = "assistant"
        finish = None if piece else turn.faults.finish
        return {"index": index} | body | {"finish_reason": finish, "logprobs": None}

    def openings(self, turn: Turn) -> Iterator[Frame]:
        # The role comes with the first content.
        yield from ()

    def closings(self, turn: Turn) -> Iterator[Frame]:
        usage, finish = self.running_usage(turn, turn.tokens), {"finish_reason": turn.faults.finish}
        for index in range(turn.ask.choices):
            chat = {"index": index, "delta": {}} | finish | {"logprobs": None}
            choice = {"text": "", "index": index} | finish if turn.ask.path == Path.COMPLETIONS else chat
            yield Frame(self.envelope(turn, [choice], usage, "running"), usage=usage)


class TrtLlm(Kind):
    """TensorRT-LLM's own server, with return_perf_metrics."""

    name, owner = "trtllm", "tensorrt_llm"
    metrics_path = "/prometheus/metrics"
    metrics = (
        ("trtllm_prompt_tokens_total", 'model_name="{}",engine_type="undefined"', "prompt"),
        ("trtllm_generation_tokens_total", 'model_name="{}",engine_type="undefined"', "output"),
        ("trtllm_request_success_total", 'model_name="{}",engine_type="undefined"', "finished"),
        ("trtllm_num_requests_running", 'model_name="{}",engine_type="undefined"', "running"),
    )

    def new_id(self, path: str, *, stream: bool) -> str:
        number = uuid.uuid4()
        return str(number.int % 2**31) if stream and path in (Path.CHAT, Path.COMPLETIONS) else number.hex

    def error(self, status: int, text: str, field: str | None = None) -> Json:
        if field is not None and status == HTTPStatus.BAD_REQUEST:
            return {"error": str([{"type": "value_error", "loc": ("body", field), "msg": text}])}
        word = _ERROR_WORDS.get(status, "InternalServerError")
        return {"object": "error", "message": text, "type": word, "param": None, "code": status}

    def messages_usage(self, place: Place, count: Count) -> Json:
        # As with Anthropic itself, cached tokens stand beside the input, not inside it.
        fresh = max(count.prompt - count.cached, 0) if count.cached and count.prompt != "NaN" else count.prompt
        usage = {"input_tokens": fresh, "output_tokens": count.output}
        return usage | {"cache_read_input_tokens": count.cached} if count.cached else usage

    def envelope(self, turn: Turn, choices: list[Json], usage: Json | None, place: Place) -> Json:
        payload = super().envelope(turn, choices, usage, place)
        if turn.ask.path == Path.COMPLETIONS and place == "running":
            return payload | {"usage": usage}
        return payload | ({"prompt_token_ids": None} if turn.ask.path == Path.CHAT and place != "running" else {})

    def choice(self, turn: Turn, index: int, piece: Piece | None) -> Json:
        choice = super().choice(turn, index, piece) | {"stop_reason": None, "disaggregated_params": None}
        if turn.ask.path == Path.CHAT and piece:
            choice = {name: value for name, value in choice.items() if value is not None}
        return choice | {"avg_decoded_tokens_per_iter": 1.0}

    def body(self, turn: Turn, piece: Piece | None) -> Json:
        if piece is None or turn.ask.path == Path.COMPLETIONS:
            return super().body(turn, piece)
        content, thought = ("", piece.text) if piece.is_reasoning else (piece.text, "")
        return {"delta": {"content": content, "reasoning_content": thought}}

    def openings(self, turn: Turn) -> Iterator[Frame]:
        usage = self.running_usage(turn, 0)
        for index in range(turn.ask.choices):
            choice = {"index": index, "delta": {"role": "assistant"}}
            # The space before the line end is TensorRT-LLM's own.
            yield Frame(self.envelope(turn, [choice], usage, "running"), usage=usage, trailer=b" ")


KINDS: Final[dict[str, Kind]] = {kind.name: kind for kind in (Vllm(), Dynamo(), TrtLlm())}
