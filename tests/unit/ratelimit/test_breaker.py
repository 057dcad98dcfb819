# SPDX-License-Identifier: Apache-2.0
"""When a failing store is left alone, and when it is asked again."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from ratelimit.adapters.local import FAILURES_TO_OPEN, PROBE_EVERY_SECONDS, Breaker, probe_until_back


class Watch:
    """A breaker, a clock that is set by hand, and how often it opened."""

    def __init__(self) -> None:
        self.now, self.opened = 100.0, 0
        self.breaker = Breaker(clock=lambda: self.now, opened=self._count)

    def _count(self) -> None:
        self.opened += 1

    def fail(self, times: int) -> None:
        for _ in range(times):
            self.breaker.failed()


def test_it_opens_with_the_last_of_the_consecutive_failures_and_not_before() -> None:
    """At the bound, and once however many more fail."""
    watch = Watch()

    watch.fail(FAILURES_TO_OPEN - 1)
    before = (watch.breaker.is_open, watch.opened)
    watch.fail(5)

    assert (False, 0) == before
    assert (True, 1) == (watch.breaker.is_open, watch.opened)


def test_a_success_between_failures_keeps_it_closed() -> None:
    """Only failures in a row say that the store is away."""
    watch = Watch()

    for _ in range(10):
        watch.fail(FAILURES_TO_OPEN - 1)
        watch.breaker.succeeded()

    assert (False, 0) == (watch.breaker.is_open, watch.opened)


def test_an_answer_that_was_under_way_does_not_close_it() -> None:
    """Only a write that the store has taken does."""
    watch = Watch()
    watch.fail(FAILURES_TO_OPEN)

    watch.breaker.succeeded()

    assert watch.breaker.is_open


def test_many_threads_that_fail_at_once_open_it_once() -> None:
    """One probe runs, not one per request."""
    watch = Watch()

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda _: watch.breaker.failed(), range(200)))

    assert 1 == watch.opened


def test_how_long_the_store_is_away_counts_from_its_first_failure() -> None:
    """And from anew after it was back."""
    watch = Watch()
    watch.fail(1)
    watch.now += 7
    watch.fail(FAILURES_TO_OPEN)

    away = watch.breaker.away_seconds
    watch.breaker.close()

    assert (7.0, 0.0) == (away, watch.breaker.away_seconds)


def test_it_is_probed_once_a_second_until_a_write_is_taken() -> None:
    """No request waits for that."""
    watch = Watch()
    watch.fail(FAILURES_TO_OPEN)
    answers = [False, False, True]
    pauses: list[float] = []

    probe_until_back(watch.breaker, lambda: answers.pop(0), sleep=pauses.append)

    assert [PROBE_EVERY_SECONDS] * 2 == pauses
    assert (False, []) == (watch.breaker.is_open, answers)
    watch.fail(FAILURES_TO_OPEN)
    assert 2 == watch.opened
