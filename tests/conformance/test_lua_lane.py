# SPDX-License-Identifier: Apache-2.0
"""The express lane's rules: what one of Envoy's workers may remember, for how long, and when it must forget."""

from __future__ import annotations

from typing import Any

import pytest

from chassis.beacon import CHANGES_MAX, News
from tests.conformance.road import module, runtime

IDENTITY = {"tenant": "acme", "project": "default", "key_id": "KEY1"}
UNTIL = 5000


class Lane:
    """One worker's memory."""

    def __init__(self) -> None:
        self.lua = module("lane")
        self.state = self.lua[b"new"]()
        self.asks = 0

    def remember(
        self, key: str = "k", *, lease: tuple[int, int | None] | None = None, limited: bool = False, sequence: int = 0,
        until: int = UNTIL, now: int = 0, request_id: str = "first", **identity: str,
    ) -> Any:
        """Remember an admission: without limits, or with a lease, or (limited) without one."""
        who = {name.encode(): value.encode() for name, value in (IDENTITY | identity).items()}
        unlimited = lease is None and not limited
        held = None if lease is None else self.lease(*lease, now=now)
        return self.lua[b"remember"](
            self.state, key.encode(), runtime().table_from(who), unlimited, held, until, sequence, now, request_id.encode()
        )

    def lease(
        self, requests: int, tokens: int | None, *, name: str = "L", output: int = 512, prompt_bytes: int = 5, now: int = 0,
        bounds: dict[str, int] | None = None,
    ) -> Any:
        """A lease, by a request whose prompt was 2 tokens, asked for at *now*; of quotas if it has bounds."""
        table = None if bounds is None else runtime().table_from({name.encode(): value for name, value in bounds.items()})
        return self.lua[b"lease"](name.encode(), requests, tokens, 2, output, prompt_bytes, now, table)

    def lent(self, request_id: str, lease: Any, key: str = "k") -> Any:
        """The answer to a request that asked for a lease."""
        return self.lua[b"lent"](self.state, key.encode(), request_id.encode(), lease)

    def take(
        self, key: str = "k", *, output: int = 1, now: int = 0, prompt_bytes: int = 0, choices: int = 1
    ) -> tuple[bool, int | None, str | None, str]:
        """Give whether the caller is known, what the lease was charged (None: ask), what to say, and the request's id."""
        self.asks += 1
        request_id = f"request-{self.asks}"
        facts = {b"prompt_bytes": prompt_bytes, b"output_tokens_max": output, b"choices": choices}
        entry, charged, said = (*self.lua[b"take"](self.state, key.encode(), request_id.encode(), runtime().table_from(facts), now), None)[:3]
        return entry is not None, charged, said and said.decode(), request_id

    def passes(self, key: str = "k", **how: int) -> bool:
        """Tell whether a request passes without asking ratelimit."""
        return self.take(key, **how)[1] is not None

    def knows(self, key: str = "k", **how: int) -> bool:
        """Tell whether extauth need not be asked."""
        return self.take(key, **how)[0]

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
    """Exactly its requests pass; the next one asks for what comes in a lease's time, and gives back what is left, once."""
    lane.remember(lease=(2, 100))

    assert [True, True] == [lane.passes(output=10), lane.passes(output=10)]
    assert (True, None, "23 L 0 80") == lane.take(output=10)[:3]
    assert (True, None, "0") == lane.take(output=10)[:3]


def test_a_request_larger_than_what_is_left_asks(lane: Lane) -> None:
    """One that fits to the last token passes; prompts are charged at the ratio of the request that brought the lease."""
    lane.remember(lease=(9, 100))

    assert 100 == lane.take(output=60, prompt_bytes=100)[1]
    assert "17 L 8 0" == lane.take(output=1)[2]


def test_who_names_no_output_or_more_is_charged_what_ratelimit_holds(lane: Lane) -> None:
    """The usual, as learned there."""
    lane.remember()
    lane.remember("limited", lease=(9, 10_000))

    assert [512, 512, 511] == [lane.take("limited", output=output)[1] for output in (0, 4000, 511)]
    assert 0 == lane.take("k")[1]


def test_where_no_limit_counts_tokens_only_requests_are_spent(lane: Lane) -> None:
    """However large the requests are."""
    lane.remember(lease=(2, None))

    assert [0, 0, None] == [lane.take(output=1_000_000)[1] for _ in range(3)]


def test_settling_gives_back_or_leaves_a_debt(lane: Lane) -> None:
    """Tokens that were not used can be spent again; tokens beyond the lease are owed."""
    lane.remember(lease=(9, 100))
    charged = lane.take(output=60)[1]
    settle = lane.lua[b"settle"]

    settle(lane.state, b"k", charged, 10)

    assert lane.passes(output=90)
    settle(lane.state, b"k", 90, 300)
    assert "23 L 7 -210" == lane.take(output=1)[2]


def test_what_settles_while_there_is_no_lease_goes_to_the_next_one(lane: Lane) -> None:
    """A stream that outlived its lease: its refund can be spent, its debt is paid."""
    lane.remember(lease=(1, 100))
    lane.take(output=50)
    request_id = lane.take(output=1)[3]
    lane.lua[b"settle"](lane.state, b"k", 50, 80)

    lane.lent(request_id, lane.lease(5, 100, name="M"))

    assert not lane.passes(output=71)
    lane.lent(f"request-{lane.asks}", lane.lease(5, 100, name="N"))
    assert lane.passes(output=100)


@pytest.mark.parametrize(
    ("request_", "passes"),
    [
        ({"prompt_bytes": 4096, "output": 64}, True), ({"prompt_bytes": 4097, "output": 64}, False), ({"output": 65}, False),
        ({"output": 32, "choices": 2}, True), ({"output": 33, "choices": 2}, False), ({"output": 0}, False),
    ],
)  # fmt: skip
def test_on_a_lease_of_quotas_no_request_is_larger_than_it_is_held_at(lane: Lane, request_: dict[str, int], passes: bool) -> None:
    """Bytes of prompt, output of all choices; who names no output may have as much as the cap."""
    lane.remember(limited=True)
    lane.take()
    lane.lent("request-1", lane.lease(9, None, bounds={"prompt_bytes": 4096, "output": 64, "cap": 16_384}))

    assert passes == lane.passes(**request_)


def test_where_no_quota_counts_output_any_passes(lane: Lane) -> None:
    """A quota of requests, or of input tokens alone."""
    lane.remember(limited=True)
    lane.take()
    lane.lent("request-1", lane.lease(9, None, bounds={"prompt_bytes": 4096}))

    assert [True, True] == [lane.passes(output=output) for output in (0, 1_000_000)]


@pytest.mark.parametrize(("named", "cap"), [(0, 100), (100, None), (101, 100), (99, None)])
def test_who_names_no_less_is_held_to_the_cap(lane: Lane, named: int, cap: int | None) -> None:
    """The model server has to be told; a caller who names no more than the cap says it himself."""
    bounds, facts = (runtime().table_from(it) for it in ({b"cap": 100}, {b"output_tokens_max": named}))

    assert cap == lane.lua[b"cap"](bounds, facts)
    assert lane.lua[b"cap"](runtime().table_from({}), facts) is None


def test_a_clock_that_went_back_makes_no_lease_longer(lane: Lane) -> None:
    """A request may have begun before its lease was asked for, as long before as a lease lasts."""
    lane.remember(lease=(9, None), now=10_000, until=15_000)

    assert lane.passes(now=5000)
    assert not lane.passes(now=4999)


def test_a_caller_without_a_lease_is_known_and_asked_for(lane: Lane) -> None:
    """Extauth is spared; ratelimit decides each request, and one at a time asks for a lease."""
    lane.remember(limited=True)

    assert (True, None, "10") == lane.take()[:3]
    assert (True, None, "0") == lane.take()[:3]
    asking = int(lane.lua[b"ASKING_MS"])
    known, charged, said, request_id = lane.take(now=asking)
    assert (True, None, "23") == (known, charged, said)
    assert lane.lent("request-2", lane.lease(5, 100)) is None
    assert lane.lent(request_id, lane.lease(5, 100)) is not None
    assert lane.passes()


def test_a_late_answer_brings_its_lease_although_another_one_was_sent_to_ask(lane: Lane) -> None:
    """A model that is slower than somebody else's asking is waited for; each answer counts once."""
    lane.remember(limited=True, until=60_000)
    first = lane.take(now=0)[3]
    second = lane.take(now=int(lane.lua[b"ASKING_MS"]))[3]

    assert lane.lent(first, lane.lease(1, None, name="M")) is not None
    assert lane.lent(first, lane.lease(9, None, name="M")) is None
    assert lane.passes(now=1500)
    assert lane.lent(second, None) is None
    assert not lane.passes(now=1500)


def test_questions_whose_answers_never_come_are_bounded(lane: Lane) -> None:
    """Callers who left: beyond the bound all are forgotten, and whoever asks next is known again."""
    lane.remember(limited=True, until=10**9)
    most, every = int(lane.lua[b"SENT_MAX"]), int(lane.lua[b"ASKING_MS"])
    ids = [lane.take(now=number * every)[3] for number in range(most + 1)]

    assert lane.lent(ids[0], lane.lease(5, None)) is None
    assert lane.lent(ids[-1], lane.lease(5, None)) is not None


def slow(lane: Lane, *, waited: int, lease: tuple[int, int | None], until: int = UNTIL, now: int = 0) -> None:
    """A caller of whom *waited* came while the lease was awaited that is there *now*."""
    lane.remember(limited=True, until=until)
    request_id = lane.take(now=now)[3]
    for _ in range(waited):
        lane.take(now=now)
    assert lane.lent(request_id, lane.lease(*lease, name="M", now=now)) is not None


def test_one_asks_ahead_while_the_others_still_pass(lane: Lane) -> None:
    """Once fewer are left than come while an answer is awaited, and half as many again; the lease stays to be spent."""
    slow(lane, waited=4, lease=(8, None))
    assert [0, 0, 0] == [lane.take()[1] for _ in range(3)]

    known, charged, said, request_id = lane.take()

    assert (True, None) == (known, charged)
    assert said == "59"
    assert [0] * 5 == [lane.take()[1] for _ in range(5)]
    assert (None, "0") == lane.take()[1:3]
    assert lane.lent(request_id, lane.lease(20, None, name="N")) is not None
    assert lane.passes()


def test_nobody_asks_ahead_where_nobody_came_meanwhile(lane: Lane) -> None:
    """A caller of one request at a time spends its lease to the end, and gives it back with the next question."""
    slow(lane, waited=0, lease=(3, None))

    assert [0, 0, 0] == [lane.take()[1] for _ in range(3)]
    assert lane.take()[2] == "35 M 0 0"


def test_the_lease_that_was_asked_for_ahead_waits_until_the_one_before_is_spent_and_pays_its_debt(lane: Lane) -> None:
    """To the last token."""
    slow(lane, waited=2, lease=(4, 100))
    charged = lane.take(output=30)[1]
    *_, said, request_id = lane.take(output=30)
    assert said == "35"
    lane.lent(request_id, lane.lease(9, 200, name="N"))
    lane.lua[b"settle"](lane.state, b"k", charged, 150)

    assert 140 == lane.take(output=140)[1]
    assert "47 N 8 10" == lane.take(output=11)[2]


def test_what_a_lease_before_has_left_is_given_back_with_the_next_question_ahead(lane: Lane) -> None:
    """Its requests were too few, or too small, for one that came."""
    slow(lane, waited=2, lease=(4, 100))
    lane.take(output=30)
    request_id = lane.take(output=30)[3]
    lane.take(output=30)
    lane.take(output=30)
    lane.lent(request_id, lane.lease(4, 1000, name="N"))
    assert 300 == lane.take(output=300)[1]

    assert "59 M 1 10" == lane.take(output=300)[2]


def test_a_lease_is_not_spent_after_its_own_time(lane: Lane) -> None:
    """However long the caller is known: ratelimit counts it as spent soon after."""
    length = int(lane.lua[b"LEASE_MS"])
    lane.remember(lease=(9, None), until=60_000)

    assert lane.passes(now=length - 1)
    assert lane.take(now=length)[2] == "5 L 8 0"


@pytest.mark.parametrize("limited", [False, True])
def test_a_busy_caller_is_asked_for_ahead_and_known_without_a_gap(lane: Lane, limited: bool) -> None:
    """One goes to extauth while the others pass; its answer makes the caller known for longer, not before its end only."""
    lane.remember(limited=limited)
    for _ in range(10):
        lane.take(now=UNTIL)
    lane.remember(limited=limited, now=UNTIL, until=2 * UNTIL, request_id="request-1")

    asked = [number for number in range(UNTIL, 2 * UNTIL, 100) if not lane.knows(now=number)]

    assert len(asked) >= 1
    assert asked[0] < 2 * UNTIL - 1000
    lane.remember(limited=limited, now=2 * UNTIL - 100, until=3 * UNTIL - 1000, request_id="late")
    assert lane.knows(now=2 * UNTIL)


@pytest.mark.parametrize("changed_at", [11, 12])
def test_renewed_by_an_answer_of_before_a_change_it_is_forgotten_with_it(lane: Lane, changed_at: int) -> None:
    """What is remembered is as of the decision that lasts longest, whatever was heard meanwhile."""
    news = News(sequence=10)
    lane.hear(news)
    lane.remember(sequence=10)
    for _ in range(changed_at - 11):
        news.change("umbrella")
    news.change("acme")
    lane.hear(news)

    lane.remember(sequence=10, until=2 * UNTIL)

    assert not lane.knows()


def test_an_answer_without_a_lease_lets_the_next_one_ask(lane: Lane) -> None:
    """Near a limit each request is asked for, and wishes for what it needs itself and one more."""
    lane.remember(limited=True, until=60_000)
    lane.lent(lane.take()[3], None)
    for now in (10_000, 20_000):
        lane.lent(lane.take(now=now)[3], None)
    for now in (30_000, 40_000):
        _, charged, said, request_id = lane.take(now=now)
        assert (None, "2") == (charged, said)
        lane.lent(request_id, None)


def test_of_two_questions_in_a_row_the_second_knows_of_who_came_before_the_first(lane: Lane) -> None:
    """Who is calling is asked every five seconds, just after a lease perhaps: it would wish for one request, the next for two."""
    counted = int(lane.lua[b"COUNTED_MS"])
    lane.remember(limited=True, until=60_000)
    for number in range(200):
        lane.take(now=number * counted // 100)
    lane.lent(lane.take(now=2 * counted)[3], lane.lease(1, None, name="M"))

    assert lane.passes(now=2 * counted)
    assert int(str(lane.take(now=2 * counted + 1)[2]).split()[0]) >= 100


@pytest.mark.parametrize(("spent_in_ms", "asked_at"), [(800, 31), (5600, 34)])
def test_a_quarter_of_a_lease_is_kept_for_an_answer_that_takes_long(lane: Lane, spent_in_ms: int, asked_at: int) -> None:
    """Unless its time is over before it is spent: then it is asked for by the time, and not more often than before."""
    slow(lane, waited=1, lease=(40, None), until=60_000)

    asked = [number for number in range(asked_at + 1) if lane.take(now=(number + 1) * spent_in_ms // 40)[1] is None]

    assert [asked_at] == asked


def test_the_lease_of_what_lives_is_not_replaced(lane: Lane) -> None:
    """Two first requests at once: the second answer must not throw the first one's lease away; who lasts longest counts."""
    lane.remember(lease=(5, 100), until=2000)

    lane.remember(limited=True, until=1000)
    lane.remember(lease=(9, 100), until=3000)

    assert [True] * 14 == [lane.passes() for _ in range(14)]
    assert not lane.passes()
    assert lane.knows(now=2999)
    assert not lane.knows(now=3000)


def test_an_entry_whose_time_is_over_gives_its_lease_back(lane: Lane) -> None:
    """And wishes for as much as was needed in that time: nothing, if nobody came."""
    lane.remember(lease=(9, 100))
    assert [True, True] == [lane.passes(output=10), lane.passes(output=10)]

    assert (False, None, "5 L 7 80") == lane.take(now=UNTIL)[:3]
    assert (False, None, "0") == lane.take(now=UNTIL)[:3]

    lane.remember("idle", lease=(9, 100))
    assert (False, None, "0 L 9 100") == lane.take("idle", now=UNTIL)[:3]


def test_a_wish_is_bounded(lane: Lane) -> None:
    """At the bound and above."""
    most = int(lane.lua[b"WANTED_MAX"])
    lane.remember(lease=(most, None))
    for _ in range(most):
        assert lane.passes()

    assert f"{most} L 0 0" == lane.take()[2]


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
