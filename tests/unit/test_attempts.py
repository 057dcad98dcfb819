# SPDX-License-Identifier: Apache-2.0
"""How often somebody may try, at the bounds."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from chassis.attempts import Attempts

NOON = datetime(2026, 11, 25, 12, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
NONE = timedelta(0)


def test_a_bucket_is_used_up_at_once_and_refills_evenly() -> None:
    """The wait that is told is enough, and nothing less is."""
    attempts = Attempts(most=60, per=MINUTE)
    granted = [attempts.take("a", NOON) for _ in range(60)]
    wait = attempts.take("a", NOON)

    assert [NONE] * 60 == granted
    assert timedelta(seconds=1) == wait
    assert NONE < attempts.take("a", NOON + wait - timedelta(microseconds=1))
    assert NONE == attempts.take("a", NOON + wait)
    assert NONE < attempts.take("a", NOON + wait)


def test_who_only_asks_how_long_makes_no_attempt() -> None:
    """And is told the same as who makes one."""
    attempts = Attempts(most=1, per=MINUTE)
    asked = {attempts.wait("a", NOON) for _ in range(10)}
    attempts.take("a", NOON)

    assert {NONE} == asked
    assert MINUTE == attempts.wait("a", NOON) == attempts.take("a", NOON)
    assert NONE == attempts.wait("a", NOON + 2 * MINUTE)


def test_an_attempt_that_was_made_anyway_is_waited_for() -> None:
    """Several that were granted by the same look at the bucket are no more than one after the other."""
    attempts = Attempts(most=2, per=MINUTE)
    for _ in range(4):
        attempts.count("a", NOON)

    assert 1.5 * MINUTE == attempts.wait("a", NOON)
    assert NONE == attempts.take("a", NOON + 1.5 * MINUTE)


def test_a_refused_attempt_costs_nothing_and_names_are_apart() -> None:
    """Whoever keeps knocking is let in as soon as one who waits."""
    attempts = Attempts(most=1, per=MINUTE)
    attempts.take("a", NOON)

    assert [MINUTE] * 100 == [attempts.take("a", NOON) for _ in range(100)]
    assert NONE == attempts.take("b", NOON)
    assert NONE == attempts.take("a", NOON + MINUTE)


def test_names_beyond_the_bound_push_out_the_one_longest_unused() -> None:
    """Memory is bounded whatever is sent."""
    attempts = Attempts(most=1, per=MINUTE, names_max=3)
    for name in "abcd":
        attempts.take(name, NOON)

    assert 3 == len(attempts)
    assert NONE < attempts.take("d", NOON)
    assert NONE == attempts.take("a", NOON)


def test_a_clock_that_goes_back_locks_nobody_out_for_longer_than_the_step() -> None:
    """A bucket is never fuller than full, nor emptier than it was."""
    attempts = Attempts(most=2, per=MINUTE)
    attempts.take("a", NOON)

    assert attempts.take("a", NOON - MINUTE) <= MINUTE + MINUTE
    assert NONE == attempts.take("a", NOON)
