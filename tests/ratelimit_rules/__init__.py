# SPDX-License-Identifier: Apache-2.0
"""
What operators bring, and what they are told: one table of examples for every store, and a model to compare with.

Requests are written as lists of descriptors, a descriptor as `key=value` pairs joined by `, `.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import grpc
import yaml

from chassis.wire import ratelimit_pb2 as wire
from ratelimit.adapters.local import Breaker
from ratelimit.adapters.rule_counters import Count
from ratelimit.core.rls.document import combine, read
from ratelimit.core.rls.rules import LENGTHS_SECONDS, Rules
from ratelimit.core.rls.verdict import REMAINING_MAX, Reading
from ratelimit.generic import Counters, GenericServicer, Options

EXAMPLES: Final = Path(__file__).with_name("examples.yaml")
OK, OVER = wire.RateLimitResponse.OK, wire.RateLimitResponse.OVER_LIMIT


class MemoryCounters:
    """The store as it would be with one client and a clock that a test moves; *now* in seconds."""

    def __init__(self, now: int = 1_900_000_000) -> None:
        self.now = now
        self.counts: dict[tuple[str, int], int] = {}
        self.calls = 0

    def take(self, counts: Sequence[Count]) -> tuple[int, list[Reading]]:
        """Add the hits to the window that it is now."""
        self.calls += 1
        readings = []
        for name, unit, hits in counts:
            key = (name, self.now // LENGTHS_SECONDS[unit])
            before = self.counts.get(key, 0)
            self.counts[key] = max(0, before + hits)
            readings.append(Reading(hits=hits, before=before, after=self.counts[key]))
        return self.now, readings


def examples() -> list[Any]:
    """The table: each has a name, rules, and steps with what is asked and answered."""
    found: list[Any] = yaml.safe_load(EXAMPLES.read_text())
    return found


def rules_of(*documents: Any) -> Rules:
    """Rules from parsed YAML (or text), which must be without fault."""
    texts = [one if isinstance(one, str) else yaml.safe_dump(one, sort_keys=False) for one in documents]
    rules, faults = combine([read(text, file=f"{number}.yaml") for number, text in enumerate(texts)])
    assert not faults, [str(fault) for fault in faults]
    return rules


def serving(rules: Rules, counters: Counters, options: Options | None = None) -> GenericServicer:
    """A servicer on *counters* whose breaker stays as it is."""
    breaker = Breaker(clock=time.monotonic, opened=lambda: None)
    return GenericServicer(lambda: rules, counters, breaker, options or Options())


def request(domain: str, descriptors: Sequence[str], *, hits: int = 0, own_hits: int | None = None) -> wire.RateLimitRequest:
    """A request as Envoy writes it; *own_hits* (less than 0: given back) is the addend of every descriptor."""
    made = wire.RateLimitRequest(domain=domain, hits_addend=hits)
    for text in descriptors:
        descriptor = made.descriptors.add()
        for pair in text.split(", "):
            key, _, value = pair.partition("=")
            descriptor.entries.add(key=key, value=value)
        if own_hits is not None:
            descriptor.hits_addend.value = abs(own_hits)
            descriptor.is_negative_hits = own_hits < 0
    return made


def context() -> grpc.ServicerContext:
    """Nobody reads it."""
    return None


def ask(servicer: GenericServicer, made: wire.RateLimitRequest) -> wire.RateLimitResponse:
    """Through the wire's own bytes, as Envoy's question and answer are."""
    arrived = wire.RateLimitRequest.FromString(made.SerializeToString())
    answer: wire.RateLimitResponse = wire.RateLimitResponse.FromString(
        servicer.should_rate_limit(arrived, context()).SerializeToString()
    )
    return answer


def shown(status: wire.RateLimitResponse.DescriptorStatus) -> str:
    """A status as the table writes it: `ok 3 of 5 a minute`, `over 0 of 5 a minute`, `ok`, `unlimited`."""
    word = "ok" if status.code == OK else "over"
    if not status.HasField("current_limit"):
        return "unlimited" if status.limit_remaining == REMAINING_MAX else word
    limit = status.current_limit
    unit = wire.RateLimitResponse.RateLimit.Unit.Name(limit.unit).lower()
    return f"{word} {status.limit_remaining} of {limit.requests_per_unit} a {unit}"


Ask = Callable[[wire.RateLimitRequest], wire.RateLimitResponse]


def differences(example: Any, domain: str, answer: Ask) -> list[str]:
    """What *answer* says otherwise than the table; empty if nothing. Asked under *domain*, the example's own name apart."""
    found = []
    for number, step in enumerate(example["steps"]):
        for _ in range(step.get("times", 1)):
            made = request(domain, step["ask"], hits=step.get("hits", 0), own_hits=step.get("own_hits"))
            if "own_limit" in step:
                count, unit = step["own_limit"]
                made.descriptors[0].limit.requests_per_unit = count
                made.descriptors[0].limit.unit = wire.RateLimitResponse.RateLimit.Unit.Value(unit.upper())
            response = answer(made)
            overall = "ok" if response.overall_code == OK else "over"
            said = [shown(status) for status in response.statuses]
        # Of a repeated step the last answer is the table's.
        if (overall, said) != (step["overall"], step["statuses"]):
            found.append(f"{example['name']}, step {number + 1}: {overall} {said} instead of {step['overall']} {step['statuses']}")
    return found
