# SPDX-License-Identifier: Apache-2.0
"""Where events may go, when they are tried again, and what sealed secrets open with."""

from __future__ import annotations

import ipaddress
import itertools
import os
from datetime import UTC, datetime, timedelta

import pytest

from chassis.errors import Invalid, Unavailable
from chassis.sealing import seal, unseal
from metering.core.retry import DELAY_MAX, GIVEN_UP_AFTER, Fate, Outcome, after_failure
from metering.core.targets import may_connect, target

NOON = datetime(2026, 11, 12, 12, tzinfo=UTC)

PUBLIC = ("93.184.215.14", "8.8.8.8", "2606:4700::6810:84e5", "2a00:1450:4001:82f::200e")
NOT_PUBLIC = (
    "0.0.0.0", "10.0.0.1", "100.64.0.1", "169.254.169.254", "172.16.0.1", "172.31.255.255", "192.168.1.1", "192.0.0.1",
    "192.0.2.1", "198.18.0.1", "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255", "::", "fe80::1",
    "fe80::1%1", "fc00::1", "fd00:ec2::254", "fec0::1", "ff02::1", "2001:db8::1", "100::1",
    # Other addresses in disguise.
    "::ffff:10.0.0.1", "::ffff:169.254.169.254", "::10.0.0.1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "2002:a9fe:a9fe::1",
    "2001:0:4136:e378:8000:63bf:3fff:fdd2",
)
LOOPBACK = ("127.0.0.1", "127.255.255.254", "::1", "::ffff:127.0.0.1")


@pytest.mark.parametrize("loopback_allowed", [True, False])
def test_events_go_to_public_addresses_only(loopback_allowed: bool) -> None:
    """Whatever else an address says it is."""
    connects = {
        text: may_connect(ipaddress.ip_address(text), scheme="https", loopback_allowed=loopback_allowed)
        for text in (*PUBLIC, *NOT_PUBLIC, *LOOPBACK)
    }

    assert set(PUBLIC) | (set(LOOPBACK) if loopback_allowed else set()) == {text for text, yes in connects.items() if yes}


def test_http_never_leaves_this_machine() -> None:
    """Not even to a public address."""
    assert [False] * 4 == [may_connect(ipaddress.ip_address(it), scheme="http", loopback_allowed=True) for it in PUBLIC]


def test_a_url_is_taken_apart_as_it_will_be_connected_to() -> None:
    """Scheme, host, port."""
    found = target("https://Example.com:8443/a?b", loopback_allowed=False)

    assert ("https", "example.com", 8443) == (found.scheme, found.host, found.port)
    for url in ("http://localhost:8/", "http://127.0.0.1:8/", "https://[::1]:8/"):
        assert 8 == target(url, loopback_allowed=True).port
        if url.startswith("http:"):
            with pytest.raises(Invalid):
                target(url, loopback_allowed=False)


@pytest.mark.parametrize("url", ["http://0x7f000001/", "http://2130706433/", "http://127.1/", "http://localhost.evil.example/", "http://[::ffff:127.0.0.1]:1x/"])
def test_http_to_a_name_that_only_looks_like_this_machine_is_refused(url: str) -> None:
    """Even where loopback is allowed."""
    with pytest.raises(Invalid):
        target(url, loopback_allowed=True)


def failures(count: int, *, chance: float) -> list[Fate]:
    """That many failures in a row, each at the moment of the attempt."""
    found: list[Fate] = []
    since, now = None, NOON
    for number in range(count):
        fate = after_failure(Outcome.TIMEOUT, failing_since=since, failure_count=number, now=now, chance=chance)
        found.append(fate)
        since, now = fate.failing_since, fate.next_attempt_at or now
    return found


@pytest.mark.parametrize("chance", [0.0, 0.5, 0.999999])
def test_delays_double_up_to_a_bound_and_end_after_days(chance: float) -> None:
    """Each between half and all of it."""
    fates = failures(2000, chance=chance)
    moments = [NOON, *(fate.next_attempt_at for fate in fates if fate.next_attempt_at is not None)]
    delays = [(after - before).total_seconds() for before, after in itertools.pairwise(moments)]

    whole = [min(2.0**n, DELAY_MAX.total_seconds()) for n in range(len(delays))]
    assert all(full / 2 <= delay <= full for full, delay in zip(whole, delays, strict=True))
    assert GIVEN_UP_AFTER <= moments[-1] - NOON <= GIVEN_UP_AFTER + DELAY_MAX
    assert fates[-1].next_attempt_at is None


def test_a_receiver_may_ask_for_more_time_but_not_for_ever() -> None:
    """Retry-After, up to the bound of the delays."""

    def waits(asked: timedelta) -> timedelta:
        fate = after_failure(Outcome.REFUSED, failing_since=None, failure_count=0, now=NOON, chance=0.0, asked_to_wait=asked)
        assert fate.next_attempt_at is not None
        return fate.next_attempt_at - NOON

    assert [timedelta(seconds=0.5), timedelta(seconds=60), DELAY_MAX] == [
        waits(timedelta(0)), waits(timedelta(seconds=60)), waits(timedelta(days=9)),
    ]


def test_gone_is_gone() -> None:
    """No second attempt."""
    assert after_failure(Outcome.GONE, failing_since=None, failure_count=0, now=NOON, chance=0.5).next_attempt_at is None


def test_a_sealed_secret_opens_for_its_owner_with_its_pepper_only() -> None:
    """Later peppers do not matter; another owner, another pepper or a flipped bit do."""
    peppers = {1: os.urandom(32)}
    sealed = seal(peppers, "whsec_x", owner="wh_a", random_bytes=os.urandom)

    assert "whsec_x" == unseal(peppers | {2: os.urandom(32)}, sealed, owner="wh_a")
    assert b"whsec_x" not in sealed and sealed != seal(peppers, "whsec_x", owner="wh_a", random_bytes=os.urandom)
    for keys, box, owner in (
        (peppers, sealed, "wh_b"), ({1: os.urandom(32)}, sealed, "wh_a"), ({2: peppers[1]}, sealed, "wh_a"),
        (peppers, sealed[:-1] + bytes([sealed[-1] ^ 1]), "wh_a"), (peppers, sealed[:4], "wh_a"), (peppers, b"", "wh_a"),
    ):
        with pytest.raises(Unavailable):
            unseal(keys, box, owner=owner)
