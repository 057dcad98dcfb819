# SPDX-License-Identifier: Apache-2.0
"""
Read what a request wants and how many tokens that is.

One whitespace-separated word of the prompt is one token, and so is one given token id. A choice has
as many tokens as the request allows, else 16, and an image has 16. A reranker reads its query once with each document.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import orjson

TOKENS_DEFAULT: Final = 16
#: All choices together: an answer is built in memory, so a request has to be bounded somewhere.
TOKENS_MAX: Final = 131_072
VECTOR_SIZE_DEFAULT: Final = 8
#: All vectors of an answer together, for the same reason.
NUMBERS_MAX: Final = 1_000_000


class Path:
    """The paths that generate."""

    CHAT: Final = "/v1/chat/completions"
    COMPLETIONS: Final = "/v1/completions"
    EMBEDDINGS: Final = "/v1/embeddings"
    RESPONSES: Final = "/v1/responses"
    MESSAGES: Final = "/v1/messages"
    RERANK: Final = "/v1/rerank"
    IMAGES: Final = "/v1/images/generations"
    SPEECH: Final = "/v1/audio/speech"


#: Paths whose answers hold no generated tokens.
WITHOUT_OUTPUT: Final = (Path.EMBEDDINGS, Path.RERANK, Path.SPEECH)


#: The fields whose text is the prompt of each path; the first may not be missing.
PROMPT_FIELDS: Final = {
    Path.CHAT: ("messages",),
    Path.COMPLETIONS: ("prompt",),
    Path.EMBEDDINGS: ("input",),
    Path.RESPONSES: ("input", "instructions"),
    Path.MESSAGES: ("messages", "system"),
    Path.RERANK: ("documents", "query"),
    Path.IMAGES: ("prompt",),
    Path.SPEECH: ("input",),
}
#: The fields that bound the answer, the stronger first.
LIMIT_FIELDS: Final = {
    Path.CHAT: ("max_completion_tokens", "max_tokens"),
    Path.COMPLETIONS: ("max_tokens",),
    Path.RESPONSES: ("max_output_tokens",),
    Path.MESSAGES: ("max_tokens",),
}

_SAMPLING = "model stream temperature top_p top_k min_p seed stop user metadata repetition_penalty ignore_eos"
_OPENAI = f"{_SAMPLING} n max_tokens stream_options logprobs frequency_penalty presence_penalty logit_bias min_tokens"
_TOOLS = "tools tool_choice parallel_tool_calls service_tier store reasoning_effort prompt_cache_key"
#: What a kind of engine that refuses unknown fields knows (nvext: Dynamo alone, added by its kind).
FIELDS: Final = {
    path: frozenset(names.split())
    for path, names in {
        Path.CHAT: f"{_OPENAI} {_TOOLS} messages max_completion_tokens top_logprobs response_format",
        Path.COMPLETIONS: f"{_OPENAI} prompt echo suffix best_of",
        Path.EMBEDDINGS: "model input encoding_format dimensions user",
        Path.RESPONSES: f"{_SAMPLING} {_TOOLS} input instructions max_output_tokens previous_response_id "
        "reasoning text truncation include background top_logprobs",
        Path.MESSAGES: f"{_SAMPLING} {_TOOLS} messages system max_tokens stop_sequences thinking",
        Path.RERANK: "model query documents top_n return_documents truncate_prompt_tokens user",
        Path.IMAGES: "model prompt n size quality style response_format background moderation output_format user",
        Path.SPEECH: "model input voice instructions response_format speed stream_format",
    }.items()
}


class Refused(Exception):
    """A request that gets no answer but an error; `field` is set when one field is at fault."""

    def __init__(self, status: int, text: str, *, field: str | None = None, outcome: str = "refused") -> None:
        super().__init__(text)
        self.status, self.text, self.field, self.outcome = status, text, field, outcome


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
    #: Texts of what is searched, shown or spoken; what each path has.
    documents: tuple[object, ...]
    characters: int


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
    prompt_field = PROMPT_FIELDS[path][0]
    if prompt_field not in asked:
        raise Refused(400, "Field required", field=prompt_field)
    prompt = asked[prompt_field]
    prompts = _count_prompts(prompt) if path in (Path.COMPLETIONS, Path.EMBEDDINGS) else 1
    choices = _positive(asked, "n") * prompts if path in (Path.CHAT, Path.COMPLETIONS, Path.IMAGES) else 1
    documents = tuple(prompt) if path == Path.RERANK and isinstance(prompt, list) else ()
    tokens_each = 0
    if path == Path.IMAGES:
        tokens_each = TOKENS_DEFAULT
    elif path not in WITHOUT_OUTPUT:
        limit = next((name for name in LIMIT_FIELDS[path] if asked.get(name) is not None), "max_tokens")
        tokens_each = _positive(asked, limit, default=TOKENS_DEFAULT)
        if choices * tokens_each > TOKENS_MAX:
            raise Refused(400, f"more than {TOKENS_MAX} tokens asked", field=limit)
    vector_size = _positive(asked, "dimensions", default=VECTOR_SIZE_DEFAULT)
    if prompts * vector_size > NUMBERS_MAX:
        raise Refused(400, f"more than {NUMBERS_MAX} numbers asked", field="dimensions")
    stream = asked.get("stream") is True and path in LIMIT_FIELDS
    options = asked.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise Refused(400, "stream_options is not an object", field="stream_options")
    include_usage = options is not None and options.get("include_usage", empty_stream_options_ask) is True
    return Ask(
        path=path,
        model=asked["model"],
        stream=stream,
        prompt_tokens=sum(count_words(asked.get(name)) for name in PROMPT_FIELDS[path])
        + count_words(asked.get("query")) * max(len(documents) - 1, 0),
        choices=choices,
        tokens_each=tokens_each,
        include_usage=include_usage,
        continuous_usage=include_usage and options is not None and options.get("continuous_usage_stats") is True,
        vectors=prompts,
        vector_size=vector_size,
        vectors_as_base64=asked.get("encoding_format") == "base64",
        documents=documents,
        characters=len(prompt) if path == Path.SPEECH and isinstance(prompt, str) else 0,
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
