# SPDX-License-Identifier: Apache-2.0
"""
Answer Envoy's rate limit filter (admit before the request, settle after it) and metering (renew in between).

What Envoy does with the answers: OK lets the request on, adds our headers to its response and
puts our metadata under envoy.filters.http.ratelimit; OVER_LIMIT ends it with our status and our
body; a failed call or 500 ms of silence becomes 503 (failure_mode_deny in envoy.yaml). A settle
is sent when the stream is done and its answer is ignored. A renewal that fails is asked for again, and
ends its stream if it goes on failing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import datetime

import grpc
import structlog

from chassis import contract
from chassis.errors import Invalid, Unavailable
from chassis.refusals import render
from chassis.telemetry import traces
from chassis.wire import ratelimit_pb2 as wire
from ratelimit.adapters import metrics
from ratelimit.adapters.counters import StoredCounters, StoreRefused, Unseeded
from ratelimit.adapters.doubts import Doubts
from ratelimit.adapters.limits_source import LimitsSource
from ratelimit.adapters.loans import Loans
from ratelimit.adapters.local import Breaker, LocalCounters
from ratelimit.core import answer
from ratelimit.core.decide import Outcome, Renewal, Verdict
from ratelimit.core.demand import Demand, Kind, demand
from ratelimit.core.estimate import Estimates
from ratelimit.core.lease import Lease, Wish, offer, wish
from ratelimit.core.limits import Ask, Unit
from ratelimit.core.usage import Report

log = structlog.get_logger()

METHOD = "/envoy.service.ratelimit.v3.RateLimitService/ShouldRateLimit"

#: Beyond any body limit or context; a descriptor with more did not come from our Envoy.
_NUMBER_MAX = 1_000_000_000
#: A life's name is ours and short.
_EPOCH_LENGTH_MAX = 100
#: An Envoy whose configuration is older than these says nothing of them: no lease, and no stream that could be held in slices.
_REQUIRED = tuple(key for key in contract.ADMIT_KEYS if key not in (contract.DESC_LEASE, contract.DESC_STREAM, contract.DESC_QUANTITY))
#: What Envoy answers to OVER_LIMIT by itself.
_RATE_LIMITED = 429


class Servicer:
    """Wires limits to counters; one per process."""

    def __init__(
        self,
        limits: LimitsSource,
        stored: StoredCounters,
        local: LocalCounters,
        breaker: Breaker,
        estimates: Estimates,
        *,
        clock: Callable[[], datetime],
        output_cap: int,
        slice_tokens: int,
        draft_headers: bool,
        doubts: Doubts,
        loans: Loans,
    ) -> None:
        self._limits = limits
        self._stored = stored
        self._local = local
        self._breaker = breaker
        self._estimates = estimates
        self._clock = clock
        self._output_cap = output_cap
        self._slice_tokens = slice_tokens
        self._draft_headers = draft_headers
        self._doubts = doubts
        self._loans = loans

    def should_rate_limit(
        self, request: wire.RateLimitRequest, context: grpc.ServicerContext
    ) -> wire.RateLimitResponse:
        """Admit, renew or settle, by the descriptor's phase; `Invalid` for what nobody of ours sends."""
        if request.domain != contract.RLS_DOMAIN or not request.descriptors:
            raise Invalid("unknown domain or no descriptor")
        entries = {entry.key: entry.value for entry in request.descriptors[0].entries}
        match entries.get(contract.DESC_PHASE):
            case contract.PHASE_ADMIT:
                ask = _ask(entries, dict(context.invocation_metadata()))
                if ask is None:
                    log.error("descriptor_refused", keys=sorted(entries))
                    raise Invalid("incomplete descriptor")
                with metrics.DECISION_SECONDS.time():
                    return self._admit(ask, wish(entries.get(contract.DESC_LEASE, contract.DESC_ABSENT)))
            case contract.PHASE_RENEW:
                return self._renew(entries)
            case contract.PHASE_SETTLE:
                self._settle(entries)
                return wire.RateLimitResponse(overall_code=wire.RateLimitResponse.OK)
        raise Invalid("unknown phase")

    def _admit(self, ask: Ask, wished: Wish) -> wire.RateLimitResponse:
        now = self._clock()
        asked = demand(
            ask,
            self._limits.current.match(ask),
            estimates=self._estimates,
            price=self._limits.price(model=ask.model, tenant_id=ask.tenant_id),
            output_cap=self._output_cap,
            slice_tokens=self._slice_tokens,
            now=now,
            share=self._limits.share(model=ask.model, tenant_id=ask.tenant_id),
        )
        if not asked.counters:
            response = _admitted({}, asked, None)
            response.dynamic_metadata.fields[contract.ADM_UNLIMITED].bool_value = True
            metrics.UNLIMITED.inc()
            return response
        # The draft's headers tell of every limit: only an answer of this service has them.
        lease = None if self._draft_headers else offer(asked, wished, now_us=int(now.timestamp() * 1_000_000))
        try:
            outcome = self._take(asked, lease, wished.back)
        except Unavailable:
            metrics.UNAVAILABLE.inc()
            raise
        metrics.decided(asked, outcome)
        if outcome.over:
            over = sorted({c.limit_id for c in asked.counters if c.name in outcome.over})
            log.info("limit_over", request_id=ask.request_id, tenant=ask.tenant_id, limits=over)
        headers = answer.draft_headers(outcome.readings) if self._draft_headers else {}
        if outcome.admitted:
            response = _admitted(answer.headers(outcome.readings) | headers, asked, outcome)
            if lease is not None and outcome.leased:
                _lend(response, lease.of(outcome.lent), asked, choices=max(ask.choices, 1))
                if lease.each:
                    self._loans.given(ask.tenant_id)
            return response
        metrics.refused(answer.longest_wait(outcome.readings))
        self._doubts.refused(tenant_id=ask.tenant_id, request_id=ask.request_id, readings=outcome.readings)
        refusal, told = answer.refusal(outcome.readings)
        traces.refused(refusal.code)
        log.info(
            "limited", request_id=ask.request_id, tenant=ask.tenant_id, key_id=ask.key_id, code=refusal.code, unit=refusal.type
        )
        body = render(refusal, dialect=ask.dialect, request_id=ask.request_id)
        return _refused(refusal.status, told | headers, body)

    def _take(self, asked: Demand, lease: Lease | None, back: Lease | None) -> Outcome:
        if not self._breaker.is_open:
            try:
                with metrics.STORE_TAKE.time(), traces.asking("redis", "take"):
                    outcome = self._take_stored(asked, lease, back)
            except StoreRefused as exc:
                metrics.STORE_REFUSED.inc()
                log.error("store_refused", tenant=asked.tenant_id, reason=exc.message)
            except Unavailable:
                metrics.STORE_FAILED.inc()
                self._breaker.failed()
            else:
                self._breaker.succeeded()
                self._local.note(outcome)
                return outcome
        metrics.without_store(asked.counters)
        return self._local.take(asked, now_us=_now_us(), away_seconds=self._breaker.away_seconds)

    def _take_stored(self, asked: Demand, lease: Lease | None, back: Lease | None) -> Outcome:
        try:
            return self._stored.take(asked, {}, lease=lease, back=back)
        except Unseeded:
            # A new period, or a store that came back empty: the ledger says what was used.
            return self._stored.take(asked, self._seeds(asked))

    def _seeds(self, asked: Demand) -> Mapping[str, int]:
        try:
            return {c.name: self._limits.spent(c) for c in asked.counters if c.kind is Kind.QUOTA}
        except Unavailable as exc:
            # Postgres is away, not the store: every other decision goes on as before.
            raise StoreRefused("What was used of a quota is not known.") from exc

    def _renew(self, entries: Mapping[str, str]) -> wire.RateLimitResponse:
        tenant_id, request_id = entries.get(contract.DESC_TENANT, ""), entries.get(contract.DESC_REQUEST_ID, "")
        if not tenant_id or not request_id:
            raise Invalid("incomplete descriptor")
        renewal = Renewal(
            # An engine that has said nothing of the prompt yet has not said that there is none.
            input=_number(entries.get(contract.DESC_INPUT)) or None,
            output=_number(entries.get(contract.DESC_OUTPUT)),
            more=self._slice_tokens,
        )
        held = self._local.renew(request_id, renewal, _now_us())
        if not held:
            if self._breaker.is_open:
                raise Unavailable("The counter store did not answer.")
            try:
                held = self._stored.renew(tenant_id=tenant_id, request_id=request_id, renewal=renewal)
            except Unavailable as exc:
                if not isinstance(exc, StoreRefused):
                    self._breaker.failed()
                raise
        if held < renewal.output:
            log.info("slice_refused", request_id=request_id, tenant=tenant_id, held=held)
        response = wire.RateLimitResponse(overall_code=wire.RateLimitResponse.OK)
        response.dynamic_metadata.fields[contract.ADM_SLICE_TOKENS].number_value = held
        return response

    def _settle(self, entries: Mapping[str, str]) -> None:
        tenant_id = entries.get(contract.DESC_TENANT, contract.DESC_ABSENT)
        request_id = entries.get(contract.DESC_REQUEST_ID)
        if tenant_id == contract.DESC_ABSENT or not request_id:
            return
        report = _report(entries)
        if report.input is not None:
            self._estimates.learn(
                tenant_id=tenant_id, model=entries.get(contract.DESC_MODEL, ""),
                prompt_bytes=_number(entries.get(contract.DESC_PROMPT_BYTES)),
                input_tokens=report.input, output_tokens=report.output,
            )  # fmt: skip
        if entries.get(contract.DESC_HOLD) == contract.HOLD_NOTHING:
            return
        if self._local.settle(request_id, report, _now_us()):
            return
        if self._breaker.is_open:
            metrics.SETTLES_LOST.inc()
            return
        self._settle_stored(tenant_id, request_id, report, model=entries.get(contract.DESC_MODEL, ""))

    def _settle_stored(self, tenant_id: str, request_id: str, report: Report, *, model: str) -> None:
        is_shared = self._limits.share(model=model, tenant_id=tenant_id) is not None
        try:
            with metrics.STORE_SETTLE.time(), traces.asking("redis", "settle"):
                settled = self._stored.settle(
                    tenant_id=tenant_id, request_id=request_id, report=report, model=model if is_shared else ""
                )
        except StoreRefused as exc:
            metrics.STORE_REFUSED.inc()
            log.error("store_refused", tenant=tenant_id, reason=exc.message)
        except Unavailable:
            # What was reserved stays charged until its lease ends: never a lost count.
            metrics.STORE_FAILED.inc()
            metrics.SETTLES_LOST.inc()
            self._breaker.failed()
            log.warning("settle_lost", request_id=request_id)
        else:
            if settled is not None:
                metrics.settled(settled.excess_tokens)


def _ask(entries: Mapping[str, str], call: Mapping[str, str | bytes]) -> Ask | None:
    try:
        values = {key: entries[key] for key in _REQUIRED}
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
        project_id=values[contract.DESC_PROJECT],
        key_id=values[contract.DESC_KEY],
        model=values[contract.DESC_MODEL],
        dialect=values[contract.DESC_DIALECT],
        prompt_bytes=numbers[0],
        output_tokens_max=numbers[1],
        choices=numbers[2],
        quantity=_number(entries.get(contract.DESC_QUANTITY)),
        streams=entries.get(contract.DESC_STREAM) == "yes",
        epoch=_epoch(call),
    )


def _epoch(call: Mapping[str, str | bytes]) -> str:
    said = str(call.get(contract.EPOCH_CALL_METADATA, contract.DESC_ABSENT))
    # An Envoy whose life nobody named sends what stands for nothing in its formats.
    return "" if said == contract.DESC_ABSENT else said[:_EPOCH_LENGTH_MAX]


def _report(entries: Mapping[str, str]) -> Report:
    if entries.get(contract.DESC_SEEN) == "none" and _number(entries.get(contract.DESC_FRAMES)) > 0:
        # The engine said nothing: each frame of the answer had at least one token.
        return Report(input=None, output=_number(entries.get(contract.DESC_FRAMES)))
    return Report(
        input=_number(entries.get(contract.DESC_INPUT)),
        output=_number(entries.get(contract.DESC_OUTPUT)),
        cached=_number(entries.get(contract.DESC_CACHED)),
        reasoning=_number(entries.get(contract.DESC_REASONING)),
        quantity=_number(entries.get(contract.DESC_QUANTITY)),
    )


def _number(text: str | None) -> int:
    """A count from a descriptor; what is no count (an engine that said -1) is none, what is absurd is bounded."""
    try:
        return max(0, min(int(float(text or "0")), _NUMBER_MAX))
    except (ValueError, OverflowError):
        return 0


def _now_us() -> int:
    # While the store is away, this process's own steady clock; its values never meet the store's.
    return time.monotonic_ns() // 1000


def _admitted(headers: Mapping[str, str], asked: Demand, outcome: Outcome | None) -> wire.RateLimitResponse:
    response = wire.RateLimitResponse(overall_code=wire.RateLimitResponse.OK)
    response.statuses.add(code=wire.RateLimitResponse.OK)
    _add_headers(response, headers)
    fields = response.dynamic_metadata.fields
    fields[contract.ADM_ADMITTED].bool_value = True
    fields[contract.ADM_RESERVED_TOKENS].number_value = 0 if outcome is None else asked.lean.input + outcome.output
    # Descriptors carry strings only, and the settle's descriptor carries this back.
    fields[contract.ADM_HOLD].string_value = contract.HOLD_SOMETHING if asked.settles else contract.HOLD_NOTHING
    if outcome is None:
        return response
    output = outcome.output
    if asked.is_sliced and outcome.verdict is Verdict.LEAN:
        fields[contract.ADM_SLICE].string_value = asked.request_id
        fields[contract.ADM_SLICE_TOKENS].number_value = output
        # The rest is held as it streams: the model server may go on to the end of what was asked for.
        output = asked.full.output
    cap = asked.cap(output)
    if cap is not None:
        fields[contract.ADM_OUTPUT_CAP].number_value = cap
    return response


def _lend(response: wire.RateLimitResponse, lease: Lease, asked: Demand, *, choices: int) -> None:
    fields = response.dynamic_metadata.fields
    fields[contract.ADM_LEASE_REQUESTS].number_value = lease.requests
    if any(counter.kind is Kind.BUCKET and counter.unit is Unit.TOKENS for counter in asked.counters):
        fields[contract.ADM_LEASE_TOKENS].number_value = lease.tokens
    if lease.each and asked.bounds is not None:
        fields[contract.ADM_LEASE_PROMPT_BYTES].number_value = asked.bounds.prompt_bytes
        if asked.bounds.cap is not None:
            fields[contract.ADM_LEASE_OUTPUT_MAX].number_value = asked.bounds.usage.output
            fields[contract.ADM_LEASE_CAP].number_value = asked.bounds.cap
    fields[contract.ADM_LEASE_INPUT].number_value = asked.lean.input
    fields[contract.ADM_LEASE_OUTPUT].number_value = asked.lean.output // choices


def _refused(status: int, headers: Mapping[str, str], body: str) -> wire.RateLimitResponse:
    response = wire.RateLimitResponse(overall_code=wire.RateLimitResponse.OVER_LIMIT)
    response.statuses.add(code=wire.RateLimitResponse.OVER_LIMIT)
    _add_headers(response, {**headers, "content-type": "application/json"})
    response.raw_body = body.encode()
    if status != _RATE_LIMITED:
        response.dynamic_metadata.fields[contract.ADM_REFUSED_STATUS].string_value = str(status)
    return response


def _add_headers(response: wire.RateLimitResponse, headers: Mapping[str, str]) -> None:
    for key, value in headers.items():
        response.response_headers_to_add.add(key=key, value=value)
