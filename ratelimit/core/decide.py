# SPDX-License-Identifier: Apache-2.0
"""
Take all that a request asks or nothing; replace what it reserved by what it used, once.

This is the whole of the limiter, in memory: it decides while the counter store is away, and it
is what `counters.lua` must agree with (tests run both, and a third one written naively, side by
side). Times are microseconds of one clock, whichever that is.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from ratelimit.core import bucket
from ratelimit.core.demand import Counter, Demand, Kind
from ratelimit.core.fairshare import Backlog, Slots, Standing
from ratelimit.core.limits import Effect, Unit
from ratelimit.core.reading import Reading, read
from ratelimit.core.usage import Report, Usage, hits, holds

#: An unsettled reservation is given back after this. Longer than streams live (Envoy ends a silent
#: one after 600 s, a busy one has ended by then); what is known to be over is settled far earlier.
LEASE_US: Final = 3_600_000_000
#: How long the store remembers that a request was settled, so that a second settle changes nothing.
DONE_US: Final = 600_000_000


class Verdict(Enum):
    """How a demand was met."""

    REFUSED = 0
    FULL = 1
    LEAN = 2


@dataclass(slots=True)
class Level:
    """What is remembered of one counter; each kind uses its own part."""

    debt: float = 0.0
    at_us: int = 0
    used: int = 0
    #: Request id to (hits, when the lease ends).
    held: dict[str, tuple[int, int]] = field(default_factory=dict)
    slots: Slots = field(default_factory=Slots)
    backlog: Backlog = field(default_factory=Backlog)

    def standing(self, counter: Counter, tenant_id: str, now_us: int) -> Standing:
        """The level as `read` takes it, and for how long a pool has no room."""
        if counter.kind is Kind.SLOTS:
            return self.slots.standing(counter, tenant_id, now_us)
        if counter.kind is Kind.BACKLOG:
            return self.backlog.standing(counter, tenant_id, now_us)
        return Standing(level=self.value(counter, now_us), wait_us=0.0)

    def value(self, counter: Counter, now_us: int) -> float:
        """The level of what is one tenant's alone."""
        if counter.kind is Kind.BUCKET:
            # After a clock went back the debt counts from what it shows now: waiting for it to
            # catch up would lock everybody out for as long as it jumped.
            self.at_us = min(self.at_us, now_us)
            return bucket.drained(counter, debt=self.debt, at_us=self.at_us, now_us=now_us)
        for request_id in [name for name, (_, ends) in self.held.items() if ends <= now_us]:
            del self.held[request_id]
        if counter.kind is Kind.LEASES:
            return len(self.held)
        return self.used + self.reserved(counter)

    def reserved(self, counter: Counter) -> int:
        """What of a quota's value is held and not used: it may come back before the quota starts anew."""
        return sum(hits_ for hits_, _ in self.held.values()) if counter.kind is Kind.QUOTA else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """What a request was given, to be settled."""

    demand: Demand
    verdict: Verdict
    #: Tokens that are held of the lean ask: of the prompt, and of all choices' output together.
    input: int
    output: int
    #: Names of the counters that were really taken from (a shadow limit without room was not).
    taken: frozenset[str]
    ends_us: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Renewal:
    """What a stream under way asks to go on being held."""

    #: None while nobody knows: the estimate it was admitted with then stands.
    input: int | None
    #: Tokens that are delivered, of all choices together, if this is granted.
    output: int
    #: How many beyond them.
    more: int


@dataclass(slots=True)
class Memory:
    """Levels by counter name, reservations by request id (None: settled)."""

    levels: MutableMapping[str, Level] = field(default_factory=dict)
    reservations: MutableMapping[str, Reservation | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The verdict, and what each counter says after it."""

    verdict: Verdict
    readings: tuple[Reading, ...]
    #: Output tokens that are held for the request, of all its choices together.
    output: int = 0
    #: Names of counters that had no room but do not refuse.
    over: frozenset[str] = frozenset()
    #: Whether the lease that was asked for was taken as well.
    leased: bool = False

    @property
    def admitted(self) -> bool:
        """Whether the request passes."""
        return self.verdict is not Verdict.REFUSED


def take(memory: Memory, demand: Demand, now_us: int) -> Outcome:
    """Take from all counters of *demand* or from none; asked again for the same request, it takes nothing more."""
    levels = [memory.levels.get(counter.name) or Level() for counter in demand.counters]
    standings = [
        level.standing(counter, demand.tenant_id, now_us) for level, counter in zip(levels, demand.counters, strict=True)
    ]
    values, waits = [standing.level for standing in standings], [standing.wait_us for standing in standings]
    known = _reservation(memory, demand.request_id, now_us)
    if known is not None:
        return outcome(demand, known.verdict, values, now_us, output=known.output, waits=waits)
    verdict, output = _judge(demand, values)
    if verdict is Verdict.REFUSED:
        held = [level.reserved(counter) for level, counter in zip(levels, demand.counters, strict=True)]
        return outcome(demand, verdict, values, now_us, held=held, waits=waits)
    taken, over = set(), set()
    for index, (counter, level) in enumerate(zip(demand.counters, levels, strict=True)):
        wanted = asked(demand, counter, verdict, output)
        if not has_room(counter, values[index], wanted):
            over.add(counter.name)
            if counter.effect is Effect.SHADOW:
                continue
        taken.add(counter.name)
        memory.levels[counter.name] = level
        if counter.kind is Kind.SLOTS:
            level.slots.take(counter, demand.tenant_id, demand.request_id, now_us + LEASE_US)
            continue
        if counter.kind is Kind.BACKLOG:
            level.backlog.add(counter, demand.tenant_id, wanted, now_us)
            continue
        values[index] += wanted * counter.period_us if counter.kind is Kind.BUCKET else wanted
        if counter.kind is Kind.BUCKET:
            level.debt, level.at_us = values[index], now_us
        else:
            level.held[demand.request_id] = (wanted, now_us + LEASE_US)
    if demand.settles:
        memory.reservations[demand.request_id] = Reservation(
            demand=demand, verdict=verdict, input=demand.lean.input, output=output, taken=frozenset(taken),
            ends_us=now_us + LEASE_US,
        )  # fmt: skip
    return outcome(demand, verdict, values, now_us, output=output, waits=waits, over=frozenset(over))


def renew(memory: Memory, request_id: str, renewal: Renewal, now_us: int) -> int:
    """
    Hold what *renewal* asks of each hard counter, or as much beyond what is delivered as is left.

    Answers the output tokens held then. Fewer than *renewal* delivers: what is left does not pay them,
    and nothing has changed. 0: there is no reservation (any more).
    """
    reservation = _reservation(memory, request_id, now_us)
    if reservation is None:
        return 0
    demand = reservation.demand
    if reservation.verdict is Verdict.FULL:
        return demand.full.output
    input_ = reservation.input if renewal.input is None else renewal.input
    others: list[tuple[Counter, Level, float]] = []
    for counter in demand.counters:
        if counter.is_hard and counter.name in reservation.taken:
            level = memory.levels.get(counter.name) or Level()
            value = level.value(counter, now_us)
            others.append((counter, level, value - level.held.get(request_id, (0, 0))[0]))

    def asks(counter: Counter, output: int) -> int:
        return holds(counter.unit, Usage(input=input_, output=output, quantity=demand.lean.quantity), counter.price)

    # The model server is held to the full ask, so nothing beyond it can come.
    candidates = range(renewal.output, max(renewal.output, min(renewal.output + renewal.more, demand.full.output)) + 1)
    fitting = bisect_left(
        candidates, x=True, key=lambda output: any(value + asks(c, output) > c.amount for c, _, value in others)
    )
    if not fitting:
        return reservation.output
    granted = candidates[fitting - 1]
    for counter, level, _ in others:
        level.held[request_id] = (asks(counter, granted), now_us + LEASE_US)
        memory.levels[counter.name] = level
    memory.reservations[request_id] = dataclasses.replace(
        reservation, input=input_, output=granted, ends_us=now_us + LEASE_US
    )
    return granted


def settle(memory: Memory, request_id: str, report: Report, now_us: int) -> bool:
    """
    Charge what *report* says in place of what was reserved; False if there is nothing (any more) to settle.

    A refund never takes a bucket below empty: what has drained meanwhile was not held any more.
    What exceeds the reservation becomes a debt.
    """
    reservation = _reservation(memory, request_id, now_us)
    if reservation is None:
        return False
    memory.reservations[request_id] = None
    actual = report.usage(reservation.demand.lean)
    for counter in reservation.demand.counters:
        level = memory.levels.get(counter.name)
        if counter.name not in reservation.taken or level is None:
            continue
        used = hits(counter.unit, actual, counter.price) if report.happened else 0
        if counter.kind is Kind.SLOTS:
            level.slots.leave(request_id)
        elif counter.kind is Kind.BACKLOG:
            excess = used - counter.lean
            level.backlog.add(counter, reservation.demand.tenant_id, excess, now_us)
        elif counter.kind is Kind.BUCKET:
            if counter.unit is not Unit.REQUESTS:
                excess = used - counter.lean
                debt = bucket.drained(counter, debt=level.debt, at_us=level.at_us, now_us=now_us)
                level.debt, level.at_us = max(0.0, debt + excess * counter.period_us), now_us
        else:
            level.held.pop(request_id, None)
            level.used += used if counter.kind is Kind.QUOTA else 0
    return True


def asked(demand: Demand, counter: Counter, verdict: Verdict, output: int) -> int:
    """Hits that *counter* is asked for under *verdict*, with *output* tokens granted if that is lean."""
    if verdict is Verdict.FULL:
        return counter.full
    if not counter.is_hard:
        return counter.lean
    return holds(counter.unit, dataclasses.replace(demand.lean, output=output), counter.price)


def has_room(counter: Counter, value: float, wanted: int) -> bool:
    """Whether *wanted* more hits fit at level *value*."""
    if counter.kind is Kind.BUCKET:
        return bucket.fits(counter, debt=value, hits=wanted)
    if counter.kind is Kind.BACKLOG:
        # Any size passes below the share; what it is too much delays the next.
        return bucket.fits(counter, debt=value, hits=1)
    return value + wanted <= counter.amount


def outcome(
    demand: Demand,
    verdict: Verdict,
    values: Sequence[float],
    now_us: int,
    *,
    held: Sequence[int] = (),
    output: int = 0,
    waits: Sequence[float],
    over: frozenset[str] = frozenset(),
    leased: bool = False,
) -> Outcome:
    """
    The outcome with the readings at *values*; to one that was refused, they say how long to wait for the least.

    *held* is the part of each value that others hold and have not used; nothing unless said.
    """
    refused = verdict is Verdict.REFUSED
    readings = []
    for counter, value, part, wait in zip(demand.counters, values, held or [0] * len(values), waits, strict=True):
        least = asked(demand, counter, Verdict.LEAN, demand.output_least) if refused else 0
        readings.append(read(counter, value, held=part, hits=least, now_us=now_us, wait_us=wait))
    return Outcome(verdict=verdict, readings=tuple(readings), output=output, over=over, leased=leased)


def seeded(memory: Memory, used: Mapping[str, int]) -> None:
    """Give quotas that nothing is known of what the ledger says was used; known ones stay."""
    for name, amount in used.items():
        memory.levels.setdefault(name, Level(used=amount))


def _reservation(memory: Memory, request_id: str, now_us: int) -> Reservation | None:
    found = memory.reservations.get(request_id)
    return found if found is not None and now_us < found.ends_us else None


def _judge(demand: Demand, values: Sequence[float]) -> tuple[Verdict, int]:
    """The verdict, and the output tokens it grants: the most that fit, from the usual down to the least."""

    def fits(verdict: Verdict, output: int) -> bool:
        times = demand.room_for if verdict is Verdict.FULL else 1
        return all(
            counter.effect is not Effect.REFUSE
            or has_room(counter, value, asked(demand, counter, verdict, output) * (times if counter.is_hard else 1))
            for counter, value in zip(demand.counters, values, strict=True)
        )

    if fits(Verdict.FULL, demand.full.output):
        return Verdict.FULL, demand.full.output
    candidates = range(demand.output_least, demand.lean.output + 1)
    fitting = bisect_left(candidates, x=True, key=lambda output: not fits(Verdict.LEAN, output))
    return (Verdict.LEAN, candidates[fitting - 1]) if fitting else (Verdict.REFUSED, 0)
