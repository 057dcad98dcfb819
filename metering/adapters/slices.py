# SPDX-License-Identifier: Apache-2.0
"""Have ratelimit hold the next slice of a stream: by the contract's descriptor, over its socket or by TCP."""

from __future__ import annotations

import asyncio
from typing import Final

import grpc
import structlog

from chassis import contract
from chassis.certificates import Certificates, WatchedCertificates, channel_credentials
from chassis.errors import Unavailable
from chassis.wire import ratelimit_pb2 as wire

log = structlog.get_logger()

METHOD: Final = "/envoy.service.ratelimit.v3.RateLimitService/ShouldRateLimit"
#: As long as Envoy waits for a decision.
_TIMEOUT_SECONDS: Final = 0.5
#: A restart of ratelimit must not end the streams under way: they wait, and are asked about again.
PATIENCE_SECONDS: Final = 10.0
_PAUSE_SECONDS: Final = 0.25
#: A name that stands for several processes is asked all of them in turn.
_OPTIONS: Final = (("grpc.lb_policy_name", "round_robin"),)


class Slices:
    """The renewals of all streams, over one connection (with a name that stands for several: one each)."""

    def __init__(
        self, target: str, *, certificates: WatchedCertificates | None = None, patience_seconds: float = PATIENCE_SECONDS
    ) -> None:
        self._target = target
        self._certificates = certificates
        self._shown: Certificates | None = None
        self._patience_seconds = patience_seconds
        self._call: grpc.aio.UnaryUnaryMultiCallable[wire.RateLimitRequest, wire.RateLimitResponse] | None = None

    async def renew(self, *, tenant_id: str, request_id: str, input_tokens: int, output_tokens: int) -> int:
        """
        Output tokens held for *request_id* after asking for *output_tokens* and a slice more.

        *input_tokens* are 0 while the engine has not said. Raises `Unavailable` when nobody has answered for long.
        """
        entries = {
            contract.DESC_PHASE: contract.PHASE_RENEW, contract.DESC_REQUEST_ID: request_id, contract.DESC_TENANT: tenant_id,
            contract.DESC_INPUT: str(input_tokens), contract.DESC_OUTPUT: str(output_tokens),
        }  # fmt: skip
        request = wire.RateLimitRequest(domain=contract.RLS_DOMAIN)
        descriptor = request.descriptors.add()
        for key, value in entries.items():
            descriptor.entries.add(key=key, value=value)
        try:
            async with asyncio.timeout(self._patience_seconds):
                return await self._ask(request)
        except TimeoutError as exc:
            log.error("slice_unanswered", request_id=request_id)
            raise Unavailable("ratelimit did not answer.") from exc

    async def _ask(self, request: wire.RateLimitRequest) -> int:
        while True:
            try:
                response = await self._method()(request, timeout=_TIMEOUT_SECONDS, wait_for_ready=True)
            except grpc.aio.AioRpcError:
                await asyncio.sleep(_PAUSE_SECONDS)
            else:
                return int(response.dynamic_metadata.fields[contract.ADM_SLICE_TOKENS].number_value)

    def _method(self) -> grpc.aio.UnaryUnaryMultiCallable[wire.RateLimitRequest, wire.RateLimitResponse]:
        """The call on a channel with the newest certificates; an old channel ends when its last call does."""
        newest = self._certificates.current() if self._certificates is not None else None
        if self._call is None or newest is not self._shown:
            # Here and not before: a channel belongs to the running loop.
            channel = (
                grpc.aio.insecure_channel(self._target) if newest is None
                else grpc.aio.secure_channel(self._target, channel_credentials(newest), options=_OPTIONS)
            )
            self._shown = newest
            self._call = channel.unary_unary(
                METHOD,
                request_serializer=wire.RateLimitRequest.SerializeToString,
                response_deserializer=wire.RateLimitResponse.FromString,
            )
        return self._call
