# SPDX-License-Identifier: Apache-2.0
"""Fair shares of a pool: who passes, who waits and for how long, against the fluid model that it stands for."""

from __future__ import annotations

from fractions import Fraction
from random import Random

import pytest

from ratelimit.core import answer
from ratelimit.core.decide import Memory, Outcome, settle, take
from ratelimit.core.demand import BACKLOG_SECONDS, Demand, demand
from ratelimit.core.estimate import Estimates
from ratelimit.core.fairshare import Backlog
from ratelimit.core.limits import Ask, Pool, Share
from ratelimit.core.usage import Report
from tests.unit.ratelimit.test_core import NOW

_SECOND = 1_000_000


class Servers:
    """A pool and the tenants that ask for it; time only moves when it is told to."""

    def __init__(self, *, slots: int | None = None, tokens_per_second: int | None = None) -> None:
        self.pool = Pool(model="m", slots=slots, tokens_per_second=tokens_per_second)
        self.memory, self.now, self.number = Memory(), 0, 0

    def ask(self, tenant: str, *, weight: int = 1, tokens: int = 10) -> tuple[Demand, Outcome]:
        self.number += 1
        ask = Ask(
            request_id=f"r{self.number}", tenant_id=tenant, project_id="p", key_id="k", model="m", dialect="openai.chat",
            prompt_bytes=0, output_tokens_max=tokens, choices=1,
        )  # fmt: skip
        asked = demand(
            ask, (), estimates=Estimates(), price=None, output_cap=10**6, now=NOW, share=Share(pool=self.pool, weight=weight)
        )
        return asked, take(self.memory, asked, self.now)

    def admits(self, tenant: str, **of: int) -> bool:
        return self.ask(tenant, **of)[1].admitted

    def fill(self, tenant: str, **of: int) -> list[Demand]:
        """Ask until refused; what was admitted."""
        admitted = []
        while (answered := self.ask(tenant, **of))[1].admitted:
            admitted.append(answered[0])
        return admitted

    def end(self, asked: Demand, *, output: int = 0) -> None:
        settle(self.memory, asked.request_id, Report(input=0, output=output), self.now)


def test_who_is_alone_may_use_all_of_it() -> None:
    """And no more."""
    assert 12 == len(Servers(slots=12).fill("batch"))


def test_a_newcomer_passes_up_to_its_share_of_a_full_pool_and_who_filled_it_does_not() -> None:
    """Nobody waits for those who came while there was room."""
    servers = Servers(slots=12)
    servers.fill("batch")

    assert 6 == len(servers.fill("chat"))
    assert not servers.admits("batch")


def test_slots_that_become_free_go_to_whoever_is_below_its_share() -> None:
    """Until each has its part: then whoever ends one may begin one."""
    servers = Servers(slots=12)
    batch, chat = servers.fill("batch"), servers.fill("chat")
    for asked in batch[:6]:
        servers.end(asked)

    assert (False, False) == (servers.admits("batch"), servers.admits("chat"))
    servers.end(batch[6])
    assert [True, False] == [servers.admits("batch") for _ in range(2)]
    servers.end(chat[0])
    assert [True, False] == [servers.admits("chat") for _ in range(2)]


def test_shares_follow_weights() -> None:
    """Three to one, once both want all of it."""
    servers = Servers(slots=12)
    servers.fill("batch")

    assert 9 == len(servers.fill("chat", weight=3))


def test_a_crowd_of_newcomers_never_puts_more_than_twice_the_capacity_into_the_pool() -> None:
    """Each has one, however small its share is."""
    servers = Servers(slots=12)
    servers.fill("batch")

    passed = [servers.admits(f"t{number}") for number in range(30)]

    assert [True] * 12 + [False] * 18 == passed


def test_a_lease_that_is_over_frees_its_slot() -> None:
    """Of a request that nobody settled."""
    servers = Servers(slots=2)
    servers.fill("batch")
    servers.now += 3_600_000_000

    assert 2 == len(servers.fill("chat"))


def test_tokens_are_shared_by_weight_under_contention() -> None:
    """Two tenants that ask as often as they are told to get the pool's tokens one to three."""
    servers = Servers(tokens_per_second=1000)
    given, due = {"batch": 0, "chat": 0}, {"batch": 0, "chat": 0}
    weights = {"batch": 1, "chat": 3}

    while servers.now < 120 * _SECOND:
        tenant = min(due, key=lambda name: due[name])
        servers.now = max(servers.now, due[tenant])
        asked, outcome = servers.ask(tenant, weight=weights[tenant], tokens=100)
        if outcome.admitted:
            servers.end(asked, output=100)
            given[tenant] += 100
            due[tenant] = servers.now + 1000
        else:
            due[tenant] = servers.now + (outcome.readings[0].wait_us or 0)

    assert 0.23 <= given["batch"] / sum(given.values()) <= 0.27
    # All that the pool does, and what may wait in it.
    assert 120_000 <= sum(given.values()) <= 120_000 + 2 * BACKLOG_SECONDS * 1000 + 100


def test_one_request_larger_than_the_share_passes_and_delays_the_next() -> None:
    """It would else never pass at all."""
    servers = Servers(tokens_per_second=100)

    assert servers.admits("batch", tokens=4_000)
    assert not servers.admits("batch")
    assert servers.admits("chat")


def test_the_wait_that_is_told_is_right_while_the_others_stay() -> None:
    """To the microsecond: a moment before it the tenant is still above its share."""
    servers = Servers(tokens_per_second=1000)
    servers.fill("batch", tokens=2_000)
    servers.fill("chat", weight=3, tokens=900)
    _, refused = servers.ask("batch")
    begun, wait_us = servers.now, refused.readings[0].wait_us
    assert wait_us

    admitted = []
    for moment in (*range(begun, begun + wait_us, 100_000), begun + wait_us - 2, begun + wait_us):
        servers.now = moment
        servers.fill("chat", weight=3, tokens=900)
        admitted.append(servers.admits("batch"))

    assert [True] == admitted[-1:]
    assert not any(admitted[:-1])


def test_what_was_not_used_is_given_back() -> None:
    """A settle replaces what was held by what the engine counted."""
    servers = Servers(tokens_per_second=100)
    asked, _ = servers.ask("batch", tokens=4000)
    refused = not servers.admits("batch")

    servers.end(asked, output=10)

    assert refused
    assert servers.admits("batch")


def test_the_refusal_says_what_it_is() -> None:
    """429 with a code of its own, the wait, and no header of the pool's."""
    servers = Servers(slots=1)
    servers.fill("batch")

    _, outcome = servers.ask("batch")
    refusal, headers = answer.refusal(outcome.readings)

    assert (429, "fair_share", "requests") == (refusal.status, refusal.code, refusal.type)
    assert {"retry-after": "1", "retry-after-ms": "1000"} == headers
    assert {} == answer.draft_headers(outcome.readings)


@pytest.mark.parametrize("seed", range(8))
def test_the_backlog_is_that_of_generalised_processor_sharing(seed: int) -> None:
    """Beside a fluid model in fractions that serves everybody at once, piece by piece."""
    order, backlog, fluid = Random(seed), Backlog(), Fluid(rate=1000)
    servers = Servers(tokens_per_second=1000)
    now, weights = 0, {f"t{number}": order.randrange(1, 9) for number in range(5)}

    for _ in range(200):
        passed = order.choice([0, 1, 999, 50_000, 2_000_000])
        now += passed
        fluid.serve(Fraction(passed, _SECOND))
        tenant = order.choice(list(weights))
        counter = servers.ask(tenant, weight=weights[tenant])[0].counters[0]
        tokens = order.randrange(-300, 2000)
        backlog.add(counter, tenant, tokens, now)
        fluid.add(tenant, tokens, weights[tenant])

        assert pytest.approx(float(sum(fluid.held.values())), abs=1e-3) == backlog.total / _SECOND
        for name, held in fluid.held.items():
            finish, weight = backlog.parts.get(name, (backlog.virtual, 0))
            assert pytest.approx(float(held), abs=1e-3) == (finish - backlog.virtual) * weight / _SECOND


class Fluid:
    """Everybody with a backlog is served at once, by weight."""

    def __init__(self, rate: int) -> None:
        self.rate = rate
        self.held: dict[str, Fraction] = {}
        self.weights: dict[str, int] = {}

    def add(self, tenant: str, tokens: int, weight: int) -> None:
        self.weights[tenant] = weight
        self.held[tenant] = max(Fraction(0), self.held.get(tenant, Fraction(0)) + tokens)

    def serve(self, seconds: Fraction) -> None:
        while seconds > 0:
            waiting = {name: held for name, held in self.held.items() if held > 0}
            if not waiting:
                return
            weight = sum(self.weights[name] for name in waiting)
            first = min(held / self.weights[name] for name, held in waiting.items()) * weight / self.rate
            step = min(seconds, first)
            for name in waiting:
                self.held[name] -= step * self.rate * self.weights[name] / weight
            seconds -= step
