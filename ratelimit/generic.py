# SPDX-License-Identifier: Apache-2.0
"""
Answer for the domains that operators bring: what envoyproxy/ratelimit answers on the same files.

What Envoy does with the answers: OK lets the request on, OVER_LIMIT is its 429; statuses are for
its own headers and statistics. A failed call is decided by the filter's own `failure_mode_deny`,
which is `false` unless the route's owner wrote it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, Protocol

import grpc

from chassis.contract import RLS_DOMAIN
from chassis.errors import Invalid, Unavailable
from chassis.serving import Unary
from chassis.wire import ratelimit_descriptor_pb2, ratelimit_pb2
from ratelimit.adapters import rule_metrics as metrics
from ratelimit.adapters.local import Breaker
from ratelimit.adapters.rule_counters import Count
from ratelimit.core.rls.rules import Match, Rule, Rules, Unit, replaced
from ratelimit.core.rls.verdict import (
    HITS_MAX,
    UNBOUND,
    Reading,
    Stat,
    Verdict,
    closest,
    is_refused,
    judge,
    measure,
    passed_metadata,
    unlimited,
)

#: Of one request. Envoy's routes have a handful; each costs a look-up and a place in the store's script.
DESCRIPTORS_MAX: Final = 128
#: Of one descriptor; deeper than any file can be.
ENTRIES_MAX: Final = 64

_Request = ratelimit_pb2.RateLimitRequest
_Descriptor = ratelimit_descriptor_pb2.RateLimitDescriptor
_Response = ratelimit_pb2.RateLimitResponse


class WhenUnavailable(Enum):
    """What a request is told that cannot be counted."""

    #: The call fails, and Envoy's own `failure_mode_deny` decides: what envoyproxy/ratelimit does.
    ERROR = "error"
    ALLOW = "allow"
    DENY = "deny"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What envoyproxy/ratelimit has as environment variables; the same for all domains."""

    when_unavailable: WhenUnavailable = WhenUnavailable.ERROR
    #: Nobody is refused; what would have been is measured.
    shadow_mode: bool = False
    #: Also tell callers their limit, what is left and the seconds until it is whole.
    headers: bool = False
    #: Also tell Envoy's later filters what was asked, and the metadata of the rules that passed.
    dynamic_metadata: bool = False


class Counters(Protocol):
    """Where hits are counted; raises `Unavailable`."""

    def take(self, counts: Sequence[Count]) -> tuple[int, list[Reading]]:
        """Add the hits; the moment in seconds, and a reading for each in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """One descriptor of a request, and the rule that binds it."""

    match: Match | None
    hits: int


class GenericServicer:
    """Wires rules to counters; one per process."""

    def __init__(self, rules: Callable[[], Rules], counters: Counters, breaker: Breaker, options: Options) -> None:
        self._rules = rules
        self._counters = counters
        self._breaker = breaker
        self._options = options
        self._metrics = metrics.RuleMetrics()

    def should_rate_limit(self, request: _Request, context: grpc.ServicerContext) -> _Response:
        """Count all descriptors and answer for each, in order; `Invalid` for what no Envoy sends."""
        del context
        # One set of rules for the whole request, whatever is swapped meanwhile.
        rules = self._rules()
        _check(request, rules)
        if request.domain not in rules:
            metrics.RULE_DOMAIN_UNKNOWN.inc()
        own = [_matched(rules, request.domain, descriptor) for descriptor in request.descriptors]
        hits = [_hits(request, descriptor) for descriptor in request.descriptors]
        asked = [_Asked(match=match, hits=count) for match, count in zip(replaced(own), hits, strict=True)]
        return self._answer(request, self._take(request.domain, asked))

    def _take(self, domain: str, asked: Sequence[_Asked]) -> list[Verdict]:
        verdicts = [UNBOUND if one.match is None else unlimited() for one in asked]
        counted: list[tuple[int, Match, Count]] = []
        for index, (match, hits) in enumerate((one.match, one.hits) for one in asked):
            if match is None:
                continue
            if match.rule.unit is not None:
                counted.append((index, match, (match.counter, match.rule.unit, hits)))
            elif hits > 0:
                self._metrics.add(domain, match, {Stat.TOTAL_HITS: hits, Stat.WITHIN_LIMIT: hits})
        if not counted:
            return verdicts
        try:
            now, readings = self._stored([count for _, _, count in counted])
        except Unavailable:
            metrics.RULE_STORE_ERRORS.labels(self._options.when_unavailable.value).inc()
            for index, match, _ in counted:
                verdicts[index] = self._without_store(match.rule)
            return verdicts
        for (index, match, _), reading in zip(counted, readings, strict=True):
            verdicts[index] = judge(match.rule, reading, now)
            self._metrics.add(domain, match, measure(match.rule, reading))
        return verdicts

    def _stored(self, counts: Sequence[Count]) -> tuple[int, list[Reading]]:
        if self._breaker.is_open:
            raise Unavailable("The counter store is away.")
        try:
            taken = self._counters.take(counts)
        except Unavailable:
            self._breaker.failed()
            raise
        self._breaker.succeeded()
        return taken

    def _without_store(self, rule: Rule) -> Verdict:
        match self._options.when_unavailable:
            case WhenUnavailable.ERROR:
                raise Unavailable("The counter store did not answer.")
            case WhenUnavailable.ALLOW:
                return UNBOUND
            case WhenUnavailable.DENY:
                return Verdict(over=not rule.shadow, rule=rule)

    def _answer(self, request: _Request, verdicts: Sequence[Verdict]) -> _Response:
        refused = is_refused(verdicts)
        if refused and self._options.shadow_mode:
            metrics.RULE_SHADOWED.inc()
            refused = False
        response = _Response(overall_code=_Response.OVER_LIMIT if refused else _Response.OK)
        for verdict in verdicts:
            _add_status(response, verdict)
        if self._options.headers and (told := closest(verdicts)):
            for name, value in _headers(told).items():
                response.response_headers_to_add.add(key=name, value=value)
        if self._options.dynamic_metadata:
            response.dynamic_metadata.update(_dynamic_metadata(request, passed_metadata(verdicts)))
        return response


def by_domain(own: Unary, generic: Unary) -> Unary:
    """One method for both: Peaje's own domain is admission and settle, every other is an operator's."""

    def should_rate_limit(request: _Request, context: grpc.ServicerContext) -> Any:
        return (own if request.domain == RLS_DOMAIN else generic)(request, context)

    return should_rate_limit


def _check(request: _Request, rules: Rules) -> None:
    if not rules.domains:
        raise Invalid("no generic rules are loaded")
    if not request.domain or not request.descriptors:
        raise Invalid("no domain or no descriptor")
    if len(request.descriptors) > DESCRIPTORS_MAX or any(len(one.entries) > ENTRIES_MAX for one in request.descriptors):
        raise Invalid("too many descriptors or entries")


def _matched(rules: Rules, domain: str, descriptor: _Descriptor) -> Match | None:
    entries = [(entry.key, entry.value) for entry in descriptor.entries]
    return rules.match(domain, entries, _own_limit(domain, descriptor))


def _own_limit(domain: str, descriptor: _Descriptor) -> Rule | None:
    if not descriptor.HasField("limit"):
        return None
    try:
        # Envoy's two enumerations of units have the same numbers.
        unit = Unit[_Response.RateLimit.Unit.Name(descriptor.limit.unit)]
    except (KeyError, ValueError) as exc:
        raise Invalid("a descriptor's own limit has no unit") from exc
    return Rule(path=f"{domain}.(own limit)", unit=unit, requests_per_unit=descriptor.limit.requests_per_unit)


def _hits(request: _Request, descriptor: _Descriptor) -> int:
    """A descriptor's own addend, where 0 only looks; else the request's, where 0 is not said and means 1."""
    if not descriptor.HasField("hits_addend"):
        hits = max(1, request.hits_addend)
    elif descriptor.hits_addend.value <= HITS_MAX:
        hits = descriptor.hits_addend.value
    else:
        raise Invalid(f"a hits addend above {HITS_MAX}")
    return -hits if descriptor.is_negative_hits else hits


def _add_status(response: _Response, verdict: Verdict) -> None:
    status = response.statuses.add(
        code=_Response.OVER_LIMIT if verdict.over else _Response.OK, limit_remaining=verdict.remaining
    )
    if verdict.rule is not None and verdict.rule.unit is not None:
        status.current_limit.requests_per_unit = verdict.rule.requests_per_unit
        status.current_limit.unit = _Response.RateLimit.Unit.Value(verdict.rule.unit.name)
        status.current_limit.name = verdict.rule.name
    if verdict.reset_seconds is not None:
        status.duration_until_reset.seconds = verdict.reset_seconds


def _headers(verdict: Verdict) -> dict[str, str]:
    assert verdict.rule is not None
    headers = {
        "ratelimit-limit": str(verdict.rule.requests_per_unit),
        "ratelimit-remaining": str(verdict.remaining),
    }
    return headers if verdict.reset_seconds is None else headers | {"ratelimit-reset": str(verdict.reset_seconds)}


def _dynamic_metadata(request: _Request, passed: Mapping[str, Any]) -> dict[str, Any]:
    told: dict[str, Any] = {"domain": request.domain, "descriptors": [_described(one) for one in request.descriptors]}
    if request.hits_addend:
        told["hitsAddend"] = request.hits_addend
    return told | ({"metadata": passed} if passed else {})


def _described(descriptor: _Descriptor) -> dict[str, Any]:
    told: dict[str, Any] = {"entries": [f"{entry.key}={entry.value}" for entry in descriptor.entries]}
    if descriptor.HasField("hits_addend"):
        told["hitsAddend"] = descriptor.hits_addend.value
    return told
