# SPDX-License-Identifier: Apache-2.0
"""
Serve HTTP/1.1 and live through exchanges: answer, stream, break, and commit the truth of each.

A client that closes, half-closes or resets its connection during an exchange is gone; it is noticed
at once while the engine waits, and before the next event while it writes.
"""

from __future__ import annotations

import asyncio
import gzip
import socket
import struct
import time
import zlib
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Final, NamedTuple, TypeAlias

import orjson

from .asks import FIELDS, Ask, Refused, read_ask, read_body
from .dialects import ERROR_TEXT
from .faults import HEADER, BadKnob, Faults, read_faults
from .kinds import Kind
from .truth import Record, TruthLog
from .turns import Frame, Json, Turn

HEAD_BYTES_MAX: Final = 1 << 20
BODY_BYTES_MAX: Final = 64 << 20
#: A reset may take unread bytes with it, so the peer gets a moment to read what was sent before.
RESET_GRACE_SECONDS: Final = 0.01
_PHRASES: Final = {status.value: status.phrase for status in HTTPStatus}


Commit: TypeAlias = Callable[[Record], Awaitable[None]]


class ClientGone(Exception):
    """The client left before its answer was complete."""


class Request(NamedTuple):
    """One HTTP request, read whole."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    started_at: float

    @property
    def keeps_alive(self) -> bool:
        """Say whether the connection outlives the answer."""
        return self.headers.get("connection", "").lower() != "close"


class Client(asyncio.StreamReader):
    """The reading side of a connection, which also knows when nobody is there any more."""

    def __init__(self) -> None:
        super().__init__(limit=HEAD_BYTES_MAX)
        self.is_gone = False
        self._nap: asyncio.Future[None] | None = None

    def feed_eof(self) -> None:
        """Wake whoever waits: the client closed."""
        super().feed_eof()
        self._leave()

    def set_exception(self, exc: Exception) -> None:
        """Wake whoever waits: the connection broke."""
        super().set_exception(exc)
        self._leave()

    def _leave(self) -> None:
        self.is_gone = True
        self._wake()

    def _wake(self) -> None:
        if self._nap is not None and not self._nap.done():
            self._nap.set_result(None)

    async def stay(self, milliseconds: float | None) -> None:
        """Wait (None: for ever), and raise as soon as the client is gone."""
        if milliseconds == 0:
            await asyncio.sleep(0)
        elif not self.is_gone:
            loop = asyncio.get_running_loop()
            self._nap = loop.create_future()
            timer = None if milliseconds is None else loop.call_later(milliseconds / 1000, self._wake)
            try:
                await self._nap
            finally:
                if timer is not None:
                    timer.cancel()
        if self.is_gone:
            raise ClientGone

    async def read_request(self) -> Request | None:
        """Read the next request; None when there is none, or what comes is not HTTP."""
        try:
            return await self._read_request()
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError):
            return None

    async def _read_request(self) -> Request:
        head = (await self.readuntil(b"\r\n\r\n")).decode("latin-1")
        started_at = time.time()
        first, *lines = head[:-4].split("\r\n")
        method, target, _ = first.split(" ")
        headers = {}
        for line in lines:
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        body = await self._read_body(headers)
        return Request(method, target.partition("?")[0], headers, body, started_at)

    async def _read_body(self, headers: dict[str, str]) -> bytes:
        if headers.get("transfer-encoding", "").lower() != "chunked":
            size = int(headers.get("content-length", 0))
            return await self.readexactly(_bounded(size)) if size else b""
        body = bytearray()
        while size := int((await self.readuntil(b"\r\n")).partition(b";")[0], 16):
            _bounded(len(body) + size)
            body += await self.readexactly(size)
            await self.readexactly(2)
        while await self.readuntil(b"\r\n") != b"\r\n":
            pass  # A trailer; nothing here wants one.
        return bytes(body)


def _bounded(size: int) -> int:
    if size > BODY_BYTES_MAX:
        raise ValueError(f"a body of {size} bytes")
    return size


def encode_event(frame: Frame, faults: Faults) -> bytes:
    """Spell an event for the wire, as bent as the faults want it."""
    lines = [b": comment", b""] if faults.comments else []
    if frame.event is not None:
        lines.append(b"event: " + frame.event.encode())
    if frame.comment is not None:
        lines.append(b": " + frame.comment.encode())
    if frame.data is not None:
        data = frame.data
        if isinstance(data, dict):
            data = encode_json(data, faults, orjson.OPT_INDENT_2 if faults.multiline else 0)
        lines.extend(b"data: " + line for line in (data + frame.trailer).split(b"\n"))
    end = {True: b"\r\n", "cr": b"\r"}.get(faults.crlf, b"\n")
    return end.join(lines) + end * 2


def encode_json(payload: Json, faults: Faults, option: int = 0) -> bytes:
    """Dump JSON, with a bare NaN where that is the fault."""
    data = orjson.dumps(payload, option=option)
    return data.replace(b'"NaN"', b"NaN") if faults.usage == "nan" else data


class EventStream:
    """Put events on the wire, and into the record what the kernel has taken whole."""

    def __init__(self, writer: asyncio.StreamWriter, record: Record, faults: Faults, head: bytes) -> None:
        self._writer, self._record, self._faults, self._head = writer, record, faults, head
        self._zip = zlib.compressobj(wbits=31) if faults.gzip else None
        self._buffer = bytearray()
        self._sent = 0
        self._marks: deque[tuple[int, Frame]] = deque()

    async def put(self, frame: Frame) -> None:
        """Send an event: now, in pieces, or later with all others."""
        self._take(frame)
        if self._faults.split:
            while len(self._buffer) >= self._faults.split:
                await self._write(self._faults.split)
        elif not self._faults.coalesce:
            await self._write(len(self._buffer))

    async def flush(self, end: bytes = b"") -> None:
        """Send what is held back, and the head if nothing was sent yet; `end` goes with the last byte."""
        size = self._faults.split or len(self._buffer)
        while len(self._buffer) > size:
            await self._write(size)
        await self._write(len(self._buffer), end)

    async def finish(self, last: Frame, commit: Commit, outcome: str) -> None:
        """Commit the record, then send the last event: nobody sees the end before it is on disk."""
        self._take(last)
        if self._zip is not None:
            self._buffer += self._zip.flush()
        self._settle(self._sent + len(self._buffer))
        self._record.outcome = outcome
        await commit(self._record)
        await self.flush(b"0\r\n\r\n")

    def _take(self, frame: Frame) -> None:
        data = encode_event(frame, self._faults)
        if self._zip is not None:
            data = self._zip.compress(data) + self._zip.flush(zlib.Z_SYNC_FLUSH)
        self._buffer += data
        self._marks.append((self._sent + len(self._buffer), frame))

    async def _write(self, size: int, end: bytes = b"") -> None:
        piece = bytes(self._buffer[:size])
        del self._buffer[:size]
        chunk = b"%x\r\n%b\r\n" % (len(piece), piece) if piece else b""
        self._writer.write(self._head + chunk + end)
        self._head = b""
        await self._writer.drain()
        self._sent += len(piece)
        self._settle(self._sent)

    def _settle(self, sent: int) -> None:
        record = self._record
        while self._marks and self._marks[0][0] <= sent:
            _, frame = self._marks.popleft()
            record.completion_tokens += frame.tokens
            record.content_chunks_sent += frame.tokens > 0
            if frame.usage is not None:
                record.usage_reported = frame.usage


class FakeEngine:
    """One engine: its models, its faults by default, its truth and its counters."""

    def __init__(self, kind: Kind, models: list[str], truth: TruthLog, faults: Faults) -> None:
        self.kind, self.models, self.truth, self.faults = kind, models, truth, faults
        #: Sums of the truth, by model and word; and what runs now.
        self.counters: Counter[tuple[str | None, str]] = Counter()
        self.running = 0
        self._created = int(time.time())

    def connect(self) -> asyncio.StreamReaderProtocol:
        """Make the protocol of one new connection."""
        client = Client()
        return asyncio.StreamReaderProtocol(client, lambda _, writer: self._serve(client, writer))

    async def _serve(self, client: Client, writer: asyncio.StreamWriter) -> None:
        """Serve one connection until it ends."""
        # With no room in our own buffer, a drained write is one that the kernel took.
        writer.transport.set_write_buffer_limits(0)
        try:
            while (request := await client.read_request()) is not None:
                if not await self._exchange(request, client, writer):
                    break
        except OSError:
            pass  # Nobody there to read an answer whose truth is told.
        finally:
            writer.close()

    async def _exchange(self, request: Request, client: Client, writer: asyncio.StreamWriter) -> bool:
        """Answer one request; say whether the connection goes on."""
        if request.method == "GET" and (page := self._page(request.path)) is not None:
            writer.write(page)
            await writer.drain()
            return request.keeps_alive
        request_id = request.headers.get("x-request-id")
        fairness_id = request.headers.get("x-gateway-inference-fairness-id")
        record = Record(
            request_id=request_id, fairness_id=fairness_id, traceparent=request.headers.get("traceparent"), path=request.path,
            started_at=request.started_at,
        )
        self.running += 1
        try:
            ask, faults = self._read(request, record)
            return await self._generate(ask, faults, record, client, writer) and request.keeps_alive
        except Refused as refused:
            record.outcome = refused.outcome
            await self._commit(record)
            error = self.kind.error_answer(record.path, refused.status, refused.text, refused.field)
            writer.write(_answer(refused.status, orjson.dumps(error), self._echo(record)))
            await writer.drain()
            return request.keeps_alive
        except (ClientGone, OSError):
            if not record.seq:
                record.outcome = "client_closed"
                await self._commit(record)
            return False
        finally:
            self.running -= 1

    def _read(self, request: Request, record: Record) -> tuple[Ask, Faults]:
        """Read what is asked into the record too, or refuse."""
        if request.method != "POST" or request.path not in FIELDS:
            raise Refused(404, "Not Found")
        try:
            faults = read_faults(request.headers.get(HEADER), self.faults)
        except BadKnob as exc:
            raise Refused(400, str(exc)) from exc
        asked = read_body(request.body)
        model = asked.get("model")
        record.model = model if isinstance(model, str) else None
        if model not in self.models:
            raise Refused(404, self.kind.no_model(str(model), self.models), field="model")
        if self.kind.is_strict and (unknown := asked.keys() - FIELDS[request.path] - self.kind.own_fields):
            raise Refused(400, self.kind.unknown_field(min(unknown)), field=min(unknown))
        ask = read_ask(request.path, asked, empty_stream_options_ask=self.kind.empty_stream_options_ask)
        record.stream = ask.stream
        if asked.get("stream_options") is not None and self.kind.stream_options_need_stream and not ask.stream:
            raise Refused(400, "Stream options can only be defined when `stream=True`.", field="stream_options")
        if faults.error_before:
            raise Refused(faults.error_before, ERROR_TEXT, outcome="injected_error")
        return ask, faults

    async def _generate(
        self, ask: Ask, faults: Faults, record: Record, client: Client, writer: asyncio.StreamWriter
    ) -> bool:
        """Do the work; say whether the connection is still whole."""
        kind = self.kind
        record.response_id = kind.response_id(ask.path, faults, record.request_id, stream=ask.stream)
        record.prompt_tokens = ask.prompt_tokens
        turn = Turn(
            ask=ask,
            faults=faults,
            response_id=record.response_id,
            created=int(record.started_at),
            spell_usage=kind.usage,
        )
        if ask.stream:
            return await self._stream(turn, record, client, writer)
        # An answer in one piece takes as long as its stream would.
        if faults.first_ms or faults.chunk_ms:
            chunks = ask.choices * sum(1 for _ in turn.pieces())
            await client.stay(faults.first_ms + faults.chunk_ms * max(chunks - 1, 0))
        match faults.break_in_unary():
            case "error":
                raise Refused(500, ERROR_TEXT, outcome="injected_error")
            case "stall":
                await client.stay(None)
            case "reset":
                return await self._reset(record, writer)
        payload, record.usage_reported = kind.answer(turn)
        is_sound = isinstance(payload, bytes)
        body, headers = payload if is_sound else encode_json(payload, faults), self._echo(record)
        if faults.gzip:
            body, headers = gzip.compress(body, 1), headers + "content-encoding: gzip\r\n"
        headers += "content-encoding: br\r\n" if faults.mislabel else ""
        record.completion_tokens, record.outcome = turn.tokens, "finished"
        await self._commit(record)
        writer.write(_answer(200, body, headers, media_type="audio/mpeg" if is_sound else "application/json"))
        await writer.drain()
        return True

    async def _stream(self, turn: Turn, record: Record, client: Client, writer: asyncio.StreamWriter) -> bool:
        faults, chunks, produced = turn.faults, 0, 0
        headers = self.kind.stream_headers + self._echo(record) + ("content-encoding: gzip\r\n" if faults.gzip else "")
        headers += "content-encoding: br\r\n" if faults.mislabel else ""
        out = EventStream(writer, record, faults, _head(200, f"{headers}transfer-encoding: chunked\r\n"))
        if faults.first_ms:
            await client.stay(faults.first_ms)
        frames, outcome = self.kind.stream(turn), "finished"
        frame = next(frames)
        while True:
            if (frame.tokens or chunks) and outcome == "finished":
                match faults.break_due(chunks):
                    case "error":
                        frames, outcome = self.kind.broken_end(turn, produced), "injected_error"
                        frame = next(frames)
                    case "reset":
                        await out.flush()
                        return await self._reset(record, writer)
                    case "stall":
                        await out.flush()
                        await client.stay(None)
            following = next(frames, None)
            if following is None:
                await out.finish(frame, self._commit, outcome)
                return True
            await client.stay(faults.chunk_ms if frame.tokens and chunks else 0)
            await out.put(frame)
            chunks += frame.tokens > 0
            produced += frame.tokens
            frame = following

    async def _reset(self, record: Record, writer: asyncio.StreamWriter) -> bool:
        """Tear the connection down so that the peer sees a reset."""
        await asyncio.sleep(RESET_GRACE_SECONDS)
        record.outcome = "injected_reset"
        await self._commit(record)
        sock: socket.socket = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
        return False

    async def _commit(self, record: Record) -> None:
        record.ended_at = time.time()
        self._count(record)
        await self.truth.commit(record)

    def _count(self, record: Record) -> None:
        counts = {"prompt": record.prompt_tokens, "output": record.completion_tokens, record.outcome: 1}
        self.counters.update({(record.model, word): count for word, count in counts.items()})

    def _echo(self, record: Record) -> str:
        """Give back the request id, as only some kinds do."""
        return f"x-request-id: {record.request_id}\r\n" if self.kind.echoes_request_id and record.request_id else ""

    def _page(self, path: str) -> bytes | None:
        """Give what an operator may look at."""
        if path == "/health":
            return _answer(200, orjson.dumps(self.kind.health) if self.kind.health else b"")
        if path == "/v1/models":
            card = {"object": "model", "created": self._created, "owned_by": self.kind.owner}
            cards = [{"id": model} | card for model in self.models]
            return _answer(200, orjson.dumps({"object": "list", "data": cards}))
        if path == self.kind.metrics_path:
            return _answer(200, self._metrics().encode(), media_type="text/plain; version=0.0.4; charset=utf-8")
        # TensorRT-LLM's own /metrics is a list of iterations, emptied by reading it.
        return _answer(200, b"[]") if path == "/metrics" else None

    def _metrics(self) -> str:
        lines = []
        for name, labels, word in self.kind.metrics:
            for model in self.models:
                value = self.running if word == "running" else self.counters[model, word]
                lines.append(f"{name}{{{labels.format(model)}}} {value}\n")
        return "".join(lines)


def _head(status: int, headers: str) -> bytes:
    return f"HTTP/1.1 {status} {_PHRASES.get(status, 'Error')}\r\n{headers}\r\n".encode("latin-1")


def _answer(status: int, body: bytes, headers: str = "", *, media_type: str = "application/json") -> bytes:
    return _head(status, f"content-type: {media_type}\r\ncontent-length: {len(body)}\r\n{headers}") + body
