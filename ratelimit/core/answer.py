# SPDX-License-Identifier: Apache-2.0
"""What the caller is told about its limits: OpenAI's headers, the draft's, and a refusal that says which limit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from chassis.refusals import Refusal
from ratelimit.core.limits import LENGTHS_US, Effect, Period, Unit
from ratelimit.core.reading import LEASE_WAIT_US, Reading

_MICROSECONDS = 1_000_000

#: How people say a period: "10 requests per minute", "1000 tokens a calendar month".
_PER: Final = {
    Period.SECOND: "per second",
    Period.MINUTE: "per minute",
    Period.HOUR: "per hour",
    Period.DAY: "per day",
    Period.CALENDAR_DAY: "per UTC day",
    Period.CALENDAR_MONTH: "per UTC month",
    Period.EVER: "prepaid",
    Period.NOW: "at once",
}
_UNITS: Final = {Unit.CONCURRENCY: "requests"}
#: OpenAI's clients tell requests from tokens by `type`.
_FAIR_SHARE_TYPES: Final = {Unit.CONCURRENCY: "requests", Unit.TOKENS: "tokens"}


def headers(readings: Sequence[Reading]) -> dict[str, str]:
    """
    `x-ratelimit-*` for the tightest limit of each unit (least left), counting what is held.

    Only limits that refuse: money and concurrency have no such header in OpenAI's format.
    """
    found: dict[str, str] = {}
    for unit in Unit:
        of_unit = [
            r for r in readings
            if r.counter.unit is unit and r.counter.effect is Effect.REFUSE and not r.counter.is_shared
        ]  # fmt: skip
        if not of_unit or unit in (Unit.MONEY, Unit.CONCURRENCY):
            continue
        tightest = min(of_unit, key=lambda reading: reading.remaining)
        name = unit.value.replace("_", "-")
        found[f"x-ratelimit-limit-{name}"] = str(tightest.counter.amount)
        found[f"x-ratelimit-remaining-{name}"] = str(tightest.remaining)
        if tightest.reset_us is not None:
            found[f"x-ratelimit-reset-{name}"] = duration(tightest.reset_us)
    return found


def draft_headers(readings: Sequence[Reading]) -> dict[str, str]:
    """
    `RateLimit-Policy` and `RateLimit` as in draft-ietf-httpapi-ratelimit-headers-10, for limits that refuse.

    A policy is named by unit and period; of two with one name the tighter is told.
    """
    policies: dict[str, Reading] = {}
    for reading in readings:
        counter = reading.counter
        if counter.effect is not Effect.REFUSE or counter.unit is Unit.MONEY or counter.is_shared:
            continue
        name = f"{counter.unit.value}-{counter.period.value}".replace("_", "-")
        if name not in policies or reading.remaining < policies[name].remaining:
            policies[name] = reading
    if not policies:
        return {}
    quotas, states = [], []
    for name, reading in policies.items():
        counter = reading.counter
        quota, state = f'"{name}";q={counter.amount}', f'"{name}";r={reading.remaining}'
        length_us = LENGTHS_US.get(counter.period) or counter.ends_us - counter.starts_us
        if counter.period not in (Period.EVER, Period.NOW):
            quota += f";w={length_us // _MICROSECONDS}"
        if reading.reset_us is not None:
            state += f";t={-(-reading.reset_us // _MICROSECONDS)}"
        quotas.append(quota)
        states.append(state)
    return {"ratelimit-policy": ", ".join(quotas), "ratelimit": ", ".join(states)}


def longest_wait(readings: Sequence[Reading]) -> Reading:
    """Of those that refuse the one whose wait is the longest: a caller that waits for another is refused again."""
    refusing = [reading for reading in readings if reading.refuses]
    never = [reading for reading in refusing if reading.wait_us is None]
    return never[0] if never else max(refusing, key=lambda reading: reading.wait_us or 0)


def refusal(readings: Sequence[Reading]) -> tuple[Refusal, dict[str, str]]:
    """The refusal by the limit with the longest wait, and the headers that go with it."""
    worst = longest_wait(readings)
    found = headers(readings)
    if worst.wait_us is None:
        # Known to OpenAI's client libraries: they would otherwise retry in vain.
        found["x-should-retry"] = "false"
    else:
        found["retry-after"] = str(retry_after_seconds(worst.wait_us))
        found["retry-after-ms"] = str(-(-worst.wait_us // 1000))
    counter = worst.counter
    if counter.unit is Unit.MONEY:
        if worst.wait_us is not None and worst.wait_us <= LEASE_WAIT_US:
            message = f"What is left of the budget of this {counter.scope} is held by requests under way ({_PER[counter.period]})."
        else:
            message = f"The budget of this {counter.scope} is used up ({_PER[counter.period]})."
            # It comes back on a date, not after a pause: clients must not wait in a loop for it.
            found["x-should-retry"] = "false"
        return Refusal(status=402, code="insufficient_quota", message=message, type="insufficient_quota"), found
    if counter.is_shared:
        message = (
            f"Model {counter.scope} is busy, and this tenant has its share of it under way. "
            f"Try again in {retry_after_seconds(worst.wait_us or 0)} s."
        )
        return Refusal(status=429, code="fair_share", message=message, type=_FAIR_SHARE_TYPES[counter.unit]), found
    limit = f"{_counted(counter.amount, counter.unit)} {_PER[counter.period]}"
    if worst.wait_us is None:
        message = (
            f"This request needs about {_counted(worst.hits, counter.unit)}; the limit of this {counter.scope} is {limit}, "
            "so it can never pass. Ask for fewer."
        )
    else:
        message = (
            f"Rate limit reached: {limit} for this {counter.scope}. "
            f"Try again in {retry_after_seconds(worst.wait_us)} s."
        )
    kind = "requests" if counter.unit is Unit.CONCURRENCY else counter.unit.value
    return Refusal(status=429, code="rate_limit_exceeded", message=message, type=kind), found


def _counted(amount: int, unit: Unit) -> str:
    words = _UNITS.get(unit, unit.value.replace("_", " "))
    return f"{amount} {words.removesuffix('s') if amount == 1 else words}"


def retry_after_seconds(wait_us: int) -> int:
    """Whole seconds after which the request would pass: rounded up, at least 1."""
    return max(1, -(-wait_us // _MICROSECONDS))


def duration(us: int) -> str:
    """
    A duration as OpenAI writes it.

    >>> duration(12_000), duration(1_000_000), duration(90_500_000), duration(90_000_000_000)
    ('12ms', '1s', '1m30.5s', '25h0m0s')
    """
    if us < _MICROSECONDS:
        return f"{-(-us // 1000)}ms"
    minutes, rest = divmod(-(-us // 1000), 60_000)
    hours, minutes = divmod(minutes, 60)
    seconds = f"{rest / 1000:.3f}".rstrip("0").rstrip(".")
    if hours:
        return f"{hours}h{minutes}m{seconds}s"
    return f"{minutes}m{seconds}s" if minutes else f"{seconds}s"
