# SPDX-License-Identifier: Apache-2.0
"""K04: how many made-up credentials of one address are looked up, and whom that never touches."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from extauth.core.strangers import ADDRESSES_MAX, PER_MINUTE, Strangers

NOW = datetime(2026, 11, 26, 3, tzinfo=UTC)
HERE = "192.0.2.7"


def turn_away(strangers: Strangers, address: str, count: int, now: datetime = NOW) -> None:
    """Look up *count* that nobody knows."""
    for _ in range(count):
        assert strangers.refusal(address, now) is None
        strangers.turned_away(address, now)


def test_so_many_unknown_ones_at_once_and_then_the_time_of_the_next_is_told() -> None:
    """Twenty a minute are one in three seconds; whole seconds, upwards."""
    strangers = Strangers(per_minute=20)
    turn_away(strangers, HERE, 20)

    refusal = strangers.refusal(HERE, NOW)
    later = strangers.refusal(HERE, NOW + timedelta(seconds=2.9))

    assert refusal is not None
    assert later is not None
    assert (429, "too_many_unknown_credentials", 3, 1) == (refusal.status, refusal.code, refusal.retry_after, later.retry_after)
    assert strangers.refusal(HERE, NOW + timedelta(seconds=3)) is None
    turn_away(strangers, HERE, 1, NOW + timedelta(seconds=3))
    assert strangers.refusal(HERE, NOW + timedelta(seconds=3)) is not None


def test_only_what_turned_out_to_be_unknown_takes_a_turn() -> None:
    """An office whose thousand good keys are all looked up at once is refused none of them."""
    strangers = Strangers(per_minute=1)

    assert {None} == {strangers.refusal(HERE, NOW) for _ in range(1000)}
    assert 0 == len(strangers)


def test_those_who_were_looked_up_together_are_waited_for_by_the_next() -> None:
    """Four who all saw the last turn free: in the long run no more than the turns."""
    strangers = Strangers(per_minute=60)
    turn_away(strangers, HERE, 59)
    for _ in range(4):
        strangers.turned_away(HERE, NOW)

    assert strangers.refusal(HERE, NOW + timedelta(seconds=3)) is not None
    assert strangers.refusal(HERE, NOW + timedelta(seconds=4)) is None


def test_another_address_has_turns_of_its_own() -> None:
    """IPv4 by the address, also where it arrives on an IPv6 socket; IPv6 by the /64, of which one holder has all."""
    strangers = Strangers(per_minute=2)
    turn_away(strangers, HERE, 2)
    turn_away(strangers, "2001:db8:0:1::1", 1)
    turn_away(strangers, "2001:db8:0:1:ffff::2", 1)

    assert strangers.refusal(f"::ffff:{HERE}", NOW) is not None
    assert strangers.refusal("192.0.2.8", NOW) is None
    assert strangers.refusal("2001:db8:0:1:8000::3", NOW) is not None
    assert strangers.refusal("2001:db8:0:2::1", NOW) is None


def test_what_is_no_address_is_one_and_the_same() -> None:
    """Whoever could send from no address, or from many that are none, has one bucket."""
    strangers = Strangers(per_minute=2)
    turn_away(strangers, "", 1)
    turn_away(strangers, "run/a-socket", 1)

    assert strangers.refusal("anything", NOW) is not None


def test_addresses_are_bounded_and_the_one_longest_good_is_forgotten() -> None:
    """At the bound all are there; one more takes the place of the first."""
    strangers = Strangers(per_minute=1)
    for number in range(ADDRESSES_MAX):
        turn_away(strangers, f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}", 1)

    assert (ADDRESSES_MAX, False) == (len(strangers), strangers.refusal("10.0.0.0", NOW) is None)
    turn_away(strangers, HERE, 1)
    assert (ADDRESSES_MAX, True) == (len(strangers), strangers.refusal("10.0.0.0", NOW) is None)
    assert strangers.refusal("10.0.0.1", NOW) is not None


def test_without_a_number_nobody_is_refused_and_nothing_is_kept() -> None:
    """For those who cannot tell their callers' addresses apart."""
    strangers = Strangers(per_minute=0)

    turn_away(strangers, HERE, 2 * PER_MINUTE)

    assert 0 == len(strangers)
