# SPDX-License-Identifier: Apache-2.0
"""What the caller is told about its limits: OpenAI's headers, and a refusal that says which limit."""

from __future__ import annotations

from collections.abc import Sequence

from chassis.refusals import Refusal
from ratelimit.core.bucket import Reading
from ratelimit.core.limits import Unit

_MICROSECONDS = 1_000_000


def headers(readings: Sequence[Reading]) -> dict[str, str]:
    """`x-ratelimit-*` for the tightest counter of each unit (least left), counting what is held."""
    found: dict[str, str] = {}
    for unit in Unit:
        of_unit = [reading for reading in readings if reading.counter.unit is unit]
        if not of_unit:
            continue
        tightest = min(of_unit, key=lambda reading: reading.remaining)
        found[f"x-ratelimit-limit-{unit.value}"] = str(tightest.counter.limit)
        found[f"x-ratelimit-remaining-{unit.value}"] = str(tightest.remaining)
        found[f"x-ratelimit-reset-{unit.value}"] = duration(tightest.reset_us)
    return found


def refusal(readings: Sequence[Reading]) -> tuple[Refusal, dict[str, str]]:
    """The refusal by the counter with the longest wait, and the headers that go with it."""
    refusing = [reading for reading in readings if reading.wait_us != 0]
    never = [reading for reading in refusing if reading.wait_us < 0]
    worst = never[0] if never else max(refusing, key=lambda reading: reading.wait_us)
    unit, counter = worst.counter.unit.value, worst.counter
    found = headers(readings)
    if never:
        message = (
            f"This request needs about {counter.hits} {unit}; the limit of this {counter.scope} is "
            f"{counter.limit} {unit} per minute, so it can never pass. Ask for fewer."
        )
        # Known to OpenAI's client libraries: they would otherwise retry in vain.
        found["x-should-retry"] = "false"
    else:
        seconds = retry_after_seconds(worst.wait_us)
        message = (
            f"Rate limit reached: {counter.limit} {unit} per minute for this {counter.scope}. "
            f"Try again in {seconds} s."
        )
        found["retry-after"] = str(seconds)
        found["retry-after-ms"] = str(-(-worst.wait_us // 1000))
    return Refusal(status=429, code="rate_limit_exceeded", message=message, type=unit), found


def retry_after_seconds(wait_us: int) -> int:
    """Whole seconds after which the request would pass: rounded up, at least 1."""
    return max(1, -(-wait_us // _MICROSECONDS))


def duration(us: int) -> str:
    """
    A duration as OpenAI writes it.

    >>> duration(12_000), duration(1_000_000), duration(90_500_000)
    ('12ms', '1s', '1m30.5s')
    """
    if us < _MICROSECONDS:
        return f"{-(-us // 1000)}ms"
    minutes, rest = divmod(-(-us // 1000), 60_000)
    seconds = f"{rest / 1000:.3f}".rstrip("0").rstrip(".")
    return f"{minutes}m{seconds}s" if minutes else f"{seconds}s"
