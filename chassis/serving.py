# SPDX-License-Identifier: Apache-2.0
"""
Serve a gRPC method table on a Unix socket, or on TCP to those who show a certificate, until told to stop.

The only place that catches everything: a servicer that fails answers INTERNAL, which
Envoy turns into the failure mode written in envoy.yaml.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from chassis.certificates import WatchedCertificates, server_credentials
from chassis.errors import Invalid, PeajeError, Unavailable
from chassis.telemetry import traces

log = structlog.get_logger()

#: How long calls in flight may take to finish after SIGTERM.
GRACE_SECONDS = 5.0
#: Envoy keeps one HTTP/2 connection per worker; pings would only wake idle processes.
_OPTIONS = (("grpc.max_concurrent_streams", 10000), ("grpc.so_reuseport", 0))


class Message(Protocol):
    """A protobuf message class, as far as serving needs it."""

    def SerializeToString(self) -> bytes: ...  # noqa: N802, D102 - protobuf's own name


Unary = Callable[[Any, grpc.ServicerContext], Message]
AsyncUnary = Callable[[Any, grpc.aio.ServicerContext], Awaitable[Message]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Door:
    """Where a service listens: on its socket, or with *address* on TCP instead, and then only with certificates."""

    #: Unix socket, relative to the state directory.
    socket: str
    #: host:port; empty: the socket.
    address: str = ""
    certificates: WatchedCertificates | None = None
    #: How long it goes on once it is told to stop: until everybody has asked for its health and turned to another one.
    drain_seconds: float = 0.0

    @property
    def name(self) -> str:
        """What logs call it."""
        return self.address or self.socket


def door(socket: str, *, listen: str, tls_directory: Path | None, drain_seconds: float = 0.0) -> Door:
    """
    Read where to listen from a service's settings; raises `Invalid`.

    TCP without certificates is refused: whoever reaches the port could reserve, settle and decide.
    """
    if not listen:
        return Door(socket=socket, drain_seconds=drain_seconds)
    _host, colon, port = listen.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or not 0 <= int(port) <= 65535:
        raise Invalid(f"{listen!r} is no address to listen on.", mend="Write host:port, as in [::]:9001.")
    if tls_directory is None:
        raise Invalid("A service listens on TCP with certificates only.", mend="Name their directory in PEAJE_TLS_DIRECTORY.")
    return Door(socket=socket, address=listen, certificates=WatchedCertificates(tls_directory), drain_seconds=drain_seconds)


def serve_unary(
    at: Door, methods: Mapping[str, tuple[Unary, type[Any]]], *, workers: int
) -> None:
    """
    Serve unary *methods* ("/package.Service/Method" → handler and request class) until SIGTERM.

    A synchronous server with few threads: measured a third cheaper per call than asyncio
    for calls that are mostly computation.
    """
    server = grpc.server(ThreadPoolExecutor(max_workers=workers), options=_OPTIONS)
    services: dict[str, dict[str, grpc.RpcMethodHandler]] = {}
    for path, (handler, request) in methods.items():
        _, service, method = path.split("/")
        services.setdefault(service, {})[method] = grpc.unary_unary_rpc_method_handler(
            _guarded(path, handler),
            request_deserializer=request.FromString,
            response_serializer=lambda answer: answer.SerializeToString(),
        )
    for service, handlers in services.items():
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    status = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(status, server)
    _bind(server, at)

    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    server.start()
    _restrict(at)
    log.info("serving", socket=at.name)
    stop.wait()
    status.enter_graceful_shutdown()
    # A call that arrives while the server stops is answered with an error, which Envoy does not ask again.
    stop.clear()
    stop.wait(at.drain_seconds)  # told twice, it hurries
    server.stop(GRACE_SECONDS).wait()
    traces.stop()
    log.info("stopped", socket=at.name)


def serve_streams(
    at: Door, methods: Mapping[str, tuple[Callable[..., Any], type[Any]]], *,
    beside: Mapping[str, tuple[AsyncUnary, type[Any]]], grace_seconds: float = GRACE_SECONDS,
) -> None:
    """
    Serve streaming *methods* ("/package.Service/Method" → handler and request class) until SIGTERM.

    On asyncio: a thread per stream would not scale. What is *beside* them has one message and one answer. Streams that are
    under way when it comes have *grace_seconds* to end; no new one is taken meanwhile.
    """
    asyncio.run(_serve_streams(at, methods, beside, grace_seconds))


async def _serve_streams(
    at: Door, methods: Mapping[str, tuple[Callable[..., Any], type[Any]]], beside: Mapping[str, tuple[AsyncUnary, type[Any]]],
    grace_seconds: float,
) -> None:
    server = grpc.aio.server(options=_OPTIONS)
    handlers = [
        (path, request, grpc.stream_stream_rpc_method_handler, _traced(path, handler)) for path, (handler, request) in methods.items()
    ] + [(path, request, grpc.unary_unary_rpc_method_handler, handler) for path, (handler, request) in beside.items()]
    for path, request, kind, handler in handlers:
        _, service, method = path.split("/")
        served = kind(
            handler, request_deserializer=request.FromString, response_serializer=lambda answer: answer.SerializeToString()
        )
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: served}),))
    status = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(status, server)
    await status.set("", health_pb2.HealthCheckResponse.SERVING)
    _bind(server, at)

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await server.start()
    _restrict(at)
    log.info("serving", socket=at.name)
    await stop.wait()
    await status.enter_graceful_shutdown()
    stop.clear()
    with suppress(TimeoutError):
        await asyncio.wait_for(stop.wait(), at.drain_seconds)
    await server.stop(grace_seconds)  # ends with the last stream
    traces.stop()
    log.info("stopped", socket=at.name)


def run(main: Callable[[], None]) -> None:
    """Call *main*; what a person can mend (a missing setting, a bad secret) is one line, not a traceback."""
    try:
        main()
    except PeajeError as exc:
        # In one piece: a thread that has begun to log would come between the line and its end.
        sys.stderr.write(f"{exc}\n")
        sys.exit(1)


def _guarded(path: str, handler: Unary) -> Unary:
    def call(request: Any, context: grpc.ServicerContext) -> Message:
        try:
            with traces.serving(path, context.invocation_metadata):
                return handler(request, context)
        except Invalid as exc:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, exc.message)
            raise
        except Unavailable as exc:
            context.abort(grpc.StatusCode.UNAVAILABLE, exc.message)
            raise
        except Exception as exc:
            # Only the type: a message may hold what a caller sent.
            log.error("call_failed", method=path, error=type(exc).__name__, exc_info=True)
            context.abort(grpc.StatusCode.INTERNAL, "internal error")
            raise

    return call


def _traced(path: str, handler: Callable[..., Any]) -> Callable[..., Any]:
    async def call(messages: Any, context: grpc.aio.ServicerContext) -> Any:
        with traces.serving(path, context.invocation_metadata):
            async for answer in handler(messages, context):
                yield answer

    return call


def _bind(server: grpc.Server | grpc.aio.Server, at: Door) -> None:
    if at.certificates is not None:
        try:
            server.add_secure_port(at.address, server_credentials(at.certificates))
        except RuntimeError as exc:
            raise Unavailable(f"Nothing can listen on {at.address}.", mend="Is the port taken?") from exc
        return
    Path(at.socket).parent.mkdir(parents=True, exist_ok=True)
    Path(at.socket).unlink(missing_ok=True)
    server.add_insecure_port(f"unix:{at.socket}")


def _restrict(at: Door) -> None:
    if at.certificates is None:
        os.chmod(at.socket, 0o600)
