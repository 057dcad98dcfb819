# SPDX-License-Identifier: Apache-2.0
"""
Leases among up to thousands of Envoy workers, in virtual time: one tenant, its buckets, callers at random.

Each worker is `envoy/lua/lane.lua` itself, in LuaJIT; what is asked and lent is ratelimit's own core. Only the
counters are a copy: `Lender` is `admit.lua` for buckets, and a test holds it to the script on a real store. The judge
is a bucket of each kind that knows what really passed, when, and what it turned out to use.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from random import Random
from typing import Any, Final

from ratelimit.core import bucket
from ratelimit.core.decide import Level, Memory, Outcome, outcome, settle, take
from ratelimit.core.demand import Counter, Demand, demand
from ratelimit.core.estimate import Estimates
from ratelimit.core.lease import LENGTH_US, Lease, offer, wish
from ratelimit.core.limits import Ask, Limit, Period, Unit
from ratelimit.core.usage import Report
from tests.conformance.road import module, runtime

#: What extauth lets a worker remember.
REMEMBERED_MS: Final = 5000
#: From the request to ratelimit's decision.
_ASK_US: Final = 1000
_BEGIN_US: Final = 1_898_553_600_000_000
_OUTPUT_CAP: Final = 16_384
_MINUTE_US: Final = 60_000_000
#: What workers hold is added up once in so many questions.
_LOOKED_AT: Final = 20
#: A smaller part of what was wished for is of no use (`LEAST` of admit.lua).
_LEAST: Final = 2
#: Tokens of a request on average, by `_requests`: what makes both limits about as near.
TOKENS_MEAN: Final = 580
RUSH: Final = 50
_TENANT: Final = "t"
_KEY: Final = b"openai.chat\nm\nBearer k"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A tenant's limits, how much of them is offered, by how many workers."""

    workers: int
    per_minute: int
    #: Requests offered, as a multiple of the limit.
    load: float
    #: Part of each bucket that is used when it begins.
    used: float
    #: From ratelimit's decision to the first byte of the answer, when a lease reaches the worker.
    first_byte_us: int = 200_000
    requests: int
    #: So many more come at its end, `RUSH` times as fast as the limit.
    rush: int = 0
    #: Tokens a minute for each request a minute; 0: tokens are not limited.
    tokens_each: int = TOKENS_MEAN
    seed: int = 1


@dataclass(slots=True)
class Seen:
    """How it went."""

    offered: int = 0
    passed: int = 0
    #: Times that ratelimit was asked to admit.
    asked: int = 0
    #: The same two without what came before workers had anything to remember.
    offered_warm: int = 0
    asked_warm: int = 0
    #: Most that the judge's buckets ever were above their size, in hits; not above 0 unless there is overshoot.
    over: dict[Unit, float] = field(default_factory=dict)
    #: Most that the token bucket was above its size and the published bound: what was under way, or over and
    #: not told yet, used beyond what it was charged.
    over_bound: float = float("-inf")
    #: Most of the request bucket that workers held unspent, and most that was left by the judge when somebody was refused.
    unspent_max: float = 0.0
    left_at_refusal_max: float = 0.0

    @property
    def asked_each(self) -> float:
        """Questions to ratelimit per request, once workers remember."""
        return self.asked_warm / self.offered_warm


class Lender:
    """`admit.lua` and `settle.lua` in memory for buckets, leases included; the arithmetic is that of `decide`."""

    def __init__(self) -> None:
        self.memory = Memory()
        #: By counter: lease id to its hits and its end. All are as long, so they end in the order that they came.
        self._leases: dict[str, dict[str, tuple[int, int]]] = {}
        self._lent: dict[str, int] = {}

    def take(self, asked: Demand, now_us: int, *, lease: Lease | None = None, back: Lease | None = None) -> Outcome:
        """Take *asked* or nothing; give back *back* whatever the verdict; lend of *lease* what leaves half of each bucket."""
        for counter in asked.counters:
            self._end(counter, now_us)
            if back is not None:
                self._give_back(counter, back, now_us)
        # What is lent does not drain and is nobody else's: a bucket that is so much smaller.
        smaller = tuple(dataclasses.replace(c, burst=c.burst - self._lent.get(c.name, 0)) for c in asked.counters)
        taken = take(self.memory, dataclasses.replace(asked, counters=smaller), now_us)
        lent = self._lendable(asked, lease, now_us) if taken.admitted and lease is not None else 0
        if lent and lease is not None:
            for counter in asked.counters:
                hits = _hits(counter, lease.of(lent))
                self._leases.setdefault(counter.name, {})[lease.lease_id] = hits, now_us + LENGTH_US
                self._lent[counter.name] = self._lent.get(counter.name, 0) + hits
        levels = [self.debt(counter, now_us) for counter in asked.counters]
        return outcome(
            asked, taken.verdict, levels, now_us, output=taken.output, waits=[0.0] * len(levels), over=taken.over,
            lent=lent,
        )

    def settle(self, request_id: str, report: Report, now_us: int) -> None:
        """Charge what a request used in place of what it was asked for."""
        reservation = self.memory.reservations.get(request_id)
        for counter in reservation.demand.counters if reservation else ():
            self._end(counter, now_us)
        settle(self.memory, request_id, report, now_us)

    def debt(self, counter: Counter, now_us: int) -> float:
        """What is used and lent, in hits × microseconds."""
        return self._level(counter).value(counter, now_us) + self._lent.get(counter.name, 0) * counter.period_us

    def _level(self, counter: Counter) -> Level:
        return self.memory.levels.setdefault(counter.name, Level())

    def _end(self, counter: Counter, now_us: int) -> None:
        leases, level = self._leases.get(counter.name, {}), self._level(counter)
        for lease_id, (hits, ends) in list(leases.items()):
            if ends > now_us:
                break
            level.debt = bucket.drained(counter, debt=level.debt, at_us=level.at_us, now_us=ends) + hits * counter.period_us
            level.at_us = max(level.at_us, ends)
            self._forget(counter, lease_id)

    def _give_back(self, counter: Counter, back: Lease, now_us: int) -> None:
        held = self._leases.get(counter.name, {}).get(back.lease_id)
        if held is None:
            return
        level, hits = self._level(counter), held[0]
        self._forget(counter, back.lease_id)
        spent = (hits - min(_hits(counter, back), hits)) * counter.period_us
        level.debt, level.at_us = level.value(counter, now_us) + spent, now_us

    def _forget(self, counter: Counter, lease_id: str) -> None:
        hits, _ = self._leases[counter.name].pop(lease_id)
        self._lent[counter.name] -= hits

    def _lendable(self, asked: Demand, lease: Lease, now_us: int) -> int:
        part = lease.of(1)
        rooms = (
            math.floor((counter.burst * counter.period_us / 2 - self.debt(counter, now_us)) / max(_hits(counter, part) * counter.period_us, 1))
            for counter in asked.counters
        )
        requests = max(0, min(lease.requests, *rooms))
        return 0 if requests < min(lease.requests, _LEAST) else requests


@dataclass(frozen=True, slots=True)
class _Request:
    number: int
    at_us: int
    worker: int
    prompt_bytes: int
    named_max: int
    input: int
    output: int
    lasts_us: int

    @property
    def name(self) -> str:
        return f"{self.number:08x}-0000-4000-8000-000000000000"

    @property
    def tokens(self) -> int:
        return self.input + self.output


class _Judge:
    """One bucket that is charged what a request really uses, in the moment in which it passes."""

    def __init__(self, limit: Limit, used: float) -> None:
        self.amount = limit.amount
        self._debt, self._at_us = used * limit.amount * _MINUTE_US, _BEGIN_US

    def left(self, now_us: int) -> float:
        """Hits; below 0 if it is over."""
        self._debt, self._at_us = max(0.0, self._debt - (now_us - self._at_us) * self.amount), now_us
        return self.amount - self._debt / _MINUTE_US

    def charge(self, hits: int, now_us: int) -> float:
        """Charge *hits*; by how many it is over then."""
        left = self.left(now_us)
        self._debt += hits * _MINUTE_US
        return hits - left


class _Run:
    """One scenario under way."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario, self.seen = scenario, Seen()
        self._lane = module("lane")
        self._workers = [self._lane[b"new"]() for _ in range(scenario.workers)]
        self._facts = runtime().table()
        self._identity = runtime().table_from({b"tenant": b"t", b"project": b"p", b"key_id": b"k"})
        self._limits = [Limit(limit_id=1, tenant_id=_TENANT, unit=Unit.REQUESTS, period=Period.MINUTE, amount=scenario.per_minute)]
        if scenario.tokens_each:
            amount = scenario.per_minute * scenario.tokens_each
            self._limits.append(Limit(limit_id=2, tenant_id=_TENANT, unit=Unit.TOKENS, period=Period.MINUTE, amount=amount))
        self._lender, self._estimates = Lender(), Estimates()
        self._judges = {limit.unit: _Judge(limit, scenario.used) for limit in self._limits}
        for limit in self._limits:
            level = Level(debt=scenario.used * limit.amount * _MINUTE_US, at_us=_BEGIN_US)
            self._lender.memory.levels[f"peaje:{{{_TENANT}}}:{limit.limit_id}"] = level
        self._later: list[tuple[int, int, Any]] = []
        #: Used beyond what was charged, by what is under way; and by what is over and not told, by the lease that it is charged to.
        self._excess = 0
        self._untold: dict[bytes, int] = {}
        self._order = 0

    def play(self) -> Seen:
        for request in _requests(self.scenario):
            self._until(request.at_us)
            self._arrive(request)
        self._until(1 << 62)
        return self.seen

    def _at(self, at_us: int, what: Any) -> None:
        self._order += 1
        heapq.heappush(self._later, (at_us, self._order, what))

    def _until(self, until_us: int) -> None:
        while self._later and self._later[0][0] <= until_us:
            at_us, _, what = heapq.heappop(self._later)
            what(at_us)

    def _arrive(self, request: _Request) -> None:
        self.seen.offered += 1
        is_warm = request.at_us - _BEGIN_US > REMEMBERED_MS * 1000
        self.seen.offered_warm += is_warm
        state, facts = self._workers[request.worker], self._facts
        facts[b"prompt_bytes"], facts[b"output_tokens_max"], facts[b"choices"] = request.prompt_bytes, request.named_max, 1
        now_ms = request.at_us // 1000
        entry, charged, said = (*self._lane[b"take"](state, _KEY, request.name.encode(), facts, now_ms), None)[:3]
        if charged is None:
            known = entry is not None
            self.seen.asked_warm += is_warm
            if b" " in said:
                self._excess -= self._untold.pop(said.split()[1], 0)
            self._at(request.at_us + _ASK_US, lambda at_us: self._ask(request, said.decode(), known=known, now_us=at_us))
            return
        self._passes(request, int(charged), request.at_us)
        self._at(request.at_us + request.lasts_us, lambda _: self._settle_here(request, int(charged)))

    def _ask(self, request: _Request, said: str, *, known: bool, now_us: int) -> None:
        self.seen.asked += 1
        ask = Ask(
            request_id=request.name, tenant_id=_TENANT, project_id="p", key_id="k", model="m", dialect="openai.chat",
            prompt_bytes=request.prompt_bytes, output_tokens_max=request.named_max, choices=1,
        )  # fmt: skip
        asked = demand(
            ask, self._limits, estimates=self._estimates, price=None, output_cap=_OUTPUT_CAP,
            now=datetime.fromtimestamp(now_us / 1e6, tz=UTC),
        )  # fmt: skip
        wished = wish(said)
        lease = offer(asked, wished, now_us=now_us)
        answer = self._lender.take(asked, now_us, lease=lease, back=wished.back)
        given = lease.of(answer.lent) if lease is not None and answer.leased else None
        if answer.admitted:
            self._passes(request, asked.lean.input + asked.lean.output, now_us)
            charged = asked.lean.input + asked.lean.output
            self._at(request.at_us + request.lasts_us, lambda at_us: self._settle_there(request, asked, charged, at_us))
        else:
            self.seen.left_at_refusal_max = max(self.seen.left_at_refusal_max, self._left(now_us))
        if self.seen.asked % _LOOKED_AT == 0:
            self._look(now_us)
        first_byte_us = self.scenario.first_byte_us if answer.admitted else 0
        self._at(now_us + first_byte_us, lambda _: self._answered(request, asked, given, known=known, admitted=answer.admitted))

    def _answered(self, request: _Request, asked: Demand, given: Lease | None, *, known: bool, admitted: bool) -> None:
        """As `express.remember` does when the answer begins."""
        state, lease = self._workers[request.worker], None
        if given is not None:
            tokens = given.tokens if self.scenario.tokens_each else None
            lease = self._lane[b"lease"](
                request.name.encode(), given.requests, tokens, asked.lean.input, asked.lean.output, request.prompt_bytes, request.at_us // 1000
            )
        asked_ms = request.at_us // 1000
        if known:
            self._lane[b"lent"](state, _KEY, request.name.encode(), lease)
        elif admitted:
            until_ms = asked_ms + REMEMBERED_MS
            self._lane[b"remember"](state, _KEY, self._identity, None, lease, until_ms, 0, asked_ms, request.name.encode())

    def _passes(self, request: _Request, charged: int, now_us: int) -> None:
        self.seen.passed += 1
        self._excess += max(0, request.tokens - charged)
        for unit, judge in self._judges.items():
            over = judge.charge(1 if unit is Unit.REQUESTS else request.tokens, now_us)
            self.seen.over[unit] = max(self.seen.over.get(unit, over), over)
            if unit is Unit.TOKENS:
                self.seen.over_bound = max(self.seen.over_bound, over - self._excess)

    def _settle_here(self, request: _Request, charged: int) -> None:
        state = self._workers[request.worker]
        entry = self._entry(state)
        lease = entry[b"lease"] if entry is not None else None
        holder = lease[b"id"] if lease is not None else b""
        self._untold[holder] = self._untold.get(holder, 0) + max(0, request.tokens - charged)
        self._lane[b"settle"](state, _KEY, charged, request.tokens)

    def _settle_there(self, request: _Request, asked: Demand, charged: int, now_us: int) -> None:
        self._excess -= max(0, request.tokens - charged)
        self._lender.settle(asked.request_id, Report(input=request.input, output=request.output), now_us)
        self._estimates.learn(
            tenant_id=_TENANT, model="m", prompt_bytes=request.prompt_bytes, input_tokens=request.input,
            output_tokens=request.output,
        )  # fmt: skip

    @staticmethod
    def _entry(state: Any) -> Any:
        """What a worker remembers of the caller; None if it does not know it."""
        return state[b"newer"][_KEY] or state[b"older"][_KEY]

    def _left(self, now_us: int) -> float:
        """Part of the buckets that is left by the judge: of the one that has the least."""
        return max(0.0, min(judge.left(now_us) / judge.amount for judge in self._judges.values()))

    def _look(self, now_us: int) -> None:
        unspent = 0
        for entry in filter(None, map(self._entry, self._workers)):
            leases = (entry[b"lease"], entry[b"ahead"]) if now_us // 1000 < entry[b"expires_ms"] else ()
            unspent += sum(it[b"requests"] for it in leases if it is not None and now_us // 1000 < it[b"until_ms"])
        self.seen.unspent_max = max(self.seen.unspent_max, unspent / self.scenario.per_minute)


def play(scenario: Scenario) -> Seen:
    """Play it; the same each time."""
    return _Run(scenario).play()


def _hits(counter: Counter, lease: Lease) -> int:
    return lease.requests if counter.unit is Unit.REQUESTS else lease.tokens


def _requests(scenario: Scenario) -> Iterator[_Request]:
    """Independent callers on independent workers; half name no maximum, a tenth of the answers is far longer than usual."""
    chance, now = Random(scenario.seed), float(_BEGIN_US)
    for number in range(scenario.requests + scenario.rush):
        load = scenario.load if number < scenario.requests else RUSH
        now += chance.expovariate(load * scenario.per_minute / _MINUTE_US)
        output = int(chance.lognormvariate(5.0, 0.4)) * (10 if chance.random() < 0.1 else 1)
        input_ = chance.randrange(50, 500)
        yield _Request(
            number=number, at_us=int(now), worker=chance.randrange(scenario.workers), prompt_bytes=int(input_ * chance.uniform(3.8, 4.4)),
            named_max=chance.choice([0, 4 * output]), input=input_, output=min(output, _OUTPUT_CAP),
            lasts_us=scenario.first_byte_us + output * 10_000,
        )  # fmt: skip


#: How far from the limit, as (said, load, part of the bucket that is used, requests that are played).
DISTANCES: Final = (
    ("a tenth of the limit", 0.1, 0.0, 300),
    ("half of it", 0.5, 0.0, 1500),
    ("all of it, the bucket hardly used", 1.0, 0.0, 3000),
    ("all of it, the bucket 45 % used", 1.0, 0.45, 3000),
    ("all of it, the bucket 60 % used: nothing is lent", 1.0, 0.6, 1500),
    ("twice the limit, the bucket used up", 2.0, 1.0, 3000),
)
WORKERS: Final = (1, 10, 100, 1000)
#: Requests a minute of the tenant in the table: 200 a second, for up to 15 seconds.
PER_MINUTE: Final = 12_000


def asked_table() -> str:
    """Questions per request by distance from the limit and number of workers, in Markdown."""
    lines = ["| offered | " + " | ".join(f"{count:,} worker{'s' * (count > 1)}" for count in WORKERS) + " |", "|---|" + "---|" * len(WORKERS)]
    return "\n".join([*lines, *map(asked_row, range(len(DISTANCES)))])


def asked_row(number: int) -> str:
    """The line of `asked_table` for that one of `DISTANCES`."""
    said, load, used, requests = DISTANCES[number]
    seen = [
        play(Scenario(workers=count, per_minute=PER_MINUTE, load=load, used=used, requests=requests)) for count in WORKERS
    ]
    return f"| {said} | " + " | ".join(f"{one.asked_each:.2f}" for one in seen) + " |"


def rush(*, workers: int, seed: int, tokens_each: int = 0, first_byte_us: int = 200_000) -> Scenario:
    """A tenant at its limit of 3,000 a minute, with leases out, who then sends fifty times as much until it is refused."""
    return Scenario(
        workers=workers, per_minute=3000, load=1.0, used=0.0, requests=750, rush=1500 if tokens_each else 3500,
        tokens_each=tokens_each, first_byte_us=first_byte_us, seed=seed,
    )  # fmt: skip


def rush_table() -> str:
    """What a rush into a limit overshoots and what it leaves unused, in Markdown."""
    lines = [
        "| workers | requests over the limit | tokens over the limit, and over it and the bound | requests that workers held unspent "
        "| left when somebody was refused |",
        "|---|---|---|---|---|",
    ]
    for count in WORKERS:
        plain, limited = play(rush(workers=count, seed=1)), play(rush(workers=count, seed=1, tokens_each=300))
        lines.append(
            f"| {count:,} | {max(0, plain.over[Unit.REQUESTS]):.0f} | {max(0, limited.over[Unit.TOKENS]):,.0f}, {max(0, limited.over_bound):.0f} "
            f"| {plain.unspent_max:.0%} | {plain.left_at_refusal_max:.0%} |"
        )
    return "\n".join(lines)
