# SPDX-License-Identifier: Apache-2.0
"""Windows, estimates, demands and answers: the arithmetic at its edges."""

from __future__ import annotations

import dataclasses
import doctest
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest

from ratelimit.core import answer, estimate, usage, windows
from ratelimit.core.decide import Memory, Verdict, take
from ratelimit.core.demand import OUTPUT_TOKENS_LEAST, Counter, Kind, demand
from ratelimit.core.estimate import Estimates
from ratelimit.core.limits import Ask, Effect, Limit, LimitTable, Period, Unit
from ratelimit.core.reading import read
from ratelimit.core.usage import Price, Usage, cost_nano
from ratelimit.core.windows import window

ASK = Ask(
    request_id="r", tenant_id="t", project_id="p", key_id="k", model="m", dialect="openai.chat", prompt_bytes=25,
    output_tokens_max=10, choices=2,
)  # fmt: skip
NOW = datetime(2028, 2, 29, 23, 59, 59, 999_999, tzinfo=UTC)
USD = Price(currency="USD", input_nano=1_000_000, output_nano=2_000_000, cached_nano=500_000)
BUCKET = Counter(
    name="b", limit_id=1, kind=Kind.BUCKET, unit=Unit.REQUESTS, period=Period.MINUTE, amount=60, burst=60, full=1, lean=1
)


@pytest.mark.parametrize("module", [answer, estimate, usage, windows])
def test_examples_in_the_docs_are_true(module: object) -> None:
    """They are what a reader tries first."""
    assert 0 == doctest.testmod(module).failed  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("period", "now", "name", "length"),
    [
        (Period.CALENDAR_MONTH, NOW, "2028-02", timedelta(days=29)),
        (Period.CALENDAR_MONTH, NOW + timedelta(microseconds=1), "2028-03", timedelta(days=31)),
        (Period.CALENDAR_MONTH, datetime(2027, 12, 31, tzinfo=UTC), "2027-12", timedelta(days=31)),
        (Period.CALENDAR_MONTH, datetime(2100, 2, 1, tzinfo=UTC), "2100-02", timedelta(days=28)),
        (Period.CALENDAR_DAY, NOW, "2028-02-29", timedelta(days=1)),
        # The night on which Berlin's clocks go forward: a day has 24 hours all the same, in UTC.
        (Period.CALENDAR_DAY, datetime(2026, 3, 29, 1, 30, tzinfo=timezone(timedelta(hours=1))), "2026-03-29", timedelta(days=1)),
        (Period.CALENDAR_DAY, datetime(2026, 3, 29, 0, 30, tzinfo=timezone(timedelta(hours=1))), "2026-03-28", timedelta(days=1)),
    ],
)  # fmt: skip
def test_calendar_windows_are_of_utc(period: Period, now: datetime, name: str, length: timedelta) -> None:
    """The last microsecond of a month is in it, the next one is not."""
    found = window(period, now)

    assert (name, length) == (found.name, found.end - found.start)
    assert found.start <= now < found.end


def test_a_limit_binds_what_its_scope_names_and_all_that_match_are_found() -> None:
    """Any combination of project, key and model; never another tenant's."""
    scopes = [{}, {"project_id": "p"}, {"key_id": "k", "model": "m"}, {"project_id": "q"}, {"key_id": "k", "model": "n"}]
    made = [
        Limit(limit_id=i, tenant_id="t", unit=Unit.REQUESTS, period=Period.MINUTE, amount=1, **scope)
        for i, scope in enumerate(scopes)
    ]
    other = Limit(limit_id=9, tenant_id="u", unit=Unit.REQUESTS, period=Period.MINUTE, amount=1)

    assert [0, 1, 2] == [limit.limit_id for limit in LimitTable([*made, other]).match(ASK)]
    assert "key and model" == made[2].scope


def test_prices_round_up_and_cached_tokens_cost_their_own() -> None:
    """A budget is never undercharged by a fraction."""
    assert 1 == cost_nano(dataclasses.replace(USD, input_nano=1), Usage(input=1, output=0))
    assert 2 + 4 == cost_nano(USD, Usage(input=2, output=2))
    assert 1 + 1 == cost_nano(USD, Usage(input=3, output=0, cached=2))
    assert 1 == cost_nano(USD, Usage(input=1, output=0, cached=5))
    assert 0 == cost_nano(None, Usage(input=9, output=9))


def _demand(*limits: Limit, estimates: Estimates | None = None, **ask: object):  # noqa: ANN202
    return demand(
        dataclasses.replace(ASK, **ask), limits, estimates=estimates or Estimates(), price=USD, output_cap=5000, now=NOW
    )


def test_only_a_hard_limit_is_asked_for_the_worst_case() -> None:
    """A bucket and a soft budget are asked for the usual in both ways."""
    bucket = Limit(limit_id=1, tenant_id="t", unit=Unit.TOKENS, period=Period.MINUTE, amount=10**6)
    soft = Limit(limit_id=2, tenant_id="t", unit=Unit.MONEY, period=Period.CALENDAR_MONTH, amount=10**9, effect=Effect.COUNT, currency="USD")
    hard = Limit(limit_id=3, tenant_id="t", unit=Unit.MONEY, period=Period.CALENDAR_MONTH, amount=10**9, currency="USD")
    euro = Limit(limit_id=4, tenant_id="t", unit=Unit.MONEY, period=Period.CALENDAR_DAY, amount=10**9, currency="EUR")

    asked = _demand(bucket, soft, hard, euro, output_tokens_max=0)

    usual, worst = 10 + 2 * 512, 10 + 2 * 2 * 5000
    assert [(usual, usual), (usual + 1024, usual + 1024), (worst, usual + 1024), (0, 0)] == [
        (c.full, c.lean) for c in asked.counters
    ]
    assert (5000, 512) == (asked.cap(asked.full.output), asked.cap(asked.lean.output))
    assert _demand(bucket, soft).cap(1024) is None


def _quota(amount: int, **scope: Any) -> Limit:
    return Limit(limit_id=1, tenant_id="t", unit=Unit.TOKENS, period=Period.CALENDAR_MONTH, amount=amount, **scope)


@pytest.mark.parametrize(
    ("left", "verdict", "cap"),
    [
        (10 + 2 * 5000, Verdict.FULL, 5000),
        (10 + 2 * 5000 - 1, Verdict.LEAN, 512),
        (10 + 2 * 512 - 1, Verdict.LEAN, 511),
        (10 + 2 * OUTPUT_TOKENS_LEAST, Verdict.LEAN, OUTPUT_TOKENS_LEAST),
        (10 + 2 * OUTPUT_TOKENS_LEAST - 1, Verdict.REFUSED, None),
    ],
)
def test_a_caller_without_history_is_capped_to_what_is_left(left: int, verdict: Verdict, cap: int | None) -> None:
    """It is refused only where what is left does not pay the prompt and the least that is worth an answer."""
    asked = _demand(_quota(left), output_tokens_max=0)

    outcome = take(Memory(), asked, 0)

    assert (verdict, cap) == (outcome.verdict, asked.cap(outcome.output) if outcome.admitted else None)


def test_a_caller_who_names_fewer_than_the_least_is_not_refused_for_it() -> None:
    """The least is of what was asked for."""
    asked = _demand(_quota(10 + 2 * 3), output_tokens_max=3)

    outcome = take(Memory(), asked, 0)

    assert (Verdict.FULL, 3) == (outcome.verdict, asked.cap(outcome.output))


def test_a_refusal_by_a_hard_quota_says_what_would_have_sufficed() -> None:
    """The prompt and the least, not the most that could have come."""
    asked = _demand(_quota(20), output_tokens_max=0)

    refusal, _ = answer.refusal(take(Memory(), asked, 0).readings)

    assert f"needs about {10 + 2 * OUTPUT_TOKENS_LEAST} tokens" in refusal.message


@pytest.mark.parametrize(("burst", "served"), [(10 + 2 * 512, True), (300, True), (10 + 2 * OUTPUT_TOKENS_LEAST - 1, False)])
def test_a_bucket_smaller_than_the_usual_answer_is_asked_for_all_of_it(burst: int, served: bool) -> None:
    """What comes above is a debt; without a history nobody is told that it can never pass."""
    bucket = Limit(limit_id=1, tenant_id="t", unit=Unit.TOKENS, period=Period.MINUTE, amount=burst)

    outcome = take(Memory(), _demand(bucket, output_tokens_max=0), 0)

    assert served == outcome.admitted
    assert served == (outcome.readings[0].wait_us is not None)


@pytest.mark.parametrize(("named", "held"), [(0, 300), (1, 1), (300, 300), (4096, 300), (200_000, 300)])
def test_what_is_held_is_what_is_usual_and_never_more_than_was_named(named: int, held: int) -> None:
    """A client that always sends the model's maximum does not hold it each time."""
    estimates = Estimates()
    for _ in range(estimate.SAMPLES_MIN):
        estimates.learn(tenant_id="t", model="m", prompt_bytes=400, input_tokens=100, output_tokens=300)

    assert held == estimates.output_tokens(tenant_id="t", model="m", named_max=named, cap=16_384)
    # Four bytes a token were learned.
    assert 25 == estimates.prompt_tokens(model="m", prompt_bytes=100)
    assert 40 == estimates.prompt_tokens(model="other", prompt_bytes=100)


@pytest.mark.parametrize(("named", "held"), [(0, 512), (1, 1), (4096, 4096), (4097, 4096), (200_000, 4096)])
def test_without_a_history_a_believable_maximum_is_held(named: int, held: int) -> None:
    """The context's length is none."""
    assert held == Estimates().output_tokens(tenant_id="t", model="m", named_max=named, cap=16_384)


def test_a_million_models_keep_memory_bounded() -> None:
    """What was longest unused is forgotten."""
    estimates = Estimates()
    for number in range(estimate.RINGS_MAX + 500):
        estimates.learn(tenant_id="t", model=f"m{number}", prompt_bytes=4, input_tokens=1, output_tokens=1)

    assert estimate.RINGS_MAX == len(estimates)


def test_the_largest_request_counts_for_a_while() -> None:
    """For a minute at least and two at the most; bytes and tokens each for themselves, by tenant and model."""
    estimates, begin = Estimates(), datetime(2026, 3, 1, tzinfo=UTC)

    def largest(seconds: float, prompt_bytes: int, output_tokens: int, **name: str) -> tuple[int, int]:
        names = {"tenant_id": "t", "model": "m"} | name
        return estimates.largest(
            **names, prompt_bytes=prompt_bytes, output_tokens=output_tokens, now=begin + timedelta(seconds=seconds)
        )

    assert [(100, 5), (100, 9)] == [largest(0, 100, 5), largest(1, 10, 9)]
    assert [(1, 1), (1, 1)] == [largest(1, 1, 1, tenant_id="o"), largest(1, 1, 1, model="o")]
    assert [(100, 9), (100, 9), (10, 2)] == [largest(seconds, 10, 2) for seconds in (60, 119.9, 120)]
    assert [(1, 1), (1, 1)] == [largest(seconds, 1, 1) for seconds in (600, -600)]


def test_of_how_many_the_largest_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who was longest away is forgotten."""
    monkeypatch.setattr(estimate, "LARGEST_MAX", 2)
    estimates, now = Estimates(), datetime(2026, 3, 1, tzinfo=UTC)
    for tenant_id in ("a", "b", "c"):
        estimates.largest(tenant_id=tenant_id, model="m", prompt_bytes=9, output_tokens=9, now=now)

    found = [estimates.largest(tenant_id=it, model="m", prompt_bytes=1, output_tokens=1, now=now) for it in ("c", "b", "a")]

    assert [(9, 9), (9, 9), (1, 1)] == found


@pytest.mark.parametrize(
    ("asked", "limits", "bounds"),
    [
        ({"prompt_bytes": 2049, "output_tokens_max": 300}, ["hard"], (8192, 16_384, 512)),
        ({"prompt_bytes": 1, "output_tokens_max": 1}, ["hard"], (4096, 16_384, 256)),
        ({"prompt_bytes": 1, "output_tokens_max": 0, "choices": 3}, ["hard"], (4096, 16_384, 65_536)),
        ({"prompt_bytes": 1, "output_tokens_max": 0}, ["requests"], (4096, None, 16_384)),
        ({"prompt_bytes": 1, "output_tokens_max": 0}, ["bucket"], None),
        ({"prompt_bytes": 1, "output_tokens_max": 0, "quantity": 1}, ["hard"], None),
    ],
)  # fmt: skip
def test_what_a_request_on_a_lease_of_quotas_may_be(
    asked: dict[str, Any], limits: list[str], bounds: tuple[int, int | None, int] | None
) -> None:
    """The next powers of two; the cap where output is held; nothing without a quota, or with another meter than tokens."""
    kinds = {
        "hard": (Unit.TOKENS, Period.CALENDAR_MONTH), "requests": (Unit.REQUESTS, Period.CALENDAR_DAY), "bucket": (Unit.TOKENS, Period.MINUTE),
    }  # fmt: skip
    ask = Ask(
        **{
            "request_id": "r", "tenant_id": "t", "project_id": "p", "key_id": "k", "model": "m", "dialect": "openai.chat", "choices": 1,
        } | asked
    )  # fmt: skip
    made = demand(
        ask, [Limit(limit_id=1, tenant_id="t", unit=kinds[it][0], period=kinds[it][1], amount=10**9) for it in limits],
        estimates=Estimates(), price=None, output_cap=16_384, now=datetime(2026, 3, 1, tzinfo=UTC),
    )  # fmt: skip

    found = made.bounds and (made.bounds.prompt_bytes, made.bounds.cap, made.bounds.usage.output)
    assert bounds == found


@pytest.mark.parametrize(
    ("wait_us", "seconds"), [(1, 1), (1_000_000, 1), (1_000_001, 2), (59_999_999, 60), (60_000_000, 60)]
)
def test_retry_after_is_right_to_the_second(wait_us: int, seconds: int) -> None:
    """Never early, and never a second late."""
    level = 60 * 60_000_000 - 60_000_000 + wait_us * 60
    reading = read(BUCKET, level, hits=1, now_us=0)

    _, headers = answer.refusal([reading])

    assert wait_us == reading.wait_us
    assert str(seconds) == headers["retry-after"]


@pytest.mark.parametrize(("held", "seconds"), [(0, "3600"), (9, "3600"), (10, "1"), (80, "1")])
def test_what_is_only_held_is_not_waited_for_until_the_quota_starts_anew(held: int, seconds: str) -> None:
    """Thirty are asked where twenty are left: they fit once ten of what is held come back."""
    counter = dataclasses.replace(
        BUCKET, kind=Kind.QUOTA, unit=Unit.TOKENS, period=Period.CALENDAR_MONTH, amount=100, burst=100, ends_us=3_600_000_000
    )

    _, headers = answer.refusal([read(counter, 80, held=held, hits=30, now_us=0)])

    assert seconds == headers["retry-after"]


def test_a_budget_that_is_only_held_may_be_asked_again() -> None:
    """The client is not told to give up."""
    prepaid = dataclasses.replace(BUCKET, kind=Kind.QUOTA, unit=Unit.MONEY, period=Period.EVER, amount=5, burst=5)

    refusal, headers = answer.refusal([read(prepaid, 5, held=3, hits=3, now_us=0)])

    assert (402, "1") == (refusal.status, headers["retry-after"])
    assert "x-should-retry" not in headers
    assert "held" in refusal.message


@pytest.mark.parametrize(("amount", "said"), [(1, "1 request per minute"), (2, "2 requests per minute")])
def test_one_is_not_told_as_several(amount: int, said: str) -> None:
    """People read it."""
    counter = dataclasses.replace(BUCKET, amount=amount, burst=1)

    refusal, _ = answer.refusal([read(counter, 60_000_000, hits=1, now_us=0)])

    assert said in refusal.message


def test_the_longest_wait_is_told_and_shadow_limits_are_not() -> None:
    """A caller that waits for the shorter one would be refused again."""
    month = dataclasses.replace(
        BUCKET, name="q", kind=Kind.QUOTA, period=Period.CALENDAR_MONTH, amount=100, burst=100, ends_us=3_600_000_000
    )
    shadow = dataclasses.replace(BUCKET, name="s", amount=1, burst=1, effect=Effect.SHADOW)
    readings = [
        read(BUCKET, 60 * 60_000_000, hits=1, now_us=0), read(month, 100, hits=1, now_us=0), read(shadow, 60_000_000, hits=1, now_us=0)
    ]  # fmt: skip

    refusal, headers = answer.refusal(readings)

    assert (429, "rate_limit_exceeded", "requests") == (refusal.status, refusal.code, refusal.type)
    assert "100 requests per UTC month" in refusal.message
    assert ("3600", "60", "0") == (
        headers["retry-after"], headers["x-ratelimit-limit-requests"], headers["x-ratelimit-remaining-requests"],
    )  # fmt: skip


def test_money_is_402_and_is_not_asked_for_again_in_a_loop() -> None:
    """The code that OpenAI's clients know."""
    prepaid = dataclasses.replace(BUCKET, kind=Kind.QUOTA, unit=Unit.MONEY, period=Period.EVER, amount=5, burst=5)

    refusal, headers = answer.refusal([read(prepaid, 5, hits=1, now_us=0)])

    assert (402, "insufficient_quota") == (refusal.status, refusal.code)
    assert "false" == headers["x-should-retry"]


def test_a_clock_that_went_back_drains_nothing_and_locks_nobody_out() -> None:
    """After a failover to a slower clock, one burst is the most that anybody waits for."""
    from ratelimit.core.demand import Demand  # noqa: PLC0415

    memory = Memory()
    asks = [
        Demand(tenant_id="t", request_id=str(n), counters=(dataclasses.replace(BUCKET, amount=1, burst=1),),
               full=Usage(input=0, output=0), lean=Usage(input=0, output=0))
        for n in range(4)
    ]  # fmt: skip
    hour, minute = 3_600_000_000, 60_000_000
    moments = (hour, 0, minute - 1, minute)

    verdicts = [take(memory, ask, moment).verdict for ask, moment in zip(asks, moments, strict=True)]

    assert [Verdict.FULL, Verdict.REFUSED, Verdict.REFUSED, Verdict.FULL] == verdicts
