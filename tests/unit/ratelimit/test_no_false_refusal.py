# SPDX-License-Identifier: Apache-2.0
"""Whoever stays below the limit is served: in simulated time, beside a limiter that knows the future."""

from __future__ import annotations

from random import Random

from ratelimit.core.limits import Limit, Period, Unit
from tests.ratelimit_model.traffic import agents, in_memory, play, steady

_TOKENS_PER_MINUTE = 600_000


def tokens(period: Period, amount: int, limit_id: int = 1) -> Limit:
    return Limit(limit_id=limit_id, tenant_id="t", unit=Unit.TOKENS, period=period, amount=amount)


def test_at_nine_tenths_of_the_limit_nobody_is_refused_who_could_pass() -> None:
    """At most one in ten thousand, of random sizes, maxima and durations."""
    offers = list(steady(Random(1), count=10_000, tokens_per_minute=0.9 * _TOKENS_PER_MINUTE))
    take, settle = in_memory()

    played = play(offers, [tokens(Period.MINUTE, _TOKENS_PER_MINUTE)], take=take, settle=settle)

    assert 10_000 * played.refused_falsely <= played.offered
    # Offered as said, or it shows nothing.
    minutes = (offers[-1].at_us - offers[0].at_us) / 60_000_000
    assert 0.85 * _TOKENS_PER_MINUTE < played.used / minutes < 0.95 * _TOKENS_PER_MINUTE


def test_above_the_limit_callers_are_refused_and_the_limit_is_used() -> None:
    """The other side of it: half again as much as may pass, and what passes is the limit."""
    offers = list(steady(Random(4), count=4_000, tokens_per_minute=1.5 * _TOKENS_PER_MINUTE))
    take, settle = in_memory()

    played = play(offers, [tokens(Period.MINUTE, _TOKENS_PER_MINUTE)], take=take, settle=settle)

    minutes = (offers[-1].at_us - offers[0].at_us) / 60_000_000
    assert played.refused > played.offered / 5
    assert 0.97 * _TOKENS_PER_MINUTE * minutes < played.used < _TOKENS_PER_MINUTE * (minutes + 1.1)


def test_coding_agents_are_not_refused_while_spend_is_far_below_their_quota() -> None:
    """Each names 32,000 output tokens and uses a hundredth of them: holding all that would pin the quota at once."""
    quota = 1_500_000
    offers = list(agents(Random(5), bursts=15, at_once=30))
    take, settle = in_memory()

    played = play(offers, [tokens(Period.CALENDAR_MONTH, quota)], take=take, settle=settle)

    assert 0.3 * quota < played.used < 0.6 * quota
    assert (0, 0) == (played.refused, played.refused_falsely)
    assert played.refused_by_flat_hold > 0
