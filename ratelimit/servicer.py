# SPDX-License-Identifier: Apache-2.0
"""
Answer Envoy's rate limit filter: admit before the request, settle after it.

What Envoy does with the answers: OK lets the request on, adds our headers to its response and
puts our metadata under envoy.filters.http.ratelimit; OVER_LIMIT ends it with 429 and our body;
a failed call or 500 ms of silence becomes 503 (failure_mode_deny in envoy.yaml). A settle is
sent when the stream is done and its answer is ignored.
"""

from __future__ import annotations

import time
from enum import Enum

import grpc
import structlog

from chassis import contract
from chassis.errors import Invalid, Unavailable
from chassis.refusals import render
from chassis.wire import ratelimit_pb2 as wire
from ratelimit.adapters.counters import Breaker, LocalCounters, Outcome, StoredCounters
from ratelimit.adapters.limits_source import LimitsSource
from ratelimit.core import answer
from ratelimit.core.limits import Ask, Counter, counters, reservation_name, tokens_to_reserve

log = structlog.get_logger()

METHOD = "/envoy.service.ratelimit.v3.RateLimitService/ShouldRateLimit"

#: Beyond any body limit or context; a descriptor with more did not come from our Envoy.
_NUMBER_MAX = 1 << 40


class WhenUnavailable(Enum):
    """What to do while the counter store is away."""

    LOCAL = "local"
    ALLOW = "allow"
    DENY = "deny"


class Servicer:
    """Wires limits to counters; one per process."""

    def __init__(
        self,
        limits: LimitsSource,
        stored: StoredCounters,
        local: LocalCounters,
        *,
        when_unavailable: WhenUnavailable,
    ) -> None:
        self._limits = limits
        self._stored = stored
        self._local = local
        self._when_unavailable = when_unavailable
        self._breaker = Breaker()

    def should_rate_limit(
        self, request: wire.RateLimitRequest, context: grpc.ServicerContext
    ) -> wire.RateLimitResponse:
        """Admit or settle, by the descriptor's phase; `Invalid` for what our Envoy never sends."""
        del context
        if request.domain != contract.RLS_DOMAIN or not request.descriptors:
            raise Invalid("unknown domain or no descriptor")
        descriptor = request.descriptors[0]
        entries = {entry.key: entry.value for entry in descriptor.entries}
        match entries.get(contract.DESC_PHASE):
            case contract.PHASE_ADMIT:
                ask = _ask(entries)
                if ask is None:
                    log.error("descriptor_refused", keys=sorted(entries))
                    raise Invalid("incomplete descriptor")
                return self._admit(ask)
            case contract.PHASE_SETTLE:
                self._settle(entries, descriptor.hits_addend.value)
                return wire.RateLimitResponse(overall_code=wire.RateLimitResponse.OK)
        raise Invalid("unknown phase")

    def _admit(self, ask: Ask) -> wire.RateLimitResponse:
        tokens = tokens_to_reserve(ask)
        wanted = counters(self._limits.current.match(ask), ask, tokens=tokens)
        if not wanted:
            response = _admitted({}, reserved=0)
            response.dynamic_metadata.fields[contract.ADM_UNLIMITED].bool_value = True
            return response
        outcome = self._take(ask, wanted)
        if outcome is None:
            return _admitted({}, reserved=0)
        if outcome.admitted:
            return _admitted(answer.headers(outcome.readings), reserved=tokens)
        refusal, headers = answer.refusal(outcome.readings)
        log.info("limited", request_id=ask.request_id, tenant=ask.tenant_id, key_id=ask.key_id, unit=refusal.type)
        body = render(refusal, dialect=ask.dialect, request_id=ask.request_id)
        return _refused(headers, body)

    def _take(self, ask: Ask, wanted: list[Counter]) -> Outcome | None:
        """None means: let it pass uncounted, as the policy says."""
        if self._breaker.allows():
            try:
                outcome = self._stored.take(
                    reservation_name(tenant_id=ask.tenant_id, request_id=ask.request_id), wanted
                )
            except Unavailable:
                self._breaker.failed()
            else:
                self._breaker.succeeded()
                return outcome
        match self._when_unavailable:
            case WhenUnavailable.ALLOW:
                return None
            case WhenUnavailable.LOCAL:
                return self._local.take(wanted, time.monotonic_ns() // 1000)
        raise Unavailable("The counter store did not answer, and the policy is to deny.")

    def _settle(self, entries: dict[str, str], actual: int) -> None:
        tenant_id = entries.get(contract.DESC_TENANT, contract.DESC_ABSENT)
        request_id = entries.get(contract.DESC_REQUEST_ID)
        if tenant_id == contract.DESC_ABSENT or not request_id or not self._breaker.allows():
            return
        reservation = reservation_name(tenant_id=tenant_id, request_id=request_id)
        try:
            self._stored.settle(reservation, min(actual, _NUMBER_MAX))
        except Unavailable:
            # What was reserved stays charged and drains with the minute: never a lost count.
            self._breaker.failed()
            log.warning("settle_lost", request_id=request_id)


def _ask(entries: dict[str, str]) -> Ask | None:
    try:
        values = {key: entries[key] for key in contract.ADMIT_KEYS}
        numbers = [
            int(values[key])
            for key in (contract.DESC_PROMPT_BYTES, contract.DESC_OUTPUT_TOKENS_MAX, contract.DESC_CHOICES)
        ]
    except (KeyError, ValueError):
        return None
    identity = (values[contract.DESC_TENANT], values[contract.DESC_KEY], values[contract.DESC_REQUEST_ID])
    if contract.DESC_ABSENT in identity or "" in identity:
        return None
    if any(not 0 <= number <= _NUMBER_MAX for number in numbers):
        return None
    return Ask(
        request_id=values[contract.DESC_REQUEST_ID],
        tenant_id=values[contract.DESC_TENANT],
        key_id=values[contract.DESC_KEY],
        model=values[contract.DESC_MODEL],
        dialect=values[contract.DESC_DIALECT],
        prompt_bytes=numbers[0],
        output_tokens_max=numbers[1],
        choices=numbers[2],
    )


def _admitted(headers: dict[str, str], *, reserved: int) -> wire.RateLimitResponse:
    response = wire.RateLimitResponse(overall_code=wire.RateLimitResponse.OK)
    response.statuses.add(code=wire.RateLimitResponse.OK)
    _add_headers(response, headers)
    response.dynamic_metadata.fields[contract.ADM_ADMITTED].bool_value = True
    response.dynamic_metadata.fields[contract.ADM_RESERVED_TOKENS].number_value = reserved
    return response


def _refused(headers: dict[str, str], body: str) -> wire.RateLimitResponse:
    response = wire.RateLimitResponse(overall_code=wire.RateLimitResponse.OVER_LIMIT)
    response.statuses.add(code=wire.RateLimitResponse.OVER_LIMIT)
    _add_headers(response, headers | {"content-type": "application/json"})
    response.raw_body = body.encode()
    return response


def _add_headers(response: wire.RateLimitResponse, headers: dict[str, str]) -> None:
    for key, value in headers.items():
        response.response_headers_to_add.add(key=key, value=value)
