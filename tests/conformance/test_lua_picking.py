# SPDX-License-Identifier: Apache-2.0
"""The endpoint picker protocol as Lua writes and reads it, against protobuf itself."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import pytest
from google.protobuf.message import Message

from chassis.wire import ext_proc_pb2 as wire
from tests.conformance.road import module, runtime

PICKED, ENDPOINT = "envoy.lb", "x-gateway-destination-endpoint"


def asked(headers: Sequence[tuple[str, bytes]], body: bytes, among: Sequence[str] | None = None) -> list[wire.ProcessingRequest]:
    """The messages that a picker gets."""
    lua = runtime()
    pairs = lua.table_from([lua.table_from([name.encode(), value]) for name, value in headers])
    servers = None if among is None else lua.table_from([one.encode() for one in among])
    sent: bytes = module("picking")[b"ask"](pairs, body, servers)
    messages = []
    while sent:
        packed, length = struct.unpack(">BI", sent[:5])
        assert 0 == packed
        messages.append(wire.ProcessingRequest.FromString(sent[5 : 5 + length]))
        sent = sent[5 + length :]
    return messages


def framed(*messages: Message) -> bytes:
    """What a picker sends, as it is on the wire."""
    return b"".join(struct.pack(">BI", 0, len(text)) + text for text in (one.SerializeToString() for one in messages))


def answer(said: bytes) -> str | int | None:
    """What Lua reads in it."""
    read: bytes | float | None = module("picking")[b"answer"](said)
    return read.decode() if isinstance(read, bytes) else None if read is None else int(read)


def picked(names: str, **more: object) -> wire.ProcessingResponse:
    """The answer that names servers, in the middle of all else that may be there."""
    made = wire.ProcessingResponse(request_headers=wire.HeadersResponse())
    chosen = made.request_headers.response.header_mutation.set_headers.add()
    chosen.header.key, chosen.header.raw_value = ENDPOINT, names.encode()
    made.dynamic_metadata.update({"a": {"b": [1, None, {"c": True}]}, PICKED: {"x": 1.5, ENDPOINT: names, "z": "last"}, "zz": "text", **more})
    return made


@pytest.mark.parametrize("length", [1, 127, 128, 262_144, 262_145, 3_000_000])
def test_a_picker_gets_headers_and_the_whole_body(length: int) -> None:
    """In pieces that any gRPC server takes, the last one marked."""
    body = bytes(range(256)) * (length // 256 + 1)
    body = body[:length]

    first, *pieces = asked([(":path", b"/v1/completions"), ("x-blob", b"\xff\x00")], body)

    headers = [(one.key, one.raw_value) for one in first.request_headers.headers.headers]
    assert ([(":path", b"/v1/completions"), ("x-blob", b"\xff\x00")], False) == (headers, first.request_headers.end_of_stream)
    assert body == b"".join(piece.request_body.body for piece in pieces)
    assert [*[False] * (len(pieces) - 1), True] == [piece.request_body.end_of_stream for piece in pieces]
    assert max(len(piece.request_body.body) for piece in pieces) <= 262_144


def test_a_picker_is_told_among_which_servers_it_may_choose() -> None:
    """With each message; nothing where they are not known."""
    told = asked([], b"{}", ["10.0.0.1:8000", "[::1]:8000"])

    hints = [list(one.metadata_context.filter_metadata["envoy.lb.subset_hint"][f"{ENDPOINT}-subset"]) for one in told]
    assert [["10.0.0.1:8000", "[::1]:8000"]] * 2 == hints
    assert [0, 0] == [len(one.metadata_context.filter_metadata) for one in asked([], b"{}")]


@pytest.mark.parametrize("names", ["10.0.0.1:8000", "[::1]:1,10.0.0.2:2", "x" * 5000])
def test_what_a_picker_names_is_read(names: str) -> None:
    """Wherever it stands among messages and entries that are not looked at."""
    body = wire.ProcessingResponse(request_body=wire.BodyResponse())
    body.request_body.response.body_mutation.streamed_response.body = b"x" * 70_000

    assert names == answer(framed(picked(names), body))
    assert names == answer(framed(body, picked(names, more={ENDPOINT: "another namespace"})))


@pytest.mark.parametrize("status", [429, 503, 200, 599])
def test_a_refusal_is_read(status: int) -> None:
    """Whatever else it says; without a status it is one all the same."""
    refusal = wire.ImmediateResponse(status={"code": status}, body=b"busy", details="saturated")  # type: ignore[arg-type]

    assert status == answer(framed(wire.ProcessingResponse(immediate_response=refusal)))
    assert 503 == answer(framed(wire.ProcessingResponse(immediate_response=wire.ImmediateResponse())))


def test_what_names_nobody_is_no_answer() -> None:
    """Nothing, an empty name, a number, another namespace, compressed, cut, or no protobuf."""
    empty, number, elsewhere, text = (wire.ProcessingResponse() for _ in range(4))
    text.dynamic_metadata.update({PICKED: {ENDPOINT: "höher\n"}})
    empty.dynamic_metadata.update({PICKED: {ENDPOINT: ""}})
    number.dynamic_metadata.update({PICKED: {ENDPOINT: 7}})
    elsewhere.dynamic_metadata.update({"other": {ENDPOINT: "10.0.0.1:1"}, ENDPOINT: "10.0.0.1:1"})
    said = [b"", b"\0", framed(wire.ProcessingResponse()), *map(framed, (empty, number, elsewhere, text))]
    said += [b"\1" + framed(picked("10.0.0.1:1"))[1:], b"upstream request timeout", b"\0\0\0\0\4\xff\xff\xff\xff", b"\xff" * 64]

    assert [None] * len(said) == [answer(one) for one in said]


def test_an_answer_that_is_cut_or_spoiled_anywhere_names_nobody_or_what_it_named() -> None:
    """And never fails: a script that does would leave the request unasked."""
    whole = framed(picked("10.0.0.1:8000"))

    assert {None} == {answer(whole[:length]) for length in range(len(whole))}
    for position in range(len(whole)):
        for byte in (0x00, 0x01, 0x7F, 0x80, 0xFF):
            answer(whole[:position] + bytes([byte]) + whole[position + 1 :])


@pytest.mark.parametrize("name", ["authorization", "x-api-key", "cookie", "x-peaje-prefix", "x-gateway-destination-endpoint"])
def test_a_picker_is_not_told(name: str) -> None:
    """Credentials, our own names, a caller's own idea of who should answer; all else, it is."""
    is_told = module("picking")[b"is_told"]

    assert not is_told(name.encode())
    assert is_told(b"x-session-id")
    assert is_told(b":path")
