# SPDX-License-Identifier: Apache-2.0
"""A counter store that fails in every way that one can: each limit does what is written in it, nobody gets a 500."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

from chassis.errors import Unavailable
from ratelimit.adapters.counters import Settled, StoredCounters, connect
from ratelimit.adapters.local import FAILURES_TO_OPEN, probe_until_back
from ratelimit.core.decide import Outcome
from ratelimit.core.demand import Demand, Kind
from ratelimit.core.usage import Report
from tests.integration.stores import PATIENCE_SECONDS, store_server
from tests.integration.test_ratelimit_stores import OK, OVER, Desk, demand

AWAY = "away"


class Watched(StoredCounters):
    """Counters in the store that say how often it was called."""

    calls = 0

    def take(self, demand: Demand, seeds: Mapping[str, int]) -> Outcome:
        self.calls += 1
        return super().take(demand, seeds)

    def settle(self, *, tenant_id: str, request_id: str, report: Report, model: str = "") -> Settled | None:
        self.calls += 1
        return super().settle(tenant_id=tenant_id, request_id=request_id, report=report, model=model)


class WatchedDesk(Desk):
    """A desk that knows how often its store was called."""

    watched: Watched


@pytest.fixture
def desk(postgres_url: str) -> Iterator[WatchedDesk]:
    """A desk whose store is its own to break, with a model for each mode."""
    with store_server() as url:
        made = WatchedDesk(postgres_url, url)
        for mode, amount in (("local", 4), ("allow", 1), ("deny", 10)):
            made.limit("requests", "day", amount, model=mode, on_store_error=mode)
        made.open()
        made.store = connect(url, cluster=False)  # with the patience of a service
        made.servicer._stored = made.watched = Watched(made.store)
        yield made
        made.close()


@contextmanager
def _killed(store: Any) -> Iterator[None]:
    os.kill(store.info("server")["process_id"], signal.SIGKILL)
    yield


@contextmanager
def _stalled(store: Any) -> Iterator[None]:
    pid = store.info("server")["process_id"]
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@contextmanager
def _full(store: Any) -> Iterator[None]:
    store.config_set("maxmemory", "1")
    yield
    store.config_set("maxmemory", "0")


@contextmanager
def _read_only(store: Any) -> Iterator[None]:
    store.execute_command("REPLICAOF", "127.0.0.1", "1")
    yield
    store.execute_command("REPLICAOF", "NO", "ONE")


def ask(desk: Desk, mode: str, times: int) -> list[Any]:
    """Codes of the answers to requests to the model of *mode*; `AWAY` is what Envoy answers with 503."""
    answers: list[Any] = []
    for _ in range(times):
        try:
            answers.append(desk.admit(f"{mode}-{os.urandom(4).hex()}", model=mode).overall_code)
        except Unavailable:
            answers.append(AWAY)
    return answers


@pytest.mark.parametrize(
    ("fault", "comes_back"),
    [(_killed, False), (_stalled, True), (_full, True), (_read_only, True)],
    ids=["killed", "stalled", "OOM", "READONLY"],
)
def test_while_the_store_is_away_each_limit_follows_its_mode(
    desk: WatchedDesk, fault: Callable[[Any], Any], comes_back: bool
) -> None:
    """Local gives out its half, allow all, deny nothing; once it is left alone, no request calls the store."""
    assert [OK] == ask(desk, "local", 1)

    with fault(desk.store):
        modes = {mode: ask(desk, mode, FAILURES_TO_OPEN + 1) for mode in ("local", "allow", "deny")}
        calls = desk.watched.calls
        again = {mode: ask(desk, mode, 1) for mode in ("local", "allow", "deny")}
        desk.settle("of whoever")

        assert {"local": [OK, OK, OVER, OVER], "allow": [OK] * 4, "deny": [AWAY] * 4} == modes
        assert {"local": [OVER], "allow": [OK], "deny": [AWAY]} == again
        assert (True, 1, calls) == (desk.breaker.is_open, desk.opened, desk.watched.calls)

    if comes_back:
        probe_until_back(desk.breaker, desk.watched.probe)
        # Three of four were left in the store; of those that it may have heard while it stalled, none is asked for twice.
        assert [OVER] == ask(desk, "local", 4)[3:]
        assert [OK] == ask(desk, "deny", 1)
        assert desk.watched.calls > calls


@pytest.mark.parametrize("command", ["script_flush", "flushall"])
def test_a_store_that_forgot_is_not_away(desk: Desk, command: str) -> None:
    """Scripts are sent again; a bucket that was wiped begins anew; nobody's mode comes into play."""
    before = ask(desk, "local", 2)

    getattr(desk.store, command)()
    after = {mode: ask(desk, mode, 5) for mode in ("local", "deny")}

    assert [OK, OK] == before
    assert {"script_flush": [OK, OK, OVER, OVER, OVER], "flushall": [OK, OK, OK, OK, OVER]}[command] == after["local"]
    assert [OK] * 5 == after["deny"]
    assert not desk.breaker.is_open


def test_many_that_seed_a_wiped_quota_at_once_seed_it_once(counter_store: str) -> None:
    """The ledger's sum is set where there is none, never added: also by processes that know a different sum."""
    stored = Watched(connect(counter_store, cluster=False, timeout_seconds=PATIENCE_SECONDS))
    asked = [demand("reseed", amount=10**6, kinds=(Kind.QUOTA,)) for _ in range(64)]

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda one: stored.take(one, {one.counters[0].name: 5000}), asked))
    late = demand("reseed", amount=10**6, kinds=(Kind.QUOTA,))
    stored.take(late, {late.counters[0].name: 700_000})

    assert [b"5000", b"650"] == connect(counter_store, cluster=False, timeout_seconds=PATIENCE_SECONDS).hmget("peaje:{reseed}:quota", "used", "held")


