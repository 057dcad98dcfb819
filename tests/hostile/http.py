# SPDX-License-Identifier: Apache-2.0
"""Send what a well-behaved client would not: HTTP/1.1 as bytes, HTTP/2 as frames. Reading is bounded in time."""

from __future__ import annotations

import http.client
import socket
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Final

#: Far above what an answer takes; an answer that never comes must not hold up the suite.
_WAIT_SECONDS: Final = 15.0
#: After a request that may hold a second one: how long another answer may take to show.
_MORE_SECONDS: Final = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came back; status 0: the connection was closed without an answer."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    #: Bytes that followed the answer on the same connection.
    more: bytes = b""


def send_http1(port: int, request: bytes) -> Answer:
    """Send bytes on a connection of their own and read the first answer, and what follows it."""
    with _connected(port) as connection:
        with suppress(ConnectionError):
            connection.sendall(request)
        answer = http.client.HTTPResponse(connection)
        try:
            answer.begin()
            body = answer.read()
        except (http.client.HTTPException, ConnectionError, TimeoutError):
            return Answer(status=0)
        connection.settimeout(_MORE_SECONDS)
        more = b""
        # A connection that stays open is asked no further: only what comes by itself counts.
        if b"\r\n\r\n" in request.partition(b"\r\n\r\n")[2]:
            with suppress(TimeoutError, ConnectionError):
                more = connection.recv(65536)
        return Answer(status=answer.status, headers={k.lower(): v for k, v in answer.getheaders()}, body=body, more=more)


# --- HTTP/2 (RFC 9113), as little as is needed -----------------------------------------------------------

_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST, _SETTINGS, _GOAWAY, _CONTINUATION = 0, 1, 3, 4, 7, 9
_END_STREAM, _END_HEADERS, _ACK = 1, 4, 1
_CANCEL: Final = 8
#: HPACK's static table, as far as a response's status is there (RFC 7541, appendix A).
_STATUSES: Final = {8: 200, 9: 204, 10: 206, 11: 304, 12: 400, 13: 404, 14: 500}
#: Huffman codes of digits: five bits for 0 to 2, six for the others (appendix B).
_SHORT_DIGITS: Final = {0b00000: "0", 0b00001: "1", 0b00010: "2"}
_LONG_DIGITS: Final = {0b011001 + number: str(number + 3) for number in range(7)}


def send_http2(port: int, exchange: dict[str, Any]) -> Answer:
    """
    Send one exchange as prior knowledge, and read its status.

    `headers`, `end` (no body follows), `body`, `trailers`; `cookies`: that many more cookie headers;
    or instead `resets`: that many streams begun and reset; `continuations`: that many frames of one header block.
    """
    with _connected(port) as connection:
        connection.sendall(_PREFACE + _frame(_SETTINGS, 0, 0, b""))
        with suppress(ConnectionError, TimeoutError):
            for frame in _frames(exchange):
                connection.sendall(frame)
        return Answer(status=_read_status(connection))


def _frames(exchange: dict[str, Any]) -> Iterator[bytes]:
    if resets := exchange.get("resets"):
        block = _hpack([(":method", "POST"), (":scheme", "http"), (":authority", "a"), (":path", "/v1/chat/completions")])
        for number in range(resets):
            stream = 2 * number + 1
            yield _frame(_HEADERS, _END_HEADERS, stream, block) + _frame(_RST, 0, stream, struct.pack(">I", _CANCEL))
        return
    if continuations := exchange.get("continuations"):
        yield _frame(_HEADERS, _END_STREAM, 1, _hpack([(":method", "GET"), (":scheme", "http"), (":path", "/v1/models")]))
        for number in range(continuations):
            yield _frame(_CONTINUATION, 0, 1, _hpack([(f"x-{number}", "a" * 100)]))
        return
    headers = [*exchange["headers"], *([("cookie", "a=b")] * exchange.get("cookies", 0))]
    yield from _block(headers, _END_STREAM if exchange.get("end") else 0)
    trailers = exchange.get("trailers")
    if body := exchange.get("body"):
        yield _frame(_DATA, 0 if trailers else _END_STREAM, 1, body.encode())
    if trailers:
        yield from _block(trailers, _END_STREAM)


def _block(headers: Iterable[tuple[str, str]], flags: int) -> Iterator[bytes]:
    block, size = _hpack(headers), 16384
    pieces = [block[start : start + size] for start in range(0, len(block), size)]
    for number, piece in enumerate(pieces):
        last = _END_HEADERS if number == len(pieces) - 1 else 0
        yield _frame(_CONTINUATION, last, 1, piece) if number else _frame(_HEADERS, flags | last, 1, piece)


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def _hpack(headers: Iterable[tuple[str, str]]) -> bytes:
    """Each header literally, without index and without Huffman."""
    return b"".join(b"\x00" + _text(name) + _text(value) for name, value in headers)


def _text(text: str) -> bytes:
    raw = text.encode("latin-1")
    if len(raw) < 127:
        return bytes([len(raw)]) + raw
    rest, digits = len(raw) - 127, b""
    while rest >= 128:
        digits += bytes([rest % 128 + 128])
        rest //= 128
    return b"\x7f" + digits + bytes([rest]) + raw


def _read_status(connection: socket.socket) -> int:
    """The status of the first response, 0 for a stream or connection that ends without one."""
    received = b""
    while True:
        while len(received) >= 9:
            length, kind, flags = int.from_bytes(received[:3], "big"), received[3], received[4]
            if len(received) < 9 + length:
                break
            payload, received = received[9 : 9 + length], received[9 + length :]
            if kind == _HEADERS:
                return _status(payload)
            if kind in (_RST, _GOAWAY):
                return 0
            if kind == _SETTINGS and not flags & _ACK:
                with suppress(ConnectionError):
                    connection.sendall(_frame(_SETTINGS, _ACK, 0, b""))
        try:
            piece = connection.recv(65536)
        except (ConnectionError, TimeoutError):
            return 0
        if not piece:
            return 0
        received += piece


def _status(block: bytes) -> int:
    if block[0] & 0x80:
        return _STATUSES[block[0] & 0x7F]
    # A literal whose name is `:status` of the static table; Envoy writes it first.
    length, text = block[1] & 0x7F, block[2 : 2 + (block[1] & 0x7F)]
    if not block[1] & 0x80:
        return int(text)
    bits = "".join(f"{byte:08b}" for byte in text[:length])
    digits = ""
    while len(digits) < 3:
        if (short := int(bits[:5], 2)) in _SHORT_DIGITS:
            digits, bits = digits + _SHORT_DIGITS[short], bits[5:]
        else:
            digits, bits = digits + _LONG_DIGITS[int(bits[:6], 2)], bits[6:]
    return int(digits)


@contextmanager
def _connected(port: int) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), timeout=_WAIT_SECONDS) as connection:
        yield connection
