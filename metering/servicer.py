# SPDX-License-Identifier: Apache-2.0
"""
Answer Envoy's ext_proc, of which two filters ask here, each only where it must, and hear its second access log.

*metering* sends the buffered body of a request that needs shaping: one message, and the answer never
comes here. If this service is away the request passes as it was (failure_mode_allow: true in envoy.yaml):
the tap then reads what the engine sends unasked, and `basis` says so.

*slices* streams the answer of a request of which ratelimit holds a slice only: what we hand back is what the
client gets, and the last piece we hand back ends the stream; Envoy then cancels the model server's. If this
service is away that request is refused, or reset if it streams already (failure_mode_allow: false): it could
not be stopped where its budget ends.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Callable, Iterable
from datetime import datetime
from typing import Final

import grpc
import structlog
from opentelemetry.proto.collector.logs.v1 import logs_service_pb2 as log_wire

from chassis import contract
from chassis.errors import Unavailable
from chassis.models import ModelCatalogue
from chassis.wire import ext_proc_pb2 as wire
from metering.adapters.slices import Slices
from metering.adapters.witness import Heard
from metering.core.journal import Malformed
from metering.core.shape import Running, ask_for_usage
from metering.core.valve import Stop, Valve
from metering.core.witness import sighting

log = structlog.get_logger()

METHOD = "/envoy.service.ext_proc.v3.ExternalProcessor/Process"
ACCESS_LOG_METHOD = "/opentelemetry.proto.collector.logs.v1.LogsService/Export"

#: What neither filter sends as it is configured; an Envoy that is configured otherwise goes on.
_UNREAD: Final = {
    "request_headers": wire.ProcessingResponse(request_headers=wire.HeadersResponse()),
    "request_trailers": wire.ProcessingResponse(request_trailers=wire.TrailersResponse()),
}
_USED_UP: Final = Stop(
    code="insufficient_quota", message="A quota or budget is used up: what is left of it pays for no more of this answer."
)
_NOT_DECIDED: Final = Stop(code="service_unavailable", message="The gateway cannot decide right now whether this answer may go on.")

_UNREADABLE: Final = Stop(
    code="upstream_unavailable", message="The model server's answer is encoded in a way that cannot be read here, so it may not go on."
)


class Servicer:
    """Shapes requests and ends streams; holds no state between streams."""

    def __init__(self, catalogue: Callable[[], ModelCatalogue], slices: Slices) -> None:
        self._catalogue = catalogue
        self._slices = slices

    async def process(
        self, messages: AsyncIterator[wire.ProcessingRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[wire.ProcessingResponse]:
        """Answer each message in turn; an order that Envoy never sends ends the stream with an error."""
        stream = _Passing()
        async for message in messages:
            match message.WhichOneof("request"):
                case "request_body":
                    yield self._shaped(message)
                case "request_headers" | "request_trailers" as part:
                    yield _UNREAD[part]
                case "response_headers":
                    stream = _stream(message, self._slices) or stream
                    yield stream.headers()
                case "response_body":
                    if not stream.is_over:
                        yield await stream.piece(message.response_body)
                case "response_trailers":
                    if (rest := await stream.rest()) is not None:
                        yield rest
                    if not stream.is_over:
                        yield wire.ProcessingResponse(response_trailers=wire.TrailersResponse())
                case _:
                    log.error("message_unknown")
                    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "unknown message")

    def _shaped(self, message: wire.ProcessingRequest) -> wire.ProcessingResponse:
        facts = message.metadata_context.filter_metadata.get(contract.NS_REQUEST)
        model = facts.fields[contract.REQ_MODEL].string_value if facts is not None else ""
        running = Running(self._catalogue().sends_running_usage(model))
        response = wire.ProcessingResponse(request_body=wire.BodyResponse())
        try:
            body = ask_for_usage(message.request_body.body, running)
        except ValueError:
            # gate.lua lets only objects through; if it is none after all, the engine says so.
            log.warning("body_unreadable", model=model)
            return response
        if body != message.request_body.body:
            response.request_body.response.body_mutation.body = body
        return response


class _Passing:
    """An answer that is none of ours to judge: handed back as it comes."""

    is_over = False

    def headers(self) -> wire.ProcessingResponse:
        """What is said to the answer's headers."""
        return wire.ProcessingResponse(response_headers=wire.HeadersResponse())

    async def piece(self, body: wire.HttpBody) -> wire.ProcessingResponse:
        """What the client gets instead of *body*."""
        return _handed_back(body.body, is_last=body.end_of_stream)

    async def rest(self) -> wire.ProcessingResponse | None:
        """What is still to come before the trailers, if anything is."""
        return None


class _Stream(_Passing):
    """An answer that passes event by event through a valve."""

    def __init__(self, valve: Valve, slices: Slices, *, tenant_id: str, request_id: str) -> None:
        self._valve = valve
        self._slices = slices
        self._tenant_id = tenant_id
        self._request_id = request_id
        self.is_over = False

    def headers(self) -> wire.ProcessingResponse:
        """No length: it may end before its sender's end."""
        answer = wire.ProcessingResponse(response_headers=wire.HeadersResponse())
        answer.response_headers.response.header_mutation.remove_headers.append("content-length")
        return answer

    async def piece(self, body: wire.HttpBody) -> wire.ProcessingResponse:
        """What the client gets instead of *body*: its whole events, or the end of the stream."""
        events = self._valve.events(body.body)
        if body.end_of_stream:
            events = itertools.chain(events, self._valve.rest())
        return await self._through(events, is_last=body.end_of_stream)

    async def rest(self) -> wire.ProcessingResponse | None:
        """What waited for the end of an event that never came."""
        events = list(self._valve.rest())
        return await self._through(events, is_last=False) if events and not self.is_over else None

    async def _through(self, events: Iterable[bytes], *, is_last: bool) -> wire.ProcessingResponse:
        passed = b""
        for event in events:
            weighed = self._valve.weigh(event)
            if not self._valve.passes(weighed):
                stop = await self._renew(input_tokens=self._valve.input_to_hold(weighed), output_tokens=weighed.weight)
                if stop is not None and weighed.generates:
                    return self._ended(passed, stop)
            passed += self._valve.let(weighed)
        return _handed_back(passed, is_last=is_last)

    async def _renew(self, *, input_tokens: int, output_tokens: int) -> Stop | None:
        try:
            held = await self._slices.renew(
                tenant_id=self._tenant_id, request_id=self._request_id, input_tokens=input_tokens, output_tokens=output_tokens
            )
        except Unavailable:
            return _NOT_DECIDED
        if held < output_tokens:
            return _USED_UP
        self._valve.held, self._valve.held_input = held, input_tokens
        return None

    def _ended(self, passed: bytes, stop: Stop) -> wire.ProcessingResponse:
        self.is_over = True
        log.info("stream_stopped", request_id=self._request_id, tenant=self._tenant_id, code=stop.code, output=self._valve.delivered)
        answer = _handed_back(passed + self._valve.ending(stop), is_last=True)
        usage = answer.dynamic_metadata.fields[contract.NS_USAGE].struct_value
        usage.fields[contract.USE_STOPPED].string_value = "running" if self._valve.is_reported else "counted"
        return answer


class _Encoded(_Stream):
    """An answer in an encoding that nobody asked for and Envoy does not undo: what cannot be weighed may not pass."""

    def headers(self) -> wire.ProcessingResponse:
        """What is handed back is plain."""
        answer = super().headers()
        answer.response_headers.response.header_mutation.remove_headers.append("content-encoding")
        return answer

    async def piece(self, body: wire.HttpBody) -> wire.ProcessingResponse:
        """The end, whatever comes."""
        del body
        return self._ended(b"", _UNREADABLE)


def _stream(message: wire.ProcessingRequest, slices: Slices) -> _Stream | None:
    """The stream that begins with *message*; None for an answer that is none (an error, no events)."""
    known = message.metadata_context.filter_metadata
    admission, request = known[contract.NS_ADMISSION].fields, known[contract.NS_REQUEST].fields
    headers = {header.key: header.raw_value.decode("latin-1") or header.value for header in message.response_headers.headers.headers}
    is_events = headers.get("content-type", "").lower().startswith("text/event-stream")
    if not is_events or not headers.get(":status", "").startswith("2"):
        return None
    held = int(admission[contract.ADM_SLICE_TOKENS].number_value)
    valve = Valve(
        dialect=request[contract.REQ_DIALECT].string_value,
        choices=int(request[contract.REQ_CHOICES].string_value or 1),
        held_input=int(admission[contract.ADM_RESERVED_TOKENS].number_value) - held,
        held=held,
    )
    is_plain = headers.get("content-encoding", "identity") == "identity"
    return (_Stream if is_plain else _Encoded)(
        valve, slices,
        tenant_id=known[contract.NS_IDENTITY].fields[contract.ID_TENANT].string_value,
        request_id=admission[contract.ADM_SLICE].string_value,
    )  # fmt: skip


def _handed_back(body: bytes, *, is_last: bool) -> wire.ProcessingResponse:
    answer = wire.ProcessingResponse()
    piece = answer.response_body.response.body_mutation.streamed_response
    piece.body, piece.end_of_stream = body, is_last
    return answer


class Witness:
    """Hears what Envoy's OpenTelemetry access log says of exchanges that ended: a line of each."""

    def __init__(self, heard: Heard, clock: Callable[[], datetime]) -> None:
        self._heard = heard
        self._clock = clock

    async def hear(
        self, message: log_wire.ExportLogsServiceRequest, context: grpc.aio.ServicerContext
    ) -> log_wire.ExportLogsServiceResponse:
        """Keep each line to be compared; one that is none of ours is logged and left out."""
        del context
        now, said = self._clock(), []
        for resource in message.resource_logs:
            for scope in resource.scope_logs:
                for record in scope.log_records:
                    try:
                        said.append(sighting(record.body.string_value, heard_at=now))
                    except Malformed as exc:
                        log.error("sighting_malformed", reason=str(exc))
        self._heard.add(said)
        return log_wire.ExportLogsServiceResponse()
