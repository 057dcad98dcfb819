# SPDX-License-Identifier: Apache-2.0
"""
Send one request to a receiver that we do not trust, and say what became of it.

No redirects and no proxies: the library underneath knows neither. A name is resolved here, every
address it has is judged, and the connection goes to the judged address itself; TLS still checks the
name. Time and the answer's size are bounded; the answer's content never leaves this module's caller.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

import httpcore
import httpx

from chassis.errors import Invalid
from metering.core.outgoing import Outgoing, is_duplicate
from metering.core.retry import DELAY_MAX, Outcome
from metering.core.targets import may_connect, target

#: From resolving the name to the last byte of the answer.
TOTAL_SECONDS: Final = 15.0
#: More of an answer is not read.
ANSWER_BYTES_MAX: Final = 64 * 1024
_KEEPALIVE_SECONDS: Final = 30.0
_USER_AGENT: Final = "Peaje-Webhooks/1"


class AddressRefused(httpcore.ConnectError):
    """A name that leads to where events never go."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What became of a request."""

    outcome: Outcome
    status: int | None = None
    asked_to_wait: timedelta = timedelta(0)


class Sender:
    """Connections to receivers, of as many as there are: one that is slow holds nobody else up."""

    def __init__(
        self, *, loopback_allowed: bool, ssl_context: ssl.SSLContext | None = None, total_seconds: float = TOTAL_SECONDS
    ) -> None:
        self._loopback_allowed = loopback_allowed
        self._total_seconds = total_seconds
        context = ssl_context or httpx.create_ssl_context()
        self._pools = {
            scheme: httpcore.AsyncConnectionPool(
                ssl_context=context, max_connections=None, keepalive_expiry=_KEEPALIVE_SECONDS,
                network_backend=_Judged(scheme, loopback_allowed=loopback_allowed),
            )
            for scheme in ("https", "http")
        }

    async def send(self, url: str, format_: str, request: Outgoing) -> Answer:
        """Post *request* to *url*; every failure is an answer."""
        try:
            # Judged again: the setting may have changed since it was written down.
            to = target(url, loopback_allowed=self._loopback_allowed)
            async with asyncio.timeout(self._total_seconds):
                return await self._post(self._pools[to.scheme], url, format_, request)
        except (Invalid, AddressRefused):
            return Answer(outcome=Outcome.ADDRESS_REFUSED)
        except (TimeoutError, httpcore.TimeoutException):
            return Answer(outcome=Outcome.TIMEOUT)
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.UnsupportedProtocol, ssl.SSLError, OSError):
            return Answer(outcome=Outcome.UNREACHABLE)

    async def close(self) -> None:
        """Close all connections."""
        for pool in self._pools.values():
            await pool.aclose()

    async def _post(self, pool: httpcore.AsyncConnectionPool, url: str, format_: str, request: Outgoing) -> Answer:
        headers = request.headers | {"user-agent": _USER_AGENT, "content-length": str(len(request.body))}
        async with pool.stream("POST", url, headers=list(headers.items()), content=request.body) as response:
            body = await _beginning(response)
            status = response.status
            if 200 <= status < 300:
                return Answer(outcome=Outcome.DELIVERED, status=status)
            if is_duplicate(format_, status, body):
                return Answer(outcome=Outcome.DUPLICATE, status=status)
            if status == 410:
                return Answer(outcome=Outcome.GONE, status=status)
            outcome = Outcome.REDIRECTED if 300 <= status < 400 else Outcome.REFUSED
            return Answer(outcome=outcome, status=status, asked_to_wait=_retry_after(response.headers))


class _Judged(httpcore.AnyIOBackend):
    """Connects to addresses that `may_connect` lets through, by the address and not by the name."""

    def __init__(self, scheme: str, *, loopback_allowed: bool) -> None:
        self._scheme = scheme
        self._loopback_allowed = loopback_allowed

    async def connect_tcp(
        self, host: str, port: int, timeout: float | None = None, local_address: str | None = None,  # noqa: ASYNC109 - the library's own signature
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as exc:
            raise httpcore.ConnectError("the name does not resolve") from exc
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        # One bad address among good ones is an attempt to get through by chance.
        if not addresses or not all(self._may_connect(it) for it in addresses):
            raise AddressRefused("the name leads to an address that is not public")
        failure: Exception = httpcore.ConnectError("no address")
        for address in addresses:
            try:
                return await super().connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as exc:
                failure = exc
        raise failure

    async def connect_unix_socket(
        self, path: str, timeout: float | None = None, socket_options: Iterable[Any] | None = None,  # noqa: ASYNC109, ARG002
    ) -> httpcore.AsyncNetworkStream:
        raise AddressRefused("events are not sent to sockets of this machine")

    def _may_connect(self, text: str) -> bool:
        try:
            address = ipaddress.ip_address(text)
        except ValueError:
            return False
        return may_connect(address, scheme=self._scheme, loopback_allowed=self._loopback_allowed)


async def _beginning(response: httpcore.Response) -> bytes:
    read = b""
    async for chunk in response.aiter_stream():
        read += chunk
        if len(read) > ANSWER_BYTES_MAX:
            break
    return read[:ANSWER_BYTES_MAX]


def _retry_after(headers: Iterable[tuple[bytes, bytes]]) -> timedelta:
    """Seconds only; a date would need a clock that both sides agree on."""
    for name, value in headers:
        if name.lower() == b"retry-after" and value.isdigit() and len(value) <= 9:
            return min(timedelta(seconds=int(value)), DELAY_MAX)
    return timedelta(0)
