# SPDX-License-Identifier: Apache-2.0
"""Whoever is shut out is out: in every process of extauth and every worker of Envoy, whatever is lost on the way."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from bench.revocation import BOUND_SECONDS, CHANGES, LOOKED_ON_SECONDS, shut_out, table
from tests.dataplane.installation import Installation

KEYS = 15
#: The written bound while Valkey is down and no change is pushed.
BOUND_WITHOUT_PUSH_SECONDS = 30.0


@contextmanager
def frozen(fleet: Installation) -> Iterator[None]:
    """Valkey, and the server's end of every connection that hears of changes: all open, none says anything."""
    listeners = fleet.sql("select pid, application_name from pg_stat_activity where application_name like '%%-listen'")
    # Two of extauth, three of ratelimit, one of the beacon.
    assert 6 == len(listeners)
    pids = [fleet.pid("valkey"), *(int(row["pid"]) for row in listeners)]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


@pytest.mark.express("on")
def test_nobody_who_is_shut_out_passes_after_the_bound(
    fleet: Installation, record_property: Callable[[str, object], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """Keys revoked and disabled, tenants suspended, while all of them are used on two workers that remember them."""
    tenants = [fleet.new_tenant(f"out-{number}") for number in range(KEYS)]
    before = fleet.asked_extauth()

    callers = asyncio.run(shut_out(fleet, tenants))

    asked, uses = fleet.asked_extauth() - before, [use for caller in callers for use in caller.uses]
    text = table(callers, asked=asked)
    record_property("revocation", text)
    with capsys.disabled():
        print(f"\n{text}")
    assert [] == [caller.passed_after_seconds for caller in callers if caller.passed_after_seconds > BOUND_SECONDS]
    # Every caller was in the lane: more passed than was asked about, though every refusal was asked for.
    assert asked < len(uses)
    assert sum(not passed for _, passed in uses) > KEYS


def test_with_valkey_away_and_every_listener_deaf_the_longer_bound_holds(fleet: Installation) -> None:
    """What is remembered ends by its own time; nobody needs to be told."""
    tenants = [fleet.new_tenant(f"unheard-{number}") for number in range(len(CHANGES))]

    with frozen(fleet):
        callers = asyncio.run(shut_out(fleet, tenants, looked_on=LOOKED_ON_SECONDS + 2))

    late = [caller.passed_after_seconds for caller in callers if caller.passed_after_seconds > BOUND_WITHOUT_PUSH_SECONDS]
    assert [] == late
    # And they are out before we stop looking, on both workers.
    assert all(caller.shut_out_after_seconds <= BOUND_WITHOUT_PUSH_SECONDS for caller in callers)
