# SPDX-License-Identifier: Apache-2.0
"""The express lane's rules: what one of Envoy's workers may remember, for how long, and when it must forget."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from chassis.beacon import CHANGES_MAX, News
from ratelimit.core.demand import demand
from ratelimit.core.estimate import Estimates
from ratelimit.core.limits import Ask
from tests.conformance.road import module, runtime, table

IDENTITY = {"tenant": "acme", "project": "default", "key_id": "KEY1"}
UNTIL = 5000


class Lane:
    """One worker's memory."""

    def __init__(self) -> None:
        self.lua = module("lane")
        self.state = self.lua[b"new"]()

    def remember(self, key: str = "k", *, lease: tuple[int, int] | None = None, sequence: int = 0, **identity: str) -> None:
        """Remember an admission until `UNTIL`."""
        held = None if lease is None else runtime().table_from({b"requests": lease[0], b"tokens": lease[1]})
        who = {name.encode(): value.encode() for name, value in (IDENTITY | identity).items()}
        self.lua[b"remember"](self.state, key.encode(), runtime().table_from(who), held, UNTIL, sequence)

    def take(self, key: str = "k", *, tokens: int = 1, now: int = 0) -> tuple[Any, dict[str, Any] | None]:
        """Give the entry that lets the request pass, and what an ended lease left."""
        answer = self.lua[b"take"](self.state, key.encode(), tokens, now)
        entry, left = answer if isinstance(answer, tuple) else (answer, None)
        return entry, (table(left) if left is not None else None)

    def passes(self, key: str = "k", **how: int) -> bool:
        """Tell whether a request passes without asking."""
        return self.take(key, **how)[0] is not None

    def hear(self, news: News | str) -> None:
        """Hear the beacon."""
        text = news if isinstance(news, str) else news.text()
        self.lua[b"hear"](self.state, text.encode())


@pytest.fixture
def lane() -> Lane:
    """Give a lane that remembers nothing."""
    return Lane()


def test_what_was_admitted_passes_until_its_time_is_over(lane: Lane) -> None:
    """The last millisecond counts, the next does not; an entry that ended is gone."""
    lane.remember()

    assert lane.passes(now=UNTIL - 1)
    assert not lane.passes(now=UNTIL)
    assert not lane.passes(now=0)


def test_another_credential_dialect_or_model_is_another_entry(lane: Lane) -> None:
    """Everything that the decision depended on is in the key, to the last character of the credential."""
    key = lane.lua[b"key"]

    parts = [(b"Bearer abc", b"openai.chat", b"m"), (b"Bearer abd", b"openai.chat", b"m"), (b"Bearer abc", b"openai.chat", b"n"),
             (b"Bearer abc", b"anthropic.messages", b"m"), (b"Bearer abc\nm", b"openai.chat", b"")]  # fmt: skip
    assert len(parts) == len({key(*each) for each in parts})


def test_a_lease_is_spent_request_by_request(lane: Lane) -> None:
    """Exactly its requests pass; what is left goes to whoever is asked next, once."""
    lane.remember(lease=(2, 100))

    assert [True, True] == [lane.passes(tokens=10), lane.passes(tokens=10)]
    assert (None, {"requests": 0, "tokens": 80}) == lane.take(tokens=10)
    assert (None, None) == lane.take(tokens=10)


def test_a_request_larger_than_what_is_left_asks(lane: Lane) -> None:
    """One that fits to the last token passes."""
    lane.remember(lease=(9, 100))

    assert lane.passes(tokens=100)
    assert (None, {"requests": 8, "tokens": 0}) == lane.take(tokens=1)


def test_settling_gives_back_or_leaves_a_debt(lane: Lane) -> None:
    """Tokens that were not used can be spent again; tokens beyond the lease are owed."""
    lane.remember(lease=(9, 100))
    entry, _ = lane.take(tokens=60)

    lane.lua[b"settle"](entry, 60, 10)

    assert lane.passes(tokens=90)
    lane.lua[b"settle"](entry, 90, 300)
    assert (None, {"requests": 7, "tokens": -210}) == lane.take(tokens=1)


@pytest.mark.parametrize("who", ["KEY1", "acme"])
def test_a_changed_key_or_tenant_is_forgotten_at_once_and_no_other(lane: Lane, who: str) -> None:
    """Others keep their entries: one tenant's changes are not everybody's storm."""
    news = News(sequence=10)
    lane.hear(news)
    lane.remember(sequence=10)
    lane.remember("other", sequence=10, tenant="umbrella", key_id="KEY2")

    news.change(who)
    lane.hear(news)

    assert not lane.passes()
    assert lane.passes("other")


def test_an_answer_that_was_asked_for_before_the_news_does_not_outlive_it(lane: Lane) -> None:
    """The change came while extauth was being asked: what it answered may be the old state."""
    news = News(sequence=10)
    lane.hear(news)
    news.change("acme")
    lane.hear(news)

    lane.remember(sequence=10)

    assert not lane.passes()
    lane.remember(sequence=11)
    assert lane.passes()


@pytest.mark.parametrize("gap", ["forgotten", "too many", "another life", "went back"])
def test_a_gap_in_the_news_makes_it_forget_everything(lane: Lane, gap: str) -> None:
    """Whatever went unheard might have been this entry."""
    news = News(sequence=1000)
    lane.hear(news)
    lane.remember(sequence=1000)
    match gap:
        case "forgotten":
            news.forget()
        case "too many":
            for number in range(CHANGES_MAX + 1):
                news.change(f"t{number}")
        case "another life":
            news = News(sequence=50_000)
        case "went back":
            news = News(sequence=3)

    lane.hear(news)

    assert not lane.passes()


def test_the_most_changes_that_fit_are_no_gap(lane: Lane) -> None:
    """At the bound nothing is lost."""
    news = News(sequence=1000)
    lane.hear(news)
    lane.remember(sequence=1000)
    for number in range(CHANGES_MAX):
        news.change(f"t{number}")

    lane.hear(news)

    assert lane.passes()


@pytest.mark.parametrize("text", ["", "x", "\n", "1e9", "12", "99\n0 acme"])
def test_news_that_make_no_sense_never_let_more_pass(lane: Lane, text: str) -> None:
    """A torn or foreign file is no news, or a gap."""
    lane.hear(News(sequence=10))
    lane.hear(text)

    assert not lane.passes()


def test_memory_is_bounded_and_what_is_used_survives(lane: Lane) -> None:
    """Two halves: the older one goes when the newer one is full."""
    half = int(lane.lua[b"HALF_MAX"])
    lane.remember("used")
    for number in range(3 * half):
        lane.remember(f"garbage {number}")
        if number % 1000 == 0:
            assert lane.passes("used")

    assert lane.passes("used")
    assert len(list(lane.state[b"newer"])) + len(list(lane.state[b"older"])) <= 2 * half


def test_news_are_bounded_too(lane: Lane) -> None:
    """More changed keys than entries: forget everything rather than remember them all."""
    news = News(sequence=10)
    lane.hear(news)
    for number in range(int(lane.lua[b"HALF_MAX"]) + 1):
        news.change(f"t{number}")
        lane.hear(news)

    assert len(list(lane.state[b"changed"])) <= int(lane.lua[b"HALF_MAX"])


@pytest.mark.parametrize("dialect", ["openai.chat", "openai.completions", "openai.embeddings", "openai.responses", "anthropic.messages"])
@pytest.mark.parametrize(("prompt_bytes", "output", "choices"), [(0, 0, 1), (1, 0, 1), (5, 16, 1), (100, 16, 2), (999, 4096, 1), (12345, 4097, 3), (10, 0, 128)])
def test_a_lease_is_charged_what_ratelimit_would_reserve(dialect: str, prompt_bytes: int, output: int, choices: int) -> None:
    """One sum in two languages, as long as nothing is learned."""
    ask = Ask(
        request_id="r", tenant_id="t", project_id="p", key_id="k", model="m", dialect=dialect,
        prompt_bytes=prompt_bytes, output_tokens_max=output, choices=choices,
    )  # fmt: skip
    facts = {b"dialect": dialect.encode(), b"prompt_bytes": prompt_bytes, b"output_tokens_max": output, b"choices": choices}

    asked = demand(ask, (), estimates=Estimates(), price=None, output_cap=16_384, now=datetime(2026, 1, 1, tzinfo=UTC)).lean
    assert asked.input + asked.output == module("lane")[b"tokens"](runtime().table_from(facts))
