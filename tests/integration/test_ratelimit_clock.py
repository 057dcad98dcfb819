# SPDX-License-Identifier: Apache-2.0
"""The store's clock jumps; months end, also in leap years: what is counted stays right."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest

from ratelimit.adapters.counters import connect
from ratelimit.core.decide import LEASE_US, Outcome
from ratelimit.core.demand import Demand, Kind
from ratelimit.core.usage import Report
from tests.integration.stores import PATIENCE_SECONDS
from tests.integration.test_counters import set_clock, with_clock
from tests.integration.test_ratelimit_stores import OK, OVER, Desk, demand, header, own_store
from tests.ratelimit_model.machine import BEGIN_US

__all__ = ["own_store"]

_SECOND, _MINUTE, _HOUR = 1_000_000, 60_000_000, 3_600_000_000
_TENANTS = itertools.count()


class Clock:
    """Counters in a store whose clock is set by hand; requests of ten tokens of ten a minute."""

    def __init__(self, url: str) -> None:
        self.store = connect(url, cluster=False, timeout_seconds=PATIENCE_SECONDS)
        self.stored = with_clock(self.store)
        self.tenant = f"clock-{next(_TENANTS)}"

    def ask(self, now_us: int, *, kinds: tuple[Kind, ...] = (Kind.BUCKET,), amount: int = 10) -> tuple[Demand, Outcome]:
        set_clock(self.store, now_us)
        asked = demand(self.tenant, amount=amount, kinds=kinds)
        return asked, self.stored.take(asked, {})

    def admits(self, now_us: int, **of: int) -> bool:
        return self.ask(now_us, **of)[1].admitted  # type: ignore[arg-type]


@pytest.fixture
def clock(counter_store: str) -> Clock:
    return Clock(counter_store)


@pytest.mark.parametrize("back_us", [1, _SECOND, _HOUR, 400 * 24 * _HOUR])
def test_a_clock_that_jumps_back_makes_nobody_wait_longer_than_for_what_was_used(clock: Clock, back_us: int) -> None:
    """The bucket drains by what passes from then on; nothing is granted by the jump itself."""
    after = BEGIN_US - back_us

    admitted = [clock.admits(at) for at in (BEGIN_US, after, after + _MINUTE - 1, after + _MINUTE, after + _MINUTE + 1)]

    assert [True, False, False, True, False] == admitted


def test_what_is_told_to_wait_after_a_jump_back_is_right(clock: Clock) -> None:
    """To the microsecond, as ever."""
    clock.ask(BEGIN_US)

    _, refused = clock.ask(BEGIN_US - _HOUR)

    wait_us = refused.readings[0].wait_us
    assert _MINUTE == wait_us
    assert clock.admits(BEGIN_US - _HOUR + wait_us)


def test_a_clock_that_jumps_ahead_grants_one_burst_and_no_more(clock: Clock) -> None:
    """However far."""
    admitted = [clock.admits(at) for at in (BEGIN_US, BEGIN_US + 365 * 24 * _HOUR, BEGIN_US + 365 * 24 * _HOUR + 1)]

    assert [True, True, False] == admitted


def test_leases_neither_double_nor_vanish_when_the_clock_jumps_back(clock: Clock) -> None:
    """Two at once are two at once; the end of each gives back its slot."""
    slots = {"kinds": (Kind.LEASES,), "amount": 2}
    first, _ = clock.ask(BEGIN_US, **slots)  # type: ignore[arg-type]
    clock.ask(BEGIN_US - _HOUR, **slots)  # type: ignore[arg-type]
    third = clock.admits(BEGIN_US - _HOUR, **slots)  # type: ignore[arg-type]

    settled = clock.stored.settle(tenant_id=clock.tenant, request_id=first.request_id, report=Report(input=1, output=1))
    fourth = clock.admits(BEGIN_US - _HOUR, **slots)  # type: ignore[arg-type]

    assert (False, True, True) == (third, settled is not None, fourth)


def test_a_jump_ahead_within_a_lease_frees_no_slot(clock: Clock) -> None:
    """Only one beyond it does: then who is still under way is no longer counted."""
    slots = {"kinds": (Kind.LEASES,), "amount": 1}
    clock.ask(BEGIN_US, **slots)  # type: ignore[arg-type]

    assert not clock.admits(BEGIN_US + LEASE_US - 1, **slots)  # type: ignore[arg-type]
    assert clock.admits(BEGIN_US + LEASE_US, **slots)  # type: ignore[arg-type]


@pytest.fixture
def desk(postgres_url: str, own_store: str) -> Iterator[Desk]:
    """A servicer whose calendar is turned by hand."""
    made = Desk(postgres_url, own_store)
    yield made
    made.close()


@pytest.mark.parametrize(
    ("last", "first"),
    [
        (datetime(2028, 2, 29, 23, 59, 59, 999_999, tzinfo=UTC), datetime(2028, 3, 1, tzinfo=UTC)),
        (datetime(2027, 2, 28, 23, 59, 59, 999_999, tzinfo=UTC), datetime(2027, 3, 1, tzinfo=UTC)),
        (datetime(2026, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC), datetime(2027, 1, 1, tzinfo=UTC)),
    ],
    ids=["leap year", "February", "December"],
)
def test_a_request_is_charged_to_the_month_that_admitted_it(desk: Desk, last: datetime, first: datetime) -> None:
    """Also when it ends in the next one, which starts whole in its first microsecond."""
    desk.limit("tokens", "calendar_month", 30)
    desk.open()
    moment = last
    desk.servicer._clock = lambda: moment

    admitted, refused = desk.admit("one"), desk.admit("two")
    moment = first
    desk.settle("one", input="9", output="7")
    anew = desk.admit("three")
    moment = last
    before = desk.admit("four")

    # Ten of prompt and ten of output are held by each; sixteen were used.
    assert [(OK, "10"), (OVER, "10"), (OK, "10"), (OVER, "14")] == [
        (a.overall_code, header(a, "x-ratelimit-remaining-tokens")) for a in (admitted, refused, anew, before)
    ]


def test_a_summer_time_change_ends_no_day(desk: Desk) -> None:
    """A day is one of UTC, whatever the clock on the wall of whoever asks."""
    from zoneinfo import ZoneInfo  # noqa: PLC0415

    desk.limit("tokens", "calendar_day", 30)
    desk.open()
    # Berlin's clocks go from two to three; one hour before UTC's midnight they show the next day already.
    night = datetime(2027, 3, 27, 23, 30, tzinfo=UTC)
    desk.servicer._clock = lambda: night.astimezone(ZoneInfo("Europe/Berlin"))

    codes = []
    for number in range(4):
        codes.append(desk.admit(str(number)).overall_code)
        night += timedelta(hours=0.5 if number == 0 else 1)

    assert [OK, OK, OVER, OVER] == codes
