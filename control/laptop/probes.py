# SPDX-License-Identifier: Apache-2.0
"""
Ask a part whether it is ready.

A probe answers None when the part is ready, else why not yet, in a few words.
It raises `Trouble` when waiting longer will not help.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx

from control.laptop.errors import Trouble

Probe = Callable[[], Awaitable[str | None]]

#: One attempt; a part that is slower than this is asked again.
ATTEMPT_SECONDS = 2.0


def http_client() -> httpx.AsyncClient:
    """For loopback: never through a proxy that the environment names."""
    return httpx.AsyncClient(trust_env=False, timeout=ATTEMPT_SECONDS)


def http_ok(url: str) -> Probe:
    """Ready when GET *url* answers 200."""

    async def probe() -> str | None:
        try:
            async with http_client() as client:
                answer = await client.get(url)
        except httpx.HTTPError as exc:
            return f"{url}: {type(exc).__name__}"
        return None if answer.status_code == httpx.codes.OK else f"{url} answers {answer.status_code}"

    return probe


def lists_model(url: str, model: str) -> Probe:
    """
    Ready when GET *url* (an OpenAI-style /v1/models) lists *model*.

    Not its /health: a Dynamo frontend says "healthy" without any worker.
    """

    async def probe() -> str | None:
        try:
            async with http_client() as client:
                names = [entry["id"] for entry in (await client.get(url)).json()["data"]]
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as exc:
            return f"{url}: {type(exc).__name__}"
        return None if model in names else f"{url} does not list {model}"

    return probe


def grpc_serving(socket: str) -> Probe:
    """Ready when grpc.health.v1.Health/Check on the Unix *socket* says SERVING."""

    async def probe() -> str | None:
        if not Path(socket).exists():
            return f"{socket} does not exist"
        # Late: nothing but this needs gRPC, and a part is up after the first few probes.
        import grpc  # noqa: PLC0415
        from grpc_health.v1 import health_pb2, health_pb2_grpc  # noqa: PLC0415

        try:
            async with grpc.aio.insecure_channel(f"unix:{socket}") as channel:
                answer = await health_pb2_grpc.HealthStub(channel).Check(
                    health_pb2.HealthCheckRequest(), timeout=ATTEMPT_SECONDS
                )
        except grpc.aio.AioRpcError as exc:
            return f"{socket}: {exc.code().name}"
        if answer.status == health_pb2.HealthCheckResponse.SERVING:
            return None
        return f"{socket} is not serving yet"

    return probe


def valkey_answers(socket: str, password: str) -> Probe:
    """Ready when the server on *socket* answers PING; it does not while it reads its append-only file."""

    async def probe() -> str | None:
        try:
            reader, writer = await asyncio.open_unix_connection(socket)
        except OSError as exc:
            return f"{socket}: {exc.strerror}"
        try:
            writer.write(f"AUTH {password}\r\nPING\r\n".encode())
            async with asyncio.timeout(ATTEMPT_SECONDS):
                authenticated, answer = await reader.readline(), await reader.readline()
        except (OSError, TimeoutError) as exc:
            return f"{socket}: {type(exc).__name__}"
        finally:
            writer.close()
        if authenticated.startswith((b"-WRONGPASS", b"-ERR")):
            raise Trouble("Valkey refuses the password in secrets/valkey-password.")
        return None if answer.startswith(b"+PONG") else answer.decode(errors="replace").strip()

    return probe


def file_exists(path: Path) -> Probe:
    """Ready when *path* exists."""

    async def probe() -> str | None:
        return None if path.exists() else f"{path.name} does not exist"

    return probe
