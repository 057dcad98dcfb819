# SPDX-License-Identifier: Apache-2.0
"""
An endpoint picker as the Gateway API Inference Extension describes one (proposal 004), over real gRPC.

It reads headers and body, answers both once the body is whole, names servers in a header and in the metadata namespace
`envoy.lb`, and hands the body back in pieces. What it names, and whether it answers at all, is the test's.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

import grpc

from chassis.wire import ext_proc_pb2 as wire

_METHOD: Final = ("envoy.service.ext_proc.v3.ExternalProcessor", "Process")
#: Bytes of a piece of the body, as the protocol asks for.
_PIECE: Final = 64 << 10


@dataclass
class Asked:
    """What it was asked once: headers, body, and the servers it was told to choose among (None: not told)."""

    headers: dict[str, str]
    body: bytes
    among: list[str] | None


@dataclass
class Picker:
    """A picker, and what it was asked."""

    port: int
    #: What it names; empty: nothing.
    names: str = ""
    #: It refuses with this status instead.
    refuses: int = 0
    #: It breaks off instead.
    breaks: bool = False
    #: It answers while this is set.
    answers: threading.Event = field(default_factory=threading.Event)
    asked: list[Asked] = field(default_factory=list)

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"127.0.0.1:{self.port}"

    def process(self, messages: Iterator[wire.ProcessingRequest], context: grpc.ServicerContext) -> Iterator[wire.ProcessingResponse]:
        """Speak with Envoy about one request."""
        headers: dict[str, str] = {}
        among, body = None, b""
        for message in messages:
            match message.WhichOneof("request"):
                case "request_headers":
                    headers = {one.key: (one.raw_value.decode() or one.value) for one in message.request_headers.headers.headers}
                    hint = message.metadata_context.filter_metadata.get("envoy.lb.subset_hint")
                    among = None if hint is None else list(hint["x-gateway-destination-endpoint-subset"])
                case "request_body":
                    body += message.request_body.body
                    if message.request_body.end_of_stream:
                        self.asked.append(Asked(headers=headers, body=body, among=among))
                        yield from self._picked(body, context)
                case other:
                    raise AssertionError(f"{other} is never sent")

    def _picked(self, body: bytes, context: grpc.ServicerContext) -> Iterator[wire.ProcessingResponse]:
        self.answers.wait(timeout=30)
        if self.breaks:
            context.abort(grpc.StatusCode.INTERNAL, "broken")
        if self.refuses:
            yield wire.ProcessingResponse(
                immediate_response=wire.ImmediateResponse(status={"code": self.refuses}, body=b"saturated")  # type: ignore[arg-type]
            )
            return
        first = wire.ProcessingResponse(request_headers=wire.HeadersResponse())
        if self.names:
            chosen = first.request_headers.response.header_mutation.set_headers.add()
            chosen.header.key, chosen.header.raw_value = "x-gateway-destination-endpoint", self.names.encode()
            first.dynamic_metadata.update({"envoy.lb": {"x-gateway-destination-endpoint": self.names}})
        yield first
        for start in range(0, max(len(body), 1), _PIECE):
            piece = wire.ProcessingResponse()
            streamed = piece.request_body.response.body_mutation.streamed_response
            streamed.body, streamed.end_of_stream = body[start : start + _PIECE], start + _PIECE >= len(body)
            yield piece


@contextmanager
def picking(port: int) -> Iterator[Picker]:
    """A picker that listens at *port*, until the end."""
    picker = Picker(port)
    picker.answers.set()
    service, method = _METHOD
    handler = grpc.stream_stream_rpc_method_handler(
        picker.process, request_deserializer=wire.ProcessingRequest.FromString, response_serializer=wire.ProcessingResponse.SerializeToString
    )
    server = grpc.server(ThreadPoolExecutor(16))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
    assert server.add_insecure_port(picker.address) == port
    server.start()
    try:
        yield picker
    finally:
        picker.answers.set()
        server.stop(None).wait()
