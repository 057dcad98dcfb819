# SPDX-License-Identifier: Apache-2.0
"""
Read what a request wants and how many tokens that is.

One whitespace-separated word of the prompt is one token, and so is one given token id. A choice has
as many tokens as the request allows, else 16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import orjson

TOKENS_DEFAULT: Final = 16
#: All choices together: an answer is built in memory, so a request has to be bounded somewhere.
TOKENS_MAX: Final = 1_000_000
VECTOR_SIZE_DEFAULT: Final = 8

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
#: The field that holds the prompt of each path, which may not be missing.
PROMPT_FIELD: Final = {
    CHAT: "messages",
    COMPLETIONS: "prompt",
    EMBEDDINGS: "input",
    RESPONSES: "input",
    MESSAGES: "messages",
}

_SAMPLING = "model stream temperature top_p top_k min_p seed stop user metadata repetition_penalty ignore_eos min_tokens"
_OPENAI = f"{_SAMPLING} n max_tokens stream_options logprobs frequency_penalty presence_penalty logit_bias"
_TOOLS = "tools tool_choice parallel_tool_calls service_tier store reasoning_effort prompt_cache_key safety_identifier"
#: What a kind of engine that refuses unknown fields knows (nvext: Dynamo alone, added by its kind).
FIELDS: Final = {
    path: frozenset(names.split())
    for path, names in {
        CHAT: f"{_OPENAI} {_TOOLS} messages max_completion_tokens top_logprobs response_format chat_template_kwargs",
        COMPLETIONS: f"{_OPENAI} prompt echo suffix best_of",
        EMBEDDINGS: "model input encoding_format dimensions user",
        RESPONSES: f"{_SAMPLING} {_TOOLS} input instructions max_output_tokens max_tool_calls previous_response_id "
        "reasoning text truncation include background top_logprobs",
        MESSAGES: f"{_SAMPLING} {_TOOLS} messages system max_tokens stop_sequences thinking",
    }.items()
}


class Refused(Exception):
    """A request that gets no answer but an error; `field` is set when one field is at fault."""

    def __init__(self, status: int, message: str, *, field: str | None = None, outcome: str = "refused") -> None:
        super().__init__(message)
        self.status, self.message, self.field, self.outcome = status, message, field, outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What one request wants."""

    path: str
    model: str
    stream: bool
    prompt_tokens: int
    #: Answers side by side: n, times the prompts of a completion.
    choices: int
    tokens_each: int
    include_usage: bool
    continuous_usage: bool
    #: Embeddings only.
    vectors: int
    vector_size: int
    vectors_as_base64: bool


def count_words(value: object) -> int:
    """
    Count the tokens of a prompt, however deep its text lies.

    >>> count_words([{"role": "user", "content": [{"type": "text", "text": "one two"}]}])
    2
    """
    match value:
        case str():
            return len(value.split())
        case int():
            return 1
        case list():
            return sum(map(count_words, value))
        case dict():
            return count_words(value.get("content")) + count_words(value.get("text"))
    return 0


def read_body(body: bytes) -> dict[str, Any]:
    """Parse a request body, which has to be a JSON object."""
    try:
        asked = orjson.loads(body)
    except orjson.JSONDecodeError as exc:
        raise Refused(400, f"JSON decode error: {exc}", field="body") from exc
    if not isinstance(asked, dict):
        raise Refused(400, "the body is not a JSON object", field="body")
    return asked


def read_ask(path: str, asked: dict[str, Any], *, empty_stream_options_ask: bool) -> Ask:
    """Read a request; `empty_stream_options_ask` says what `stream_options: {}` means to this kind."""
    if PROMPT_FIELD[path] not in asked:
        raise Refused(400, "Field required", field=PROMPT_FIELD[path])
    prompt = asked[PROMPT_FIELD[path]]
    prompts = _count_prompts(prompt) if path in (COMPLETIONS, EMBEDDINGS) else 1
    choices = _positive(asked, "n") * prompts if path in (CHAT, COMPLETIONS) else 1
    limit = next((name for name in ("max_completion_tokens", "max_output_tokens") if asked.get(name)), "max_tokens")
    tokens_each = _positive(asked, limit, default=TOKENS_DEFAULT) if path != EMBEDDINGS else 0
    if choices * tokens_each > TOKENS_MAX:
        raise Refused(400, f"more than {TOKENS_MAX} tokens asked", field=limit)
    stream = asked.get("stream") is True and path != EMBEDDINGS
    options = asked.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise Refused(400, "stream_options is not an object", field="stream_options")
    include_usage = options is not None and options.get("include_usage", empty_stream_options_ask) is True
    return Ask(
        path=path,
        model=asked["model"],
        stream=stream,
        prompt_tokens=sum(count_words(asked.get(name)) for name in (PROMPT_FIELD[path], "system", "instructions")),
        choices=choices,
        tokens_each=tokens_each,
        include_usage=include_usage,
        continuous_usage=include_usage and options is not None and options.get("continuous_usage_stats") is True,
        vectors=prompts,
        vector_size=_positive(asked, "dimensions", default=VECTOR_SIZE_DEFAULT),
        vectors_as_base64=asked.get("encoding_format") == "base64",
    )


def _count_prompts(prompt: object) -> int:
    """Several prompts are a list of texts or of lists of token ids; a list of token ids is one."""
    if not isinstance(prompt, list) or not prompt or type(prompt[0]) is int:
        return 1
    return len(prompt)


def _positive(asked: dict[str, Any], name: str, *, default: int = 1) -> int:
    value = asked.get(name)
    if value is None:
        return default
    if type(value) is not int or value < 1:
        raise Refused(400, f"{name} must be at least 1", field=name)
    return value
