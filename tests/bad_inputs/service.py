# SPDX-License-Identifier: Apache-2.0
"""extauth behind its own socket, as Envoy meets it, and without one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import grpc
import orjson

from chassis import contract
from chassis.clock import utc_now
from chassis.models import ModelCatalogue
from chassis.wire import ext_authz_pb2 as wire
from extauth.servicer import METHOD, Servicer
from tests.identities import Call

CATALOGUE = ModelCatalogue.parse({"models": [{"name": "tiny", "engine": "openai", "endpoints": ["127.0.0.1:1"]}]}, source="test")
Headers = Sequence[tuple[str, bytes]]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a caller gets: 200 stands for being let through."""

    status: int
    code: str | None
    metadata: dict[str, Any]
    headers: dict[str, str] = field(default_factory=dict)


def request(
    headers: Headers, *, model: str = "tiny", dialect: str = "openai.chat", host: str = "a.example",
    address: str = "127.0.0.1", principal: str = "",
) -> wire.CheckRequest:  # fmt: skip
    """A CheckRequest as Envoy writes it with raw headers."""
    check = wire.CheckRequest()
    http = check.attributes.request.http
    http.path, http.host, http.method = "/v1/chat/completions", host, "POST"
    http.header_map.headers.add(key=contract.REQUEST_ID_HEADER, raw_value=b"r-1")
    for name, value in headers:
        http.header_map.headers.add(key=name, raw_value=value)
    check.attributes.source.address.socket_address.address = address
    check.attributes.source.principal = principal
    facts = check.attributes.metadata_context.filter_metadata[contract.NS_REQUEST]
    facts.fields[contract.REQ_DIALECT].string_value = dialect
    facts.fields[contract.REQ_MODEL].string_value = model
    return check


def read(response: wire.CheckResponse) -> Answer:
    """The answer as a caller would meet it."""
    fields = response.dynamic_metadata.fields
    metadata = {name: value.string_value or value.number_value for name, value in fields.items()}
    if response.WhichOneof("http_response") == "ok_response" and response.status.code == 0:
        return Answer(status=200, code=None, metadata=metadata)
    error = orjson.loads(response.denied_response.body)["error"]
    assert response.status.code != 0
    assert "r-1" == error["request_id"]
    return Answer(
        status=int(response.denied_response.status.code), code=error["code"], metadata=metadata,
        headers={option.header.key: option.header.value for option in response.denied_response.headers},
    )  # fmt: skip


Check = Callable[..., Answer]


def directly(servicer: Servicer) -> Check:
    """Ask the servicer without a transport."""
    return lambda headers, **attributes: read(servicer.check(request(headers, **attributes), Call()))  # type: ignore[arg-type]


@contextmanager
def on_a_socket(servicer: Servicer, directory: Path) -> Iterator[Check]:
    """Ask over gRPC on a Unix socket."""
    server = grpc.server(ThreadPoolExecutor(4))
    _, service, method = METHOD.split("/")
    handler = grpc.unary_unary_rpc_method_handler(
        servicer.check, request_deserializer=wire.CheckRequest.FromString,
        response_serializer=wire.CheckResponse.SerializeToString,
    )  # fmt: skip
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
    server.add_insecure_port(f"unix:{directory}/extauth.sock")
    server.start()
    with grpc.insecure_channel(f"unix:{directory}/extauth.sock") as channel:
        call = channel.unary_unary(
            METHOD, request_serializer=wire.CheckRequest.SerializeToString,
            response_deserializer=wire.CheckResponse.FromString,
        )  # fmt: skip
        try:
            yield lambda headers, told="", **attributes: read(
                call(request(headers, **attributes), timeout=10, metadata=Call(told).invocation_metadata())
            )
        finally:
            server.stop(None).wait()


class Clock:
    """A clock that a test moves; safe to read from several threads."""

    def __init__(self, now: datetime) -> None:
        self._lock = threading.Lock()
        self._now: datetime | None = now

    def __call__(self) -> datetime:
        with self._lock:
            return self._now or utc_now()

    def run(self) -> None:
        """Go with the machine's from here on."""
        with self._lock:
            self._now = None

    def move(self, to: datetime) -> None:
        """Make it another time."""
        with self._lock:
            self._now = to
