# SPDX-License-Identifier: Apache-2.0
"""Reading a request: the facts are those of any JSON parser, or the request is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conformance.road import read_request

#: Those that are metered by tokens alone.
DIALECTS = ("openai.chat", "openai.completions", "openai.embeddings", "openai.responses", "anthropic.messages")
LIMITS = {
    "openai.chat": ("max_completion_tokens", "max_tokens"),
    "openai.completions": ("max_tokens",),
    "openai.embeddings": (),
    "openai.responses": ("max_output_tokens",),
    "anthropic.messages": ("max_tokens",),
}
PLAIN = {"model": "m", "stream": False, "output_tokens_max": 0, "choices": 1, "wants_usage": "no", "shape": "no"}


def facts_of(document: dict[str, Any], dialect: str) -> dict[str, Any]:
    """Compute what request.lua must say of a *document* that it does not refuse."""
    limits = [document[name] for name in LIMITS[dialect] if document.get(name) is not None]
    choices = max(1, document.get("n") or 1, document.get("best_of") or 1)
    prompt = document.get("prompt")
    if dialect == "openai.completions" and isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list | dict):
        choices *= len(prompt)
    options = document.get("stream_options")
    wants = "no"
    if isinstance(options, dict) and options.get("include_usage") is not False:
        if options.get("continuous_usage_stats") is True:
            wants = "running"
        elif options.get("include_usage") is True:
            wants = "final"
    is_stream = document.get("stream") is True
    return {
        "model": document["model"],
        "stream": is_stream,
        "output_tokens_max": limits[0] if limits else 0,
        "choices": choices,
        "wants_usage": wants,
        "shape": shape_of(document) if is_stream and dialect in ("openai.chat", "openai.completions") else "no",
    }


def shape_of(document: dict[str, Any]) -> str:
    """Say who asks the engine for usage in a stream of *document*."""
    if "stream_options" not in document:
        return "insert"
    options = document["stream_options"]
    if options is None:
        return "replace"
    if not isinstance(options, dict):
        return "no"
    is_known = all(
        name in ("include_usage", "continuous_usage_stats") and (value is None or isinstance(value, bool))
        for name, value in options.items()
    )
    return "replace" if is_known else "service"


@pytest.mark.parametrize(
    ("body", "dialect", "expected"),
    [
        ('{"model":"m"}', "openai.chat", {}),
        (' \t\r\n{ "model" : "m" }\n', "openai.chat", {}),
        ('{"model":"m","stream":true}', "openai.chat", {"stream": True, "shape": "insert"}),
        ('{"model":"m","stream":true}', "openai.completions", {"stream": True, "shape": "insert"}),
        ('{"model":"m","stream":true}', "openai.responses", {"stream": True}),
        ('{"model":"m","stream":true}', "anthropic.messages", {"stream": True}),
        ('{"model":"m","stream":null,"max_tokens":null,"n":null,"background":null}', "openai.chat", {}),
        ('{"model":"m","max_tokens":16}', "openai.chat", {"output_tokens_max": 16}),
        ('{"model":"m","max_completion_tokens":16,"max_tokens":16}', "openai.chat", {"output_tokens_max": 16}),
        ('{"model":"m","max_output_tokens":16,"max_tokens":9}', "openai.responses", {"output_tokens_max": 16}),
        ('{"model":"m","max_tokens":10000000}', "openai.chat", {"output_tokens_max": 10_000_000}),
        ('{"model":"m","n":128}', "openai.chat", {"choices": 128}),
        ('{"model":"m","n":2,"best_of":5}', "openai.completions", {"choices": 5}),
        ('{"model":"m","prompt":["a","b","c"]}', "openai.completions", {"choices": 3}),
        ('{"model":"m","n":2,"prompt":["a","]\\"","c"]}', "openai.completions", {"choices": 6}),
        ('{"model":"m","prompt":[[1,2],[3]]}', "openai.completions", {"choices": 2}),
        ('{"model":"m","prompt":[1,2,3]}', "openai.completions", {}),
        ('{"model":"m","prompt":[]}', "openai.completions", {}),
        ('{"model":"m","prompt":["a","b"]}', "openai.chat", {}),
        ('{"model":"m","stream_options":{"include_usage":true}}', "openai.chat", {"wants_usage": "final"}),
        ('{"model":"m","stream_options":{"include_usage":false}}', "openai.chat", {}),
        ('{"model":"m","stream_options":{}}', "openai.chat", {}),
        ('{"model":"m","stream_options":null}', "openai.chat", {}),
        (
            '{"model":"m","stream_options":{"include_usage":true,"continuous_usage_stats":true}}',
            "openai.chat",
            {"wants_usage": "running"},
        ),
        ('{"model":"m","stream_options":{"include_usage":false,"continuous_usage_stats":true}}', "openai.chat", {}),
        (r'{"model":"meta-llama\/Llama-3.1"}', "openai.chat", {"model": "meta-llama/Llama-3.1"}),
        (r'{"model":"\u0067pt"}', "openai.chat", {"model": "gpt"}),
        (r'{"mod\u0065l":"m"}', "openai.chat", {}),
        (r'{"model":"a\"b\\c"}', "openai.chat", {"model": 'a"b\\c'}),
        (r'{"x":"\\","model":"m"}', "openai.chat", {}),
        ('{"messages":[{"model":"other","stream":true,"n":9}],"model":"m"}', "openai.chat", {}),
        (r'{"messages":"\",\"model\":\"other\"","model":"m"}', "openai.chat", {}),
        ('{"model":"m","x":-1.5e300,"y":true,"z":{"a":[{}]}}', "openai.chat", {}),
    ],
)  # fmt: skip
def test_facts_of_a_good_request(body: str, dialect: str, expected: dict[str, Any]) -> None:
    """What decisions depend on is read as any JSON parser reads it."""
    facts, refusal = read_request(body.encode(), dialect)

    assert refusal is None
    assert PLAIN | expected == facts


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ("", None), ("null", None), ("[]", None), ('"m"', None), ("{", None), ('{"model":"m"', None),
        ('{"model":"m"}x', None), ('{"model":"m"}{"model":"n"}', None), ('{"model":"m"}\0', None),
        ('\ufeff{"model":"m"}', None), ('{"model":"m",}', None), ('{"model":"m" "n":1}', None),
        ("{'model':'m'}", None), ('{model:"m"}', None), ('{"model"}', None), ('{"model":}', None),
        ('{"model":"m","model":"n"}', None), ('{"model":"m","model":"m"}', None),
        (r'{"model":"m","mod\u0065l":"n"}', None), (r'{"stream":true,"str\u0065am":false,"model":"m"}', None),
        ('{"model":"m","max_tokens":1,"max_tokens":99999}', None),
        (r'{"mod\qel":"m"}', None), (r'{"mod\u00":"m"}', None),
        ("{}", "model"), ('{"model":null}', "model"), ('{"model":7}', "model"), ('{"model":["m"]}', "model"),
        ('{"model":""}', "model"), (r'{"model":"\x"}', "model"), (r'{"model":"\u12"}', "model"),
        ('{"model":"m","stream":1}', "stream"), ('{"model":"m","stream":"true"}', "stream"),
        ('{"model":"m","stream":True}', "stream"), ('{"model":"m","stream":NaN}', "stream"),
        ('{"model":"m","background":true}', "background"), ('{"model":"m","background":1}', "background"),
        ('{"model":"m","max_tokens":0}', "max_tokens"), ('{"model":"m","max_tokens":-1}', "max_tokens"),
        ('{"model":"m","max_tokens":1.5}', "max_tokens"), ('{"model":"m","max_tokens":1e3}', "max_tokens"),
        ('{"model":"m","max_tokens":"10"}', "max_tokens"), ('{"model":"m","max_tokens":NaN}', "max_tokens"),
        ('{"model":"m","max_tokens":1000000000000000000}', "max_tokens"),
        ('{"model":"m","max_tokens":10000001}', "max_tokens"), ('{"model":"m","max_tokens":[1]}', "max_tokens"),
        ('{"model":"m","max_tokens":true}', "max_tokens"), ('{"model":"m","max_tokens":0x10}', "max_tokens"),
        ('{"model":"m","max_tokens":5,"max_completion_tokens":6}', "max_tokens"),
        ('{"model":"m","n":0}', "n"), ('{"model":"m","n":129}', "n"), ('{"model":"m","best_of":"2"}', "best_of"),
        ('{"model":"m","stream_options":{"include_usage":true,"include_usage":false}}', "stream_options"),
    ],
    ids=lambda value: repr(value)[:60],
)  # fmt: skip
def test_a_request_that_can_be_read_two_ways_is_refused(body: str, param: str | None) -> None:
    """Duplicates, other text, wrong types and numbers out of range are refused with the name of the member."""
    facts, refusal = read_request(body.encode())

    assert facts is None
    assert (400, "invalid_request", param) == (refusal["status"], refusal["code"], refusal.get("param"))


@pytest.mark.parametrize("name", ["previous_response_id", "conversation"])
def test_what_a_model_server_remembers_of_anybody_is_not_asked_of_it(name: str) -> None:
    """It would give one tenant another's answer; null asks for nothing, and other dialects have no such member."""
    facts, refusal = read_request(f'{{"model":"m","{name}":"resp_1"}}'.encode(), "openai.responses")
    assert facts is None
    assert (400, "invalid_request", name) == (refusal["status"], refusal["code"], refusal["param"])

    for text, dialect in ((f'{{"model":"m","{name}":null}}', "openai.responses"), (f'{{"model":"m","{name}":"x"}}', "openai.chat")):
        facts, refusal = read_request(text.encode(), dialect)
        assert (True, None) == (facts is not None, refusal)


@pytest.mark.parametrize(
    "model",
    ["gрt-4", "m\u200b", "a b", " m", "m\n", "m\t", "\x00", "m\x7f", "モデル", "\U0001f600", "m" * 201],
    ids=ascii,
)
@pytest.mark.parametrize("is_ascii", [True, False], ids=["escaped", "raw"])
def test_a_model_that_no_name_can_be_is_not_found(model: str, is_ascii: bool) -> None:
    """A name is 1 to 200 printable ASCII characters: confusables and control characters never reach a policy."""
    _, refusal = read_request(json.dumps({"model": model}, ensure_ascii=is_ascii).encode())

    assert (404, "model_not_found", "model") == (refusal["status"], refusal["code"], refusal["param"])


@pytest.mark.parametrize("name", ["../m", "m/../n", "M", "m" * 200, "~", "!"])
def test_an_odd_name_is_a_name(name: str) -> None:
    """Whether such a model exists is for the list of models to say; it is read exactly."""
    facts, _ = read_request(json.dumps({"model": name}).encode())

    assert name == facts["model"]


@pytest.mark.parametrize(("depth", "is_read"), [(199, True), (200, True), (201, False), (10_000, False)])
def test_nesting_is_bounded(depth: int, is_read: bool) -> None:
    """200 levels inside a member pass, 201 do not."""
    facts, _ = read_request(b'{"model":"m","x":' + b"[" * depth + b"]" * depth + b"}")

    assert is_read == (facts is not None)


@pytest.mark.parametrize(("count", "is_read"), [(499, True), (500, True), (501, False)])
def test_the_number_of_members_is_bounded(count: int, is_read: bool) -> None:
    """500 members pass, 501 do not."""
    members = {"model": "m"} | {f"k{i}": i for i in range(count - 1)}

    facts, _ = read_request(json.dumps(members).encode())

    assert is_read == (facts is not None)


@pytest.mark.parametrize(("length", "is_read"), [(999, True), (1000, True), (1001, False)])
def test_the_length_of_a_key_is_bounded(length: int, is_read: bool) -> None:
    """A key of 1000 bytes passes, one of 1001 does not."""
    facts, _ = read_request(json.dumps({"model": "m", "k" * length: 1}).encode())

    assert is_read == (facts is not None)


@pytest.mark.parametrize(("count", "is_read"), [(2047, True), (2048, True), (2049, False), (100_000, False)])
def test_the_number_of_prompts_is_bounded(count: int, is_read: bool) -> None:
    """2048 prompts pass, 2049 do not; token ids are one prompt, however many."""
    texts, _ = read_request(json.dumps({"model": "m", "prompt": ["a"] * count}).encode(), "openai.completions")
    ids, _ = read_request(json.dumps({"model": "m", "prompt": [7] * count}).encode(), "openai.completions")

    assert is_read == (texts is not None)
    assert ids is not None and ids["choices"] == 1


@pytest.mark.timeout(10)
@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"m","x":"' + b'\\"' * 1_000_000 + b'"}',
        b'{"model":"m","x":"' + b"\\\\" * 1_000_000 + b'"}',
        b'{"model":"m"' + b" " * 2_000_000 + b"}",
        b'{"model":"m","x":[' + b"[]," * 500_000 + b"[]]}",
        b'{"model":"m","prompt":[' + b"1," * 1_000_000 + b"1]}",
        b'{"model":"m",' + b",".join(b'"%d":1' % i for i in range(200_000)) + b"}",
        b'{"model":"m","' + b"\\n" * 1_000_000 + b'":1}',
        b'{"model":"' + b"x" * 2_000_000 + b'"}',
        b'{"model":"m","max_tokens":' + b"9" * 2_000_000 + b"}",
    ],
    ids=["quotes", "backslashes", "space", "arrays", "numbers", "keys", "long_key", "long_model", "long_number"],
)
def test_hostile_bodies_cost_no_more_than_their_length(body: bytes) -> None:
    """Two megabytes of anything are read or refused in linear time: the gate runs on Envoy's own threads."""
    facts, refusal = read_request(body, "openai.completions")

    assert (facts is None) != (refusal is None)


_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 200)
    | st.sampled_from([10**7, 10**7 + 1, 10**30, 1.5, "true", "10", '"', "\\", '{"model":"x"}'])
    | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
_OPTIONS = st.dictionaries(st.sampled_from(["include_usage", "continuous_usage_stats", "x"]), _VALUES | st.booleans())
_KNOWN = st.fixed_dictionaries(
    {"model": st.sampled_from(["m", "org/name", 'q"', "back\\slash"]) | _VALUES},
    optional={
        "stream": st.booleans() | _VALUES,
        "max_tokens": st.integers(1, 100) | _VALUES,
        "max_completion_tokens": st.integers(1, 100) | _VALUES,
        "max_output_tokens": st.integers(1, 100) | _VALUES,
        "n": st.integers(1, 128) | _VALUES,
        "best_of": st.integers(1, 128) | _VALUES,
        "prompt": st.lists(st.text(max_size=4), max_size=4) | st.lists(st.lists(st.integers())) | _VALUES,
        "background": st.none() | st.just(False),
        "stream_options": _OPTIONS | _VALUES,
    },
)
_UNKNOWN = st.dictionaries(st.text(max_size=6), _VALUES, max_size=3)


def escape_keys(text: str, count: int) -> str:
    """Spell the first *count* letters `e` of a JSON text as escapes, which changes the words `true` and `false` not at all."""
    spelled = text.replace("true", "tru\0").replace("false", "fals\0").replace("e", r"\u0065", count)
    return spelled.replace("\0", "e")


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    known=_KNOWN, unknown=_UNKNOWN, dialect=st.sampled_from(DIALECTS), is_ascii=st.booleans(),
    indent=st.sampled_from([None, 1]), escapes=st.integers(0, 3), is_shuffled=st.booleans(),
)  # fmt: skip
def test_facts_are_what_python_reads(
    known: dict, unknown: dict, dialect: str, is_ascii: bool, indent: int | None, escapes: int, is_shuffled: bool
) -> None:
    """For any JSON object, in any spelling, the facts equal what a second parser reads, or it is refused."""
    document = unknown | known if is_shuffled else known | {k: v for k, v in unknown.items() if k not in known}
    body = json.dumps(document, ensure_ascii=is_ascii, indent=indent)
    spelled = escape_keys(body, escapes)
    try:
        is_same = json.loads(spelled) == document
    except ValueError:
        is_same = False

    facts, refusal = read_request((spelled if is_same else body).encode(), dialect)

    assert (facts is None) != (refusal is None)
    if facts is not None:
        assert facts_of(document, dialect) == facts


@settings(max_examples=200, deadline=None, derandomize=True)
@given(body=st.binary(max_size=60) | st.text(alphabet='{}[]":,\\u0 model"stream1', max_size=40).map(str.encode))
def test_any_bytes_are_read_or_refused(body: bytes) -> None:
    """No body makes the gate fail: a script error would close the road for that request with 503 instead of 400."""
    facts, refusal = read_request(body)

    assert (facts is None) != (refusal is None)


RERANK = {"model": "m", "query": "q", "documents": ["a", "b"]}


@pytest.mark.parametrize(
    ("document", "dialect", "quantity", "repeated"),
    [
        (RERANK, "rerank", 1, 1),
        (RERANK | {"documents": ["a"]}, "rerank", 1, 0),
        (RERANK | {"documents": [{"text": "a"}] * 100, "query": "four"}, "rerank", 1, 99 * 4),
        (RERANK | {"documents": ["a"] * 101}, "rerank", 2, 100),
        (RERANK | {"documents": ["a"] * 2048}, "rerank", 21, 2047),
        ({"model": "m", "prompt": "p"}, "openai.images", 1, None),
        ({"model": "m", "prompt": "p", "n": 3}, "openai.images", 3, None),
        ({"model": "m", "prompt": "p", "n": 128}, "openai.images", 128, None),
        ({"model": "m", "input": "four"}, "openai.speech", 4, None),
        ({"model": "m", "input": "a\u00e9\u20ac\U0001f600\u0000\n"}, "openai.speech", 6, None),
        ({"model": "m", "input": "\U0001f600" * 1000}, "openai.speech", 1000, None),
    ],
)
@pytest.mark.parametrize("is_ascii", [True, False])
def test_a_request_says_how_much_is_asked_for_of_its_meter(
    document: dict[str, Any], dialect: str, quantity: int, repeated: int | None, is_ascii: bool
) -> None:
    """Searches of a hundred documents, images, characters: as Python counts them, however they are spelled."""
    facts, _ = read_request(json.dumps(document, ensure_ascii=is_ascii).encode(), dialect)

    assert facts is not None
    assert (quantity, repeated) == (facts["quantity"], facts.get("repeated_bytes"))


def test_bytes_of_a_query_that_is_read_again_and_again_are_bounded() -> None:
    """A large query with many documents stays a number that ratelimit takes."""
    facts, _ = read_request(json.dumps(RERANK | {"query": "q" * 600_000, "documents": ["a"] * 2048}).encode(), "rerank")

    assert facts is not None
    assert 900_000_000 == facts["repeated_bytes"]


@pytest.mark.parametrize(
    ("document", "dialect", "param"),
    [
        ({"model": "m", "documents": ["a"]}, "rerank", "query"),
        (RERANK | {"query": 7}, "rerank", "query"),
        (RERANK | {"query": ["q"]}, "rerank", "query"),
        (RERANK | {"documents": []}, "rerank", "documents"),
        (RERANK | {"documents": None}, "rerank", "documents"),
        (RERANK | {"documents": "a"}, "rerank", "documents"),
        (RERANK | {"documents": ["a"] * 2049}, "rerank", "documents"),
        (RERANK | {"stream": True}, "rerank", "stream"),
        ({"model": "m", "prompt": "p", "stream": True}, "openai.images", "stream"),
        ({"model": "m", "prompt": "p", "n": 129}, "openai.images", "n"),
        ({"model": "m", "prompt": "p", "n": 0}, "openai.images", "n"),
        ({"model": "m", "prompt": "p", "n": 1.5}, "openai.images", "n"),
        ({"model": "m"}, "openai.speech", "input"),
        ({"model": "m", "input": ""}, "openai.speech", "input"),
        ({"model": "m", "input": ["a"]}, "openai.speech", "input"),
        ({"model": "m", "input": {"a": 1}}, "openai.speech", "input"),
    ],
)
def test_what_cannot_be_metered_is_refused(document: dict[str, Any], dialect: str, param: str) -> None:
    """Before anybody works on it, with the member that is at fault."""
    facts, refusal = read_request(json.dumps(document).encode(), dialect)

    assert facts is None
    assert refusal is not None
    assert (400, param) == (refusal["status"], refusal["param"])
