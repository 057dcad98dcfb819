# SPDX-License-Identifier: Apache-2.0
"""What the fake engine says on the wire, and that its truth is what it said."""

from __future__ import annotations

import gzip
import itertools
import json
import re
import socket
import struct
import subprocess
import sys
import time
from base64 import b64decode
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest

ROOT = Path(__file__).parents[2]
KINDS = ("vllm", "dynamo", "trtllm")
CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
#: Generous for a slow machine; every wait ends as soon as what it waits for is there.
PATIENCE_SECONDS = 5.0
_numbers = itertools.count(1)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer as it came over a raw socket."""

    status: int
    headers: dict[str, str]
    #: HTTP chunks of a chunked answer.
    pieces: list[bytes]
    body: bytes
    record: dict[str, Any]

    def json(self) -> Any:
        return json.loads(self.body)

    def events(self) -> list[tuple[str | None, str]]:
        return read_events(self.body)

    def frames(self) -> list[Any]:
        return [json.loads(data) for _, data in self.events() if data != "[DONE]"]


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A running fake engine."""

    kind: str
    port: int
    truth: Path

    def url(self, path: str = "") -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def send(self, path: str, asked: object, *, raw: bytes | None = None, **faults: Any) -> tuple[socket.socket, str]:
        """Send a request and leave the answer in the socket."""
        request_id = f"{self.kind}-{next(_numbers)}"
        body = json.dumps(asked).encode() if raw is None else raw
        knobs = f"x-fake-engine: {json.dumps(faults)}\r\n" if faults else ""
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\nx-request-id: {request_id}\r\n{knobs}"
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_SECONDS)
        sock.sendall(head.encode() + b"content-length: %d\r\n\r\n" % len(body) + body)
        return sock, request_id

    def ask(self, path: str, asked: object, *, raw: bytes | None = None, **faults: Any) -> Answer:
        """Send a request, read its answer whole, and look at the truth at once."""
        sock, request_id = self.send(path, asked, raw=raw, **faults)
        with sock, sock.makefile("rb") as wire:
            status, headers = read_head(wire)
            if headers.get("transfer-encoding") == "chunked":
                pieces = []
                while size := int(wire.readline(), 16):
                    pieces.append(wire.read(size))
                    wire.read(2)
                wire.readline()
                body = b"".join(pieces)
            else:
                pieces, body = [], wire.read(int(headers["content-length"]))
            (record,) = self.records(request_id)
        return Answer(status=status, headers=headers, pieces=pieces, body=body, record=record)

    def records(self, request_id: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self.truth.read_text().splitlines()]
        return [line for line in lines if line["request_id"] == request_id]

    def wait_for_record(self, request_id: str, *, seconds: float = PATIENCE_SECONDS) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if records := self.records(request_id):
                return records[0]
            time.sleep(0.002)
        raise AssertionError(f"no record of {request_id} within {seconds} s")


def read_head(wire: Any) -> tuple[int, dict[str, str]]:
    status = int(wire.readline().split()[1])
    headers = {}
    while line := wire.readline().decode().strip():
        name, _, value = line.partition(": ")
        headers[name] = value
    return status, headers


def read_events(body: bytes) -> list[tuple[str | None, str]]:
    """Parse SSE by the book: three line ends, comments, several data lines."""
    events: list[tuple[str | None, str]] = []
    name: str | None = None
    data: list[str] = []
    for line in re.split("\r\n|\n|\r", body.decode()):
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if line == "" and (data or name):
            events.append((name, "\n".join(data)))
            name, data = None, []
        elif field == "data":
            data.append(value)
        elif field == "event":
            name = value
    return events


def asked(path: str, tokens: int = 4, **more: Any) -> dict[str, Any]:
    """Ask with a prompt of three words."""
    prompts: dict[str, dict[str, Any]] = {
        CHAT: {"messages": [{"role": "user", "content": "one two three"}], "max_tokens": tokens},
        COMPLETIONS: {"prompt": "one two three", "max_tokens": tokens},
        RESPONSES: {"input": "one two three", "max_output_tokens": tokens},
        MESSAGES: {"messages": [{"role": "user", "content": "one two three"}], "max_tokens": tokens},
        EMBEDDINGS: {"input": "one two three"},
    }
    return {"model": "tiny"} | prompts[path] | more


def streamed(path: str, tokens: int = 4, **more: Any) -> dict[str, Any]:
    """Ask for a stream, with usage where that has to be asked for."""
    options = {"stream_options": {"include_usage": True}} if path in (CHAT, COMPLETIONS) else {}
    return asked(path, tokens) | {"stream": True} | options | more


def start(kind: str, truth: Path, *more: str) -> tuple[subprocess.Popen[str], Engine]:
    arguments = ["--port", "0", "--engine", kind, "--model", "tiny", "--model", "other", "--truth", str(truth), *more]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.fake_engine", *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    port = int(process.stdout.readline().rpartition(":")[2])
    return process, Engine(kind=kind, port=port, truth=truth)


def stop(process: subprocess.Popen[str]) -> None:
    process.terminate()
    with process:
        assert process.wait(PATIENCE_SECONDS) == 0


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Engine]]:
    folder = tmp_path_factory.mktemp("truth")
    with ExitStack() as stack:
        running = {}
        for kind in KINDS:
            process, running[kind] = start(kind, folder / f"{kind}.jsonl")
            stack.callback(stop, process)
        yield running


@pytest.fixture(params=KINDS)
def engine(request: pytest.FixtureRequest, engines: dict[str, Engine]) -> Engine:
    return engines[request.param]


@pytest.fixture
def vllm(engines: dict[str, Engine]) -> Engine:
    return engines["vllm"]


# --- Shapes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES, MESSAGES])
@pytest.mark.parametrize("make", [asked, streamed])
def test_every_answer_reports_what_the_truth_says(
    engine: Engine, path: str, make: Callable[..., dict[str, Any]]
) -> None:
    """Three words in and five out are what usage and the truth say, in every dialect."""
    answer = engine.ask(path, make(path, 5))

    record = answer.record
    assert (200, "finished") == (answer.status, record["outcome"])
    assert (3, 5, "tiny", path) == tuple(record[k] for k in ("prompt_tokens", "completion_tokens", "model", "path"))
    assert record["started_at"] <= record["ended_at"]
    usage = record["usage_reported"]
    assert (3, 5) == (
        usage.get("prompt_tokens", usage.get("input_tokens")),
        usage.get("completion_tokens", usage.get("output_tokens")),
    )
    assert json.dumps(usage, separators=(",", ":")) in answer.body.decode()
    assert record["response_id"] in answer.body.decode()
    assert (5 if record["stream"] else 0) == record["content_chunks_sent"]


def test_chat_streams_open_and_close_as_each_engine_does(engines: dict[str, Engine]) -> None:
    """vLLM sends the role with empty content, Dynamo with content, TensorRT-LLM alone and with a space after it."""
    deltas = {}
    for kind, engine in engines.items():
        answer = engine.ask(CHAT, streamed(CHAT, 2))
        deltas[kind] = [frame["choices"][0]["delta"] for frame in answer.frames()[:-1]]
        assert ("[DONE]", []) == (answer.events()[-1][1], answer.frames()[-1]["choices"])
        assert (kind == "trtllm") == bool(re.search(rb"} \n\n", answer.body))
        assert 1 == len({frame["id"] for frame in answer.frames()})

    assert [{"role": "assistant", "content": ""}, {"content": " toll"}, {"content": " road"}] == deltas["vllm"]
    assert [{"content": " toll", "role": "assistant"}, {"content": " road"}, {}] == deltas["dynamo"]
    later = [{"content": word, "reasoning_content": ""} for word in (" toll", " road")]
    assert [{"role": "assistant"}, *later] == deltas["trtllm"]


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        (None, ()),
        ({"include_usage": False, "continuous_usage_stats": True}, ()),
        ({}, ("vllm", "trtllm")),
        ({"include_usage": True}, KINDS),
    ],
)
def test_stream_usage_comes_only_when_asked(engine: Engine, options: object, kinds: tuple[str, ...]) -> None:
    """An empty stream_options asks for usage where its default says so."""
    more: dict[str, Any] = {} if options is None else {"stream_options": options}
    answer = engine.ask(CHAT, asked(CHAT, stream=True, **more))

    assert (engine.kind in kinds) == (b'"usage"' in answer.body) == (answer.record["usage_reported"] is not None)


def test_running_usage_is_on_every_chunk(engine: Engine) -> None:
    """Continuous usage counts up; vLLM's lacks the prompt details that its last frame has."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    frames = engine.ask(CHAT, streamed(CHAT, 3, stream_options=options)).frames()

    counts = [frame["usage"]["completion_tokens"] for frame in frames]
    assert ([1, 2, 3, 3, 3] if engine.kind == "dynamo" else [0, 1, 2, 3, 3]) == counts
    detailed = ["prompt_tokens_details" in frame["usage"] for frame in frames]
    assert ([False] * 4 + [True] if engine.kind == "vllm" else [True] * 5) == detailed


@pytest.mark.parametrize("make", [asked, streamed])
def test_choices_multiply_output_and_not_the_prompt(engine: Engine, make: Callable[..., dict[str, Any]]) -> None:
    """Two prompts of five words together, two answers each, two tokens long: 5 in, 8 out."""
    answer = engine.ask(COMPLETIONS, make(COMPLETIONS, 2, prompt=["one two three", "four five"], n=2))

    assert (5, 8) == (answer.record["prompt_tokens"], answer.record["completion_tokens"])
    choices = answer.json()["choices"] if make is asked else [c for frame in answer.frames() for c in frame["choices"]]
    assert {0, 1, 2, 3} == {choice["index"] for choice in choices}


def test_all_text_of_the_prompt_counts(engine: Engine) -> None:
    """Parts, system texts and instructions are prompt; sixteen tokens are the default answer."""
    parts = [
        {"role": "user", "content": [{"type": "text", "text": "a b"}, {"type": "image_url", "image_url": {"url": "x"}}]}
    ]
    record = engine.ask(MESSAGES, {"model": "tiny", "messages": parts, "system": "c d"}).record
    assert (4, 16) == (record["prompt_tokens"], record["completion_tokens"])
    assert 3 == engine.ask(RESPONSES, {"model": "tiny", "input": "a", "instructions": "b c"}).record["prompt_tokens"]
    assert 6 == engine.ask(COMPLETIONS, {"model": "tiny", "prompt": [[1, 2], [3, 4, 5, 6]]}).record["prompt_tokens"]
    assert 2 == engine.ask(CHAT, asked(CHAT, 9, max_completion_tokens=2)).record["completion_tokens"]


def test_embeddings_are_small_vectors(engine: Engine) -> None:
    """Eight numbers each unless told otherwise, as a list or packed."""
    plain = engine.ask(EMBEDDINGS, asked(EMBEDDINGS, input=["a b", "c"]))
    packed = engine.ask(EMBEDDINGS, asked(EMBEDDINGS, dimensions=3, encoding_format="base64")).json()

    assert [8, 8] == [len(item["embedding"]) for item in plain.json()["data"]]
    assert (3, 0) == (plain.record["prompt_tokens"], plain.record["completion_tokens"])
    assert (0.5, 0.25) == struct.unpack("<3f", b64decode(packed["data"][0]["embedding"]))[::2]
    assert (engine.kind == "vllm") == ("completion_tokens" in packed["usage"])


@pytest.mark.parametrize(("finish", "last"), [("length", "response.incomplete"), ("stop", "response.completed")])
def test_responses_end_with_the_only_usage(engine: Engine, finish: str, last: str) -> None:
    """The closing event says how it ended and holds the usage; Dynamo alone adds [DONE]."""
    events = engine.ask(RESPONSES, streamed(RESPONSES), finish=finish).events()

    if engine.kind == "dynamo":
        assert (None, "[DONE]") == events.pop()
    with_usage = [name for name, data in events if '"usage":{' in data]
    assert [last] == with_usage == [events[-1][0]]
    assert list(range(len(events))) == [json.loads(data)["sequence_number"] for _, data in events]


def test_messages_tell_the_truth_in_their_delta(engine: Engine) -> None:
    """Dynamo opens with an estimate and runs usage along; the message_delta is right with all."""
    events = engine.ask(MESSAGES, streamed(MESSAGES, 2)).events()

    names = ["message_start", "content_block_start", *["content_block_delta"] * 2, "content_block_stop"]
    assert [*names, "message_delta", "message_stop"] == [name for name, _ in events if name]
    first, delta = (json.loads(next(d for n, d in events if n == name)) for name in ("message_start", "message_delta"))
    assert (1 if engine.kind == "dynamo" else 3) == first["message"]["usage"]["input_tokens"]
    assert (3, 2) == (delta["usage"]["input_tokens"], delta["usage"]["output_tokens"])
    assert (engine.kind == "dynamo") == (events[-1] == (None, "[DONE]"))


def test_cached_tokens_stand_where_each_engine_puts_them(engine: Engine) -> None:
    """TensorRT-LLM's Messages usage leaves cached tokens out of the input."""
    chat = engine.ask(CHAT, asked(CHAT), cached=2).json()["usage"]
    message = engine.ask(MESSAGES, asked(MESSAGES), cached=2).json()["usage"]

    assert (3, 2) == (chat["prompt_tokens"], chat["prompt_tokens_details"]["cached_tokens"])
    assert (1 if engine.kind == "trtllm" else 3, 2) == (message["input_tokens"], message["cache_read_input_tokens"])


def test_errors_have_each_engines_shape(engine: Engine) -> None:
    """Unknown model 404, bad JSON and missing field 400; unknown field 400 where it is strict."""
    unknown = engine.ask(CHAT, asked(CHAT, model="nope"))
    broken = engine.ask(CHAT, None, raw=b'{"model":')
    missing = engine.ask(CHAT, {"model": "tiny"})
    extra = engine.ask(CHAT, asked(CHAT, foo_bar=1))
    message = engine.ask(MESSAGES, asked(MESSAGES, model="nope"))

    assert [404, 400, 400, 200 if engine.kind == "vllm" else 400] == [
        a.status for a in (unknown, broken, missing, extra)
    ]
    assert {"refused"} == {answer.record["outcome"] for answer in (unknown, broken, missing, message)}
    assert ("nope", 0, None) == tuple(unknown.record[k] for k in ("model", "prompt_tokens", "response_id"))
    assert ("error", "not_found_error") == (message.json()["type"], message.json()["error"]["type"])
    match engine.kind:
        case "vllm":
            assert ("model", 404) == (unknown.json()["error"]["param"], unknown.json()["error"]["code"])
        case "dynamo":
            assert {"message": "Model not found", "type": "Not Found", "code": 404} == unknown.json()
            assert "Validation: Unsupported parameter(s): `foo_bar`" == extra.json()["message"]
        case "trtllm":
            assert ("error", None, 404) == tuple(unknown.json()[k] for k in ("object", "param", "code"))
            assert "foo_bar" in extra.json()["error"]


def test_operators_pages(engine: Engine) -> None:
    """The engine is healthy, names its models, and its own counters equal the truth."""
    engine.ask(CHAT, asked(CHAT, model="other"))
    pages = {path: httpx.get(engine.url(path)) for path in ("/health", "/v1/models", "/metrics", "/prometheus/metrics")}

    assert 200 == pages["/health"].status_code
    owner = {"vllm": "vllm", "dynamo": "nvidia", "trtllm": "tensorrt_llm"}[engine.kind]
    models = [(card["id"], card["owned_by"]) for card in pages["/v1/models"].json()["data"]]
    assert [("tiny", owner), ("other", owner)] == models
    names = {
        "vllm": (
            'vllm:prompt_tokens_total{engine="0",model_name="tiny"}',
            'vllm:generation_tokens_total{engine="0",model_name="tiny"}',
        ),
        "dynamo": (
            'dynamo_frontend_input_sequence_tokens_sum{model="tiny"}',
            'dynamo_frontend_output_tokens_total{model="tiny"}',
        ),
        "trtllm": (
            'trtllm_prompt_tokens_total{model_name="tiny",engine_type="undefined"}',
            'trtllm_generation_tokens_total{model_name="tiny",engine_type="undefined"}',
        ),
    }[engine.kind]
    metrics = pages["/prometheus/metrics" if engine.kind == "trtllm" else "/metrics"].text
    truth = [
        record for line in engine.truth.read_text().splitlines() if (record := json.loads(line))["model"] == "tiny"
    ]
    for name, key in zip(names, ("prompt_tokens", "completion_tokens"), strict=True):
        assert f"{name} {sum(record[key] for record in truth)}\n" in metrics


def test_official_clients_understand_every_dialect(engine: Engine) -> None:
    """The clients that tenants use read answers and streams to the end."""
    client = openai.OpenAI(base_url=engine.url("/v1"), api_key="x", max_retries=0)
    messages: Any = [{"role": "user", "content": "one two"}]
    with client.responses.stream(model="tiny", input="one two", max_output_tokens=3) as stream:
        types = [event.type for event in stream]
    chunks = list(client.chat.completions.create(model="tiny", messages=messages, max_tokens=3, stream=True))
    vectors = client.embeddings.create(model="tiny", input=["one", "two"]).data
    claude = anthropic.Anthropic(base_url=engine.url(), api_key="x", max_retries=0)
    with claude.messages.stream(model="tiny", messages=messages, max_tokens=3) as message:
        text = message.get_final_text()

    assert (3, "response.incomplete") == (types.count("response.output_text.delta"), types[-1])
    assert text == " toll road bridge" == "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert [0.5, 1.0] == [vector.embedding[0] for vector in vectors]


def test_one_connection_carries_many_requests_and_chunked_bodies(vllm: Engine) -> None:
    """Keep-alive holds over answers, streams, errors and bodies of unknown length."""
    with httpx.Client(base_url=vllm.url()) as client:
        bodies = [json.dumps(body).encode() for body in (asked(CHAT), streamed(CHAT), {}, asked(CHAT))]
        answers = [client.post(CHAT, content=iter([body[:9], body[9:]])) for body in bodies]
        ports = {answer.extensions["network_stream"].get_extra_info("client_addr") for answer in answers}

    assert [200, 200, 404, 200] == [answer.status_code for answer in answers]
    assert 1 == len(ports)


# --- Faults -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("knobs", "named"),
    [({"chunk_m": 1}, "chunk_m"), ({"split": "7"}, "split"), ({"usage": "wrong"}, "usage"), ({"gzip": 1}, "gzip")],
)
def test_a_bad_knob_is_refused_by_name(engine: Engine, knobs: dict[str, Any], named: str) -> None:
    """A misspelt or misused fault is a 400, never an answer without the fault."""
    answer = engine.ask(CHAT, asked(CHAT), **knobs)

    assert (400, "refused") == (answer.status, answer.record["outcome"])
    assert f"`{named}`" in answer.body.decode()


def test_knobs_on_the_command_line_hold_for_every_request(tmp_path: Path) -> None:
    """A request may set them anew; a bad one ends the start."""
    process, engine = start("dynamo", tmp_path / "truth", "--faults", '{"tokens_per_chunk": 2, "same_id": true}')
    try:
        frames = engine.ask(CHAT, streamed(CHAT, 4)).record["content_chunks_sent"]
        answer = engine.ask(CHAT, streamed(CHAT, 4), tokens_per_chunk=3)
    finally:
        stop(process)
    bad = [sys.executable, "-m", "tests.fake_engine", "--port", "0", "--engine", "vllm", "--model", "tiny"]
    refused = subprocess.run(
        [*bad, "--truth", str(tmp_path / "t"), "--faults", '{"x": 1}'],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )

    assert (2, 2, "chatcmpl-0000000000000000") == (
        frames,
        answer.record["content_chunks_sent"],
        answer.record["response_id"],
    )
    assert (2, True) == (refused.returncode, "`x`" in refused.stderr)


@pytest.mark.parametrize("make", [asked, streamed])
def test_waits_are_as_long_as_told(vllm: Engine, make: Callable[..., dict[str, Any]]) -> None:
    """30 ms to the first byte and 3 gaps of 20 ms, in a stream and in one piece alike."""
    record = vllm.ask(CHAT, make(CHAT, 4), first_ms=30, chunk_ms=20).record

    assert 0.088 <= record["ended_at"] - record["started_at"] < 1


@pytest.mark.parametrize(
    "knobs",
    [
        {"split": 1},
        {"split": 7},
        {"coalesce": True},
        {"crlf": True},
        {"crlf": "cr"},
        {"comments": True},
        {"multiline": True},
        {"multiline": True, "crlf": True, "comments": True, "split": 5},
        {"gzip": True},
        {"gzip": True, "split": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES])
def test_bent_streams_say_the_same(engine: Engine, path: str, knobs: dict[str, Any]) -> None:
    """However the bytes are cut, spelt or packed, events and truth stay what they were."""
    plain = engine.ask(path, streamed(path), same_id=True)
    bent = engine.ask(path, streamed(path), same_id=True, **knobs)

    body = gzip.decompress(bent.body) if "gzip" in knobs else bent.body
    assert ("gzip" in knobs) == (bent.headers.get("content-encoding") == "gzip")
    meaning = [
        [(n, d if d == "[DONE]" else scrub(json.loads(d))) for n, d in read_events(b)] for b in (plain.body, body)
    ]
    assert meaning[0] == meaning[1]
    assert body != plain.body or "split" in knobs or "coalesce" in knobs or "gzip" in knobs
    for key in ("completion_tokens", "content_chunks_sent", "usage_reported", "outcome"):
        assert plain.record[key] == bent.record[key]
    if "split" in knobs:
        assert {knobs["split"]} == {len(piece) for piece in bent.pieces[:-1]}
    if "coalesce" in knobs:
        assert 1 == len(bent.pieces)


def scrub(payload: Any) -> Any:
    """Forget the second in which an answer was made."""
    if isinstance(payload, dict):
        return {key: scrub(value) for key, value in payload.items() if key not in ("created", "created_at")}
    return [scrub(item) for item in payload] if isinstance(payload, list) else payload


@pytest.mark.parametrize(
    ("usage", "reported"),
    [
        ("zero", (0, 0)),
        ("negative", (-3, -4)),
        ("huge", (2**63, 2**63)),
        ("lower", (3, 2)),
        ({"prompt_tokens": 1, "completion_tokens": 7}, (1, 7)),
    ],
)
@pytest.mark.parametrize("make", [asked, streamed])
def test_false_usage_is_on_the_wire_and_in_the_record(
    engine: Engine, usage: object, reported: tuple[int, int], make: Callable[..., dict[str, Any]]
) -> None:
    """The record keeps the truth beside what was reported."""
    answer = engine.ask(CHAT, make(CHAT), usage=usage)

    sent = answer.json()["usage"] if make is asked else answer.frames()[-1]["usage"]
    assert sent == answer.record["usage_reported"]
    assert reported == (sent["prompt_tokens"], sent["completion_tokens"])
    assert (3, 4) == (answer.record["prompt_tokens"], answer.record["completion_tokens"])


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES, MESSAGES, EMBEDDINGS])
def test_nan_and_missing_usage_in_every_dialect(engine: Engine, path: str) -> None:
    """NaN is bare on the wire; a missing usage leaves no number anywhere."""
    make = asked if path == EMBEDDINGS else streamed
    nan, missing = engine.ask(path, make(path), usage="nan"), engine.ask(path, make(path), usage="missing")

    assert b":NaN" in nan.body
    assert "NaN" in nan.record["usage_reported"].values()
    assert None is missing.record["usage_reported"]
    assert not re.search(rb'"usage":[^n]', missing.body)


def test_lower_usage_goes_down_while_running(engine: Engine) -> None:
    """Running usage falls again and again, and closes at half the truth."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    frames = engine.ask(CHAT, streamed(CHAT, 6, stream_options=options), usage="lower").frames()

    counts = [frame["usage"]["completion_tokens"] for frame in frames]
    assert counts != sorted(counts)
    assert 3 == counts[-1] < max(counts) == 5


def test_reasoning_is_a_part_of_the_output(engine: Engine) -> None:
    """The first tokens are thought; TensorRT-LLM does not count them apart."""
    field = "reasoning" if engine.kind == "vllm" else "reasoning_content"
    frames = engine.ask(CHAT, streamed(CHAT), reasoning=3).frames()
    usage = engine.ask(CHAT, asked(CHAT), reasoning=3).record["usage_reported"]

    deltas = [frame["choices"][0]["delta"] for frame in frames if frame["choices"]]
    assert " toll road bridge" == "".join(delta.get(field) or "" for delta in deltas)
    assert " gate" == "".join(delta.get("content") or "" for delta in deltas)
    assert 4 == usage["completion_tokens"]
    assert (engine.kind != "trtllm") == ("reasoning_tokens" in str(usage))


@pytest.mark.parametrize("status", [400, 429, 500, 503])
def test_an_error_before_the_answer_is_json_even_for_a_stream(engine: Engine, status: int) -> None:
    """Nothing was produced, and the truth says so."""
    answer = engine.ask(CHAT, streamed(CHAT), error_before=status)

    assert (status, "application/json") == (answer.status, answer.headers["content-type"])
    assert ("injected_error", 0, 0) == tuple(
        answer.record[k] for k in ("outcome", "prompt_tokens", "completion_tokens")
    )
    assert str(status) in answer.body.decode()


@pytest.mark.parametrize("after", [0, 2, 4])
@pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES])
def test_an_error_in_the_stream_ends_it_after_k_chunks(engine: Engine, path: str, after: int) -> None:
    """The tokens before the error were produced; a failed response reports them."""
    answer = engine.ask(path, streamed(path), error_after=after)

    record = answer.record
    assert (200, "injected_error", after, after) == (
        answer.status,
        *(record[key] for key in ("outcome", "completion_tokens", "content_chunks_sent")),
    )
    names = [name for name, _ in answer.events()]
    match path:
        case "/v1/responses":
            assert "response.failed" in names
            assert after == record["usage_reported"]["output_tokens"]
        case "/v1/messages":
            assert "error" in names
        case _ if engine.kind == "dynamo":
            assert (b"event: error\n: injected error\n\n", False) == (answer.body[-31:], b"[DONE]" in answer.body)
        case _:
            assert "injected error" in answer.events()[-2][1]


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_reset_comes_after_k_chunks(engine: Engine, after: int) -> None:
    """The client has every chunk of the truth, then a reset and no end."""
    sock, request_id = engine.send(CHAT, streamed(CHAT), reset_after=after)
    received = b""
    with sock, pytest.raises(ConnectionResetError):
        while piece := sock.recv(65536):
            received += piece

    record = engine.wait_for_record(request_id)
    assert ("injected_reset", after, after) == tuple(
        record[key] for key in ("outcome", "completion_tokens", "content_chunks_sent")
    )
    assert after == len(re.findall(rb'"content":"[^"]', received))


@pytest.mark.parametrize("make", [asked, streamed])
def test_a_stall_lasts_until_the_client_leaves(engine: Engine, make: Callable[..., dict[str, Any]]) -> None:
    """After k chunks nothing comes, and leaving is noticed at once."""
    sock, request_id = engine.send(CHAT, make(CHAT), stall_after=2)
    sock.settimeout(0.05)
    with sock, pytest.raises(TimeoutError):
        while sock.recv(65536):
            pass

    record = engine.wait_for_record(request_id, seconds=1)
    assert ("client_closed", 2 if make is streamed else 0) == (record["outcome"], record["completion_tokens"])


@pytest.mark.parametrize("path", [CHAT, EMBEDDINGS])
def test_gzip_comes_unasked(engine: Engine, path: str) -> None:
    """An answer in one piece is compressed too."""
    answer = engine.ask(path, asked(path), gzip=True)

    assert "gzip" == answer.headers["content-encoding"]
    assert answer.record["usage_reported"] == json.loads(gzip.decompress(answer.body))["usage"]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES, MESSAGES])
def test_text_that_looks_like_usage_is_only_text(engine: Engine, path: str) -> None:
    """The words hold frames, usage, braces and quotes; the events and the truth do not change."""
    answer = engine.ask(path, streamed(path, 8), fake_usage_text=True)

    assert b"99999" in answer.body
    assert b'\ndata: {"usage"' not in answer.body
    assert 8 == answer.record["completion_tokens"] == answer.record["content_chunks_sent"]
    assert "99999" not in json.dumps(answer.record["usage_reported"])
    assert all(isinstance(frame, dict) for frame in answer.frames())


def test_ids_repeat_when_told(engine: Engine) -> None:
    """vLLM repeats the client's id by itself, the others when told; one id for all is another fault."""
    usual = engine.ask(CHAT, asked(CHAT))
    repeated, kept = (engine.ask(CHAT, asked(CHAT), repeat_id=repeats) for repeats in (True, False))
    same = {engine.ask(CHAT, asked(CHAT), same_id=True).json()["id"] for _ in range(2)}

    holds = [answer.json()["id"] == f"chatcmpl-{answer.record['request_id']}" for answer in (usual, repeated, kept)]
    assert [engine.kind == "vllm", True, False] == holds
    assert 1 == len(same)
    assert (engine.kind == "dynamo") == ("x-request-id" in usual.headers)


def test_one_event_can_be_very_big(engine: Engine) -> None:
    """Padding is text of the first token, not more tokens."""
    answer = engine.ask(CHAT, streamed(CHAT, 2), big_event=300_000)

    assert 300_000 < max(len(data) for _, data in answer.events()) < 301_000
    assert 2 == answer.record["completion_tokens"]


# --- The truth ------------------------------------------------------------------------------------------


def leave_by_closing(sock: socket.socket) -> None:
    sock.close()


def leave_by_reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def leave_by_half_closing(sock: socket.socket) -> None:
    sock.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("leave", [leave_by_closing, leave_by_reset, leave_by_half_closing])
@pytest.mark.parametrize("chunks", [0, 2])
def test_leaving_is_noticed_while_the_engine_waits(
    engine: Engine, leave: Callable[[socket.socket], None], chunks: int
) -> None:
    """The record comes long before the next chunk would, with the tokens handed over until then."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    waits: dict[str, Any] = {"chunk_ms": 60_000, "tokens_per_chunk": 3} if chunks else {"first_ms": 60_000}
    sock, request_id = engine.send(CHAT, streamed(CHAT, 9, stream_options=options), **waits)
    with sock:
        received = b""
        while chunks and b" toll" not in received:
            received += sock.recv(65536)
        leave(sock)
        record = engine.wait_for_record(request_id, seconds=1)

    assert ("client_closed", 3 if chunks else 0, 3) == tuple(
        record[key] for key in ("outcome", "completion_tokens", "prompt_tokens")
    )
    assert (3 if chunks else None) == (record["usage_reported"] or {}).get("completion_tokens")


@pytest.mark.parametrize("reads", [0, 200_000])
def test_leaving_is_noticed_while_the_engine_writes(vllm: Engine, reads: int) -> None:
    """Only what the kernel took counts, so a client that stops reading stops the engine too."""
    sock, request_id = vllm.send(CHAT, streamed(CHAT, 130_000))
    with sock:
        received = 0
        while received < reads:
            received += len(sock.recv(65536))
        time.sleep(0.02)
    record = vllm.wait_for_record(request_id, seconds=1)

    assert "client_closed" == record["outcome"]
    assert reads // 500 < record["completion_tokens"] < 100_000
    assert record["completion_tokens"] == record["content_chunks_sent"]


def test_leaving_an_answer_in_one_piece_hands_nothing_over(engine: Engine) -> None:
    """The prompt was read, the answer never sent."""
    sock, request_id = engine.send(CHAT, asked(CHAT), first_ms=60_000)
    sock.close()
    record = engine.wait_for_record(request_id, seconds=1)

    assert ("client_closed", 3, 0, None) == tuple(
        record[key] for key in ("outcome", "prompt_tokens", "completion_tokens", "usage_reported")
    )


def test_forbidden_paths_leave_a_trace(engine: Engine) -> None:
    """Whatever reaches the engine is in the log, so nothing can slip by unseen."""
    answer = engine.ask("/v1/audio/speech", {})

    assert (404, "refused", "/v1/audio/speech") == (answer.status, answer.record["outcome"], answer.record["path"])


def test_the_log_counts_every_exchange_once_in_order(engine: Engine) -> None:
    """Sequence numbers have no gap and nobody's id comes twice, with many at once."""
    sockets = [engine.send(CHAT, streamed(CHAT, 30), chunk_ms=1)[0] for _ in range(30)]
    for sock in sockets:
        with sock:
            while not sock.recv(65536).endswith(b"0\r\n\r\n"):
                pass
    lines = [json.loads(line) for line in engine.truth.read_text().splitlines()]

    assert list(range(1, len(lines) + 1)) == [line["seq"] for line in lines]
    ids = [line["request_id"] for line in lines if line["request_id"]]
    assert len(ids) == len(set(ids))
