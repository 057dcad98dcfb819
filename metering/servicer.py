# SPDX-License-Identifier: Apache-2.0
"""
Answer Envoy's ext_proc, and hear its gRPC access log.

ext_proc: one message per stream that needs shaping, the buffered request body.

What Envoy does: replaces the body by ours and goes on; the answer never comes here. If this
service is away the request passes as it was (failure_mode_allow: true in envoy.yaml): the tap
then reads what the engine sends unasked, and `basis` says so.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from datetime import datetime
from typing import Any

import grpc
import structlog
from google.protobuf.struct_pb2 import Struct

from chassis import contract
from chassis.models import ModelCatalogue, supports_continuous_usage
from chassis.wire import access_log_entry_pb2 as entry_wire
from chassis.wire import access_log_pb2 as log_wire
from chassis.wire import ext_proc_pb2 as wire
from metering.adapters.witness import Heard
from metering.core.journal import Malformed
from metering.core.shape import Running, ask_for_usage
from metering.core.witness import Sighting, sighting

log = structlog.get_logger()

METHOD = "/envoy.service.ext_proc.v3.ExternalProcessor/Process"
ACCESS_LOG_METHOD = "/envoy.service.accesslog.v3.AccessLogService/StreamAccessLogs"


class Servicer:
    """Shapes requests; holds no state between streams."""

    def __init__(self, catalogue: Callable[[], ModelCatalogue]) -> None:
        self._catalogue = catalogue

    async def process(
        self, messages: AsyncIterator[wire.ProcessingRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[wire.ProcessingResponse]:
        """Answer each message in turn; an order that Envoy never sends ends the stream with an error."""
        async for message in messages:
            match message.WhichOneof("request"):
                case "request_body":
                    yield self._shaped(message)
                case "request_headers":
                    yield wire.ProcessingResponse(request_headers=wire.HeadersResponse())
                case "response_headers":
                    yield wire.ProcessingResponse(response_headers=wire.HeadersResponse())
                case "response_body":
                    yield wire.ProcessingResponse(response_body=wire.BodyResponse())
                case "request_trailers":
                    yield wire.ProcessingResponse(request_trailers=wire.TrailersResponse())
                case "response_trailers":
                    yield wire.ProcessingResponse(response_trailers=wire.TrailersResponse())
                case _:
                    log.error("message_unknown")
                    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "unknown message")

    def _shaped(self, message: wire.ProcessingRequest) -> wire.ProcessingResponse:
        facts = message.metadata_context.filter_metadata.get(contract.NS_REQUEST)
        model = facts.fields[contract.REQ_MODEL].string_value if facts is not None else ""
        engine = self._catalogue().engine_of(model)
        running = Running(engine is not None and supports_continuous_usage(engine))
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


class Witness:
    """Hears what Envoy's gRPC access log says of exchanges that ended; answers nothing while it lasts."""

    def __init__(self, heard: Heard, clock: Callable[[], datetime]) -> None:
        self._heard = heard
        self._clock = clock

    async def hear(
        self, messages: AsyncIterator[log_wire.StreamAccessLogsMessage], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[log_wire.StreamAccessLogsResponse]:
        """Keep each entry to be compared; one that is none of ours is logged and left out."""
        del context
        async for message in messages:
            now = self._clock()
            for entry in message.http_logs.log_entry:
                if entry.common_properties.intermediate_log_entry:
                    continue
                try:
                    self._heard.add(_sighting(entry, now))
                except Malformed as exc:
                    log.error("sighting_malformed", reason=str(exc))
        yield log_wire.StreamAccessLogsResponse()


def _sighting(entry: entry_wire.HTTPAccessLogEntry, now: datetime) -> Sighting:
    common = entry.common_properties
    spaces = common.metadata.filter_metadata
    return sighting(
        common.stream_id, identity=_values(spaces[contract.NS_IDENTITY], _OF_IDENTITY),
        request=_values(spaces[contract.NS_REQUEST], _OF_REQUEST), usage=_values(spaces[contract.NS_USAGE], _OF_USAGE),
        heard_at=now,
    )


#: What a sighting needs of the twenty values that an entry has: reading all of them costs twice as much.
_OF_IDENTITY = (contract.ID_TENANT,)
_OF_REQUEST = (contract.REQ_STARTED_AT,)
_OF_USAGE = (contract.USE_SEEN, contract.USE_INPUT, contract.USE_OUTPUT)


def _values(namespace: Struct, names: Sequence[str]) -> dict[str, Any]:
    """Those of its plain values that have one of *names*."""
    fields = namespace.fields
    found = {}
    for name in names:
        if name in fields:
            value = fields[name]
            kind = value.WhichOneof("kind")
            found[name] = getattr(value, kind) if kind else None
    return found
