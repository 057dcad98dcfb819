# SPDX-License-Identifier: Apache-2.0
"""
A load generator on raw sockets: cheap enough not to be what is measured.

In a closed loop a connection sends when it has its answer. At a fixed rate requests have their moments, whatever becomes
of those before: one that finds no connection free waits for it, and that wait is part of its latency.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from itertools import cycle


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What to send, how often, from how many connections."""

    port: int
    path: str
    headers: dict[str, str]
    body: bytes
    requests: int
    connections: int
    #: Keys, of which each request takes the next one; none: the headers say who is calling.
    keys: tuple[str, ...] = ()
    #: Requests a second, at even distances; None: a closed loop.
    rate: float | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """How it went; latencies in seconds, sorted."""

    seconds: float
    latencies: list[float]
    failures: int

    def quantile(self, q: float) -> float:
        """Latency in milliseconds below which a share *q* of the answers came."""
        return 1000 * self.latencies[min(len(self.latencies) - 1, int(q * len(self.latencies)))]


async def run(load: Load) -> Result:
    """Send all requests and read all answers whole."""
    head = f"POST {load.path} HTTP/1.1\r\nhost: bench\r\ncontent-length: {len(load.body)}\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in load.headers.items())
    opening, body = head.encode(), b"\r\n" + load.body
    whole = opening + body
    keys = cycle(load.keys)
    left = iter(range(load.requests))
    latencies: list[float] = []
    failures = 0

    async def connection() -> None:
        nonlocal failures
        reader, writer = await asyncio.open_connection("127.0.0.1", load.port)
        for number in left:
            sent = time.perf_counter()
            if load.rate is not None:
                due = began + number / load.rate
                if due > sent:
                    await asyncio.sleep(due - sent)
                sent = due
            writer.write(b"%sauthorization: Bearer %s\r\n%s" % (opening, next(keys).encode(), body) if load.keys else whole)
            ok = await answered_ok(reader)
            latencies.append(time.perf_counter() - sent)
            failures += not ok
        writer.close()

    began = time.perf_counter()
    await asyncio.gather(*(connection() for _ in range(load.connections)))
    return Result(time.perf_counter() - began, sorted(latencies), failures)


async def answered_ok(reader: asyncio.StreamReader) -> bool:
    """Read one answer whole; whether it is 200."""
    head = await reader.readuntil(b"\r\n\r\n")
    lowered = head.lower()
    if b"transfer-encoding: chunked" in lowered:
        while True:
            size = int(await reader.readline(), 16)
            await reader.readexactly(size + 2)
            if size == 0:
                break
    else:
        start = lowered.index(b"content-length:") + 15
        await reader.readexactly(int(lowered[start : lowered.index(b"\r\n", start)]))
    return head.startswith(b"HTTP/1.1 200")
