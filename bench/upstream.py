# SPDX-License-Identifier: Apache-2.0
"""
`python -m bench.upstream PORT`: a model server that costs next to nothing, so that it is not what is measured.

Answers every POST with a small chat completion, or with a stream of `CHUNKS` if the body asks for one, each chunk a
write of its own as engines make them, and every GET with its list of models. Reads no more of a request than it has to.
"""

from __future__ import annotations

import argparse
import asyncio
import re
from typing import Final

CHUNKS: Final = 50
_LENGTH: Final = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_STREAMS: Final = re.compile(rb'"stream": *true')
#: The request's own bound; what is larger comes from nobody of ours.
_HEAD_BYTES_MAX: Final = 65_536
_USAGE: Final = b'"usage":{"prompt_tokens":9,"completion_tokens":%d,"total_tokens":%d}'
_WHOLE: Final = (
    b'{"id":"c","object":"chat.completion","created":1,"model":"tiny","choices":[{"index":0,"message":{"role":"assistant",'
    b'"content":"one two three four"},"finish_reason":"length"}],' + _USAGE % (4, 13) + b"}"
)
_HEAD: Final = b"HTTP/1.1 200 OK\r\ncontent-type: %s\r\n"
#: Asked for by Envoy's health checks.
_MODELS: Final = b'{"object":"list","data":[{"id":"tiny","object":"model","created":1,"owned_by":"nvidia"}]}'


def _json(document: bytes) -> bytes:
    return _HEAD % b"application/json" + b"content-length: %d\r\n\r\n" % len(document) + document


def _chunk(event: bytes) -> bytes:
    data = b"data: " + event + b"\n\n"
    return b"%x\r\n%s\r\n" % (len(data), data)


_DELTA: Final = _chunk(
    b'{"id":"c","object":"chat.completion.chunk","created":1,"model":"tiny","choices":[{"index":0,"delta":{"content":" word"},"finish_reason":null}]}'
)
_PIECES: Final = (
    _HEAD % b"text/event-stream" + b"transfer-encoding: chunked\r\n\r\n" + _DELTA,
    *[_DELTA] * (CHUNKS - 1),
    _chunk(b'{"id":"c","object":"chat.completion.chunk","created":1,"model":"tiny","choices":[],' + _USAGE % (CHUNKS, CHUNKS + 9) + b"}")
    + _chunk(b"[DONE]") + b"0\r\n\r\n",
)  # fmt: skip


class Connection(asyncio.Protocol):
    """One connection: requests one after the other, as HTTP/1.1 without pipelining has them."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the way back."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Answer once the request is whole."""
        self._buffer += data
        head_end = self._buffer.find(b"\r\n\r\n")
        if head_end < 0:
            if len(self._buffer) > _HEAD_BYTES_MAX and self._transport:
                self._transport.close()
            return
        length = _LENGTH.search(self._buffer, 0, head_end)
        end = head_end + 4 + (int(length[1]) if length else 0)
        if len(self._buffer) < end:
            return
        streams = _STREAMS.search(self._buffer, head_end, end)
        is_get = self._buffer.startswith(b"GET ")
        del self._buffer[:end]
        if streams:
            self._write(0)
        elif self._transport:
            self._transport.write(_json(_MODELS if is_get else _WHOLE))

    def _write(self, number: int) -> None:
        """One piece a turn of the loop, so that each is a packet."""
        if self._transport is None or self._transport.is_closing():
            return
        self._transport.write(_PIECES[number])
        if number + 1 < len(_PIECES):
            asyncio.get_running_loop().call_soon(self._write, number + 1)


async def _serve(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Connection, "127.0.0.1", port)
    await server.serve_forever()


def main() -> None:
    """Serve until ended."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("port", type=int)
    asyncio.run(_serve(parser.parse_args().port))


if __name__ == "__main__":
    main()
