# SPDX-License-Identifier: Apache-2.0
"""
What a rule says to a descriptor once it is counted, and what a whole request is told.

Every descriptor of a request is counted, whatever the others say. A descriptor is over when its
count goes beyond the rule's number: the hit that reaches it still passes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

from ratelimit.core.rls.rules import LENGTHS_SECONDS, Rule

#: The largest addend that a request can say for all its descriptors (uint32). One of its own may say more: refused.
HITS_MAX: Final = 2**32 - 1
#: Counts stay here; the store's numbers are exact to 2^53.
COUNT_MAX: Final = 2**53 - 1
#: "As much as you like", in a field of 32 bits.
REMAINING_MAX: Final = 2**32 - 1
#: From this part of a rule's number on, hits are near the limit.
_NEAR: Final = (4, 5)


class Stat(Enum):
    """What is measured of a rule, in hits; the words are envoyproxy/ratelimit's."""

    TOTAL_HITS = "total_hits"
    WITHIN_LIMIT = "within_limit"
    NEAR_LIMIT = "near_limit"
    OVER_LIMIT = "over_limit"
    SHADOW_MODE = "shadow_mode"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """A counter before and after *hits* were added; negative hits give back."""

    hits: int
    before: int
    after: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What one descriptor is told; *rule* is None if nothing limits it."""

    over: bool
    rule: Rule | None = None
    remaining: int = 0
    #: Seconds until the window ends, at least 1; None where there is no window.
    reset_seconds: int | None = None


#: No rule binds the descriptor, or the one that does is replaced by another.
UNBOUND: Final = Verdict(over=False)


def unlimited() -> Verdict:
    """The verdict of a rule without a limit."""
    return Verdict(over=False, remaining=REMAINING_MAX)


def judge(rule: Rule, reading: Reading, now_seconds: int) -> Verdict:
    """The verdict of a counted rule; a shadow rule never says over."""
    assert rule.unit is not None
    return Verdict(
        over=_is_over(rule, reading) and not rule.shadow,
        rule=rule,
        remaining=max(0, rule.requests_per_unit - reading.after),
        reset_seconds=reset_seconds(LENGTHS_SECONDS[rule.unit], now_seconds),
    )


def reset_seconds(length_seconds: int, now_seconds: int) -> int:
    """
    How long the window still lasts.

    >>> reset_seconds(60, 119), reset_seconds(60, 120)
    (1, 60)
    """
    return length_seconds - now_seconds % length_seconds


def measure(rule: Rule, reading: Reading) -> dict[Stat, int]:
    """
    How many of the hits were within, near and over the limit; hits given back are none.

    A request of many hits can be partly over: those up to the limit are not.
    """
    if reading.hits <= 0:
        return {}
    limit, hits = rule.requests_per_unit, reading.hits
    near = limit * _NEAR[0] // _NEAR[1]
    stats = {Stat.TOTAL_HITS: hits}
    if _is_over(rule, reading):
        over = min(hits, reading.after - limit)
        stats[Stat.OVER_LIMIT] = over
        stats[Stat.NEAR_LIMIT] = max(0, limit - max(near, reading.before))
        if rule.shadow:
            stats[Stat.SHADOW_MODE] = over
    else:
        stats[Stat.NEAR_LIMIT] = max(0, min(hits, reading.after - near))
        stats[Stat.WITHIN_LIMIT] = hits
    return {stat: count for stat, count in stats.items() if count}


def is_refused(verdicts: Sequence[Verdict]) -> bool:
    """Whether the request is over: an ordinary rule is, or all of its quota rules are."""
    rules = [(verdict.over, verdict.rule.quota) for verdict in verdicts if verdict.rule is not None]
    quotas = [over for over, quota in rules if quota]
    return any(over for over, quota in rules if not quota) or (bool(quotas) and all(quotas))


def closest(verdicts: Sequence[Verdict]) -> Verdict | None:
    """The descriptor that the response headers tell of: the last ordinary one that is over, else the least that is left."""
    chosen: Verdict | None = None
    for verdict in verdicts:
        if verdict.rule is None:
            continue
        refuses = verdict.over and not verdict.rule.quota
        if chosen is None or refuses or verdict.remaining < chosen.remaining:
            chosen = verdict
    return chosen


def passed_metadata(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """The metadata of the rules that passed, as one; of two values for a name the first stays."""
    merged: dict[str, Any] = {}
    for verdict in verdicts:
        if verdict.rule is not None and verdict.rule.metadata is not None and not verdict.over:
            _merge(merged, verdict.rule.metadata)
    return merged


def _merge(into: dict[str, Any], new: Mapping[str, Any]) -> None:
    for name, value in new.items():
        known = into.get(name)
        if isinstance(known, dict) and isinstance(value, Mapping):
            _merge(known, value)
        elif name not in into:
            # Its own copy: what is merged into it later must not reach the rule.
            into[name] = _copied(value)


def _copied(value: object) -> object:
    return {name: _copied(inner) for name, inner in value.items()} if isinstance(value, Mapping) else value


def _is_over(rule: Rule, reading: Reading) -> bool:
    return reading.after > rule.requests_per_unit
