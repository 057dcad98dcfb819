# SPDX-License-Identifier: Apache-2.0
"""A collector of traces for tests: takes OTLP over HTTP, reads it by the official messages, keeps spans and raw bytes."""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One span, as far as tests look at it."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    attributes: dict[str, Any]
    is_error: bool
    #: Traces that it names beside its own.
    links: tuple[str, ...] = ()


@dataclass(slots=True)
class Collected:
    """What has come so far."""

    url: str
    spans: list[Span] = field(default_factory=list)
    raw: list[bytes] = field(default_factory=list)

    def of(self, trace_id: str) -> list[Span]:
        """Spans of one trace."""
        return [span for span in list(self.spans) if span.trace_id == trace_id]

    def wait(self, trace_id: str, enough: Callable[[list[Span]], bool], *, seconds: float = 30.0) -> list[Span]:
        """Spans of one trace once there are *enough*."""
        deadline = time.monotonic() + seconds
        while not enough(found := self.of(trace_id)):
            assert time.monotonic() < deadline, found
            time.sleep(0.05)
        return found


@contextmanager
def collecting_traces(port: int) -> Iterator[Collected]:
    """Collect on loopback."""
    collected = Collected(url=f"http://127.0.0.1:{port}")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self._body()
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            collected.raw.append(body)
            collected.spans += _spans(ExportTraceServiceRequest.FromString(body))
            answer = ExportTraceServiceResponse().SerializeToString()
            self.send_response(200)
            self.send_header("content-type", "application/x-protobuf")
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def _body(self) -> bytes:
            if "content-length" in self.headers:
                return self.rfile.read(int(self.headers["content-length"]))
            # Envoy says no length: chunks, each behind its size.
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield collected
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _spans(request: ExportTraceServiceRequest) -> Iterator[Span]:
    for resource in request.resource_spans:
        about = {pair.key: pair.value.string_value for pair in resource.resource.attributes}
        for scope in resource.scope_spans:
            for span in scope.spans:
                yield Span(
                    service=about.get("service.name", ""), name=span.name, trace_id=span.trace_id.hex(), span_id=span.span_id.hex(),
                    parent_id=span.parent_span_id.hex(), is_error=span.status.code == 2,
                    attributes={pair.key: _value(pair.value) for pair in span.attributes},
                    links=tuple(link.trace_id.hex() for link in span.links),
                )  # fmt: skip


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    return None if kind is None else getattr(value, kind)
