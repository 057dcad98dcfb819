# SPDX-License-Identifier: Apache-2.0
"""Postgres that is gone, frozen, deaf or back: who waits, who asks, and what is noticed when."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import psycopg
import pytest
from psycopg import sql
from structlog.testing import capture_logs

from chassis.errors import Unavailable
from chassis.stores import postgres
from chassis.stores.postgres import ReadPool, fetch_all, listen

#: Far above what anything here takes; a busy machine must not fail a test.
WAIT_SECONDS_MAX = 30.0


class Refusing:
    """A port that takes connections and hangs up at once, counting them: Postgres as it is away."""

    def __init__(self) -> None:
        self.attempts = 0
        self._server = socket.create_server(("127.0.0.1", 0))
        self.url = f"postgresql://nobody@127.0.0.1:{self._server.getsockname()[1]}/nothing"
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        with suppress(OSError):
            while True:
                peer, _ = self._server.accept()
                self.attempts += 1
                peer.close()

    def close(self) -> None:
        """Listen no more."""
        self._server.close()


def wait_for(condition: Callable[[], bool]) -> None:
    """Look until *condition* holds."""
    deadline = time.monotonic() + WAIT_SECONDS_MAX
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.02)


def is_served(pool: ReadPool) -> bool:
    """Whether a read is answered."""
    try:
        return fetch_all(pool, "select 1", ()) == [(1,)]
    except Unavailable:
        return False


@contextmanager
def frozen(url: str, application: str) -> Iterator[None]:
    """Stop the server processes of *application*'s connections: they answer nothing, and nothing says so."""
    with psycopg.connect(url, autocommit=True) as connection:
        found = connection.execute(
            "select pid from pg_stat_activity where application_name = %s and datname = current_database()", (application,)
        )
        pids = [pid for (pid,) in found]
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def test_while_it_is_away_reads_are_refused_at_once_and_one_attempt_a_second_is_made() -> None:
    """However many ask, from however many threads."""
    away = Refusing()
    with ReadPool(away.url, name="test", connections=4) as pool:
        assert not is_served(pool)  # this one had to find out
        before, began, refused = away.attempts, time.monotonic(), 0
        while refused < 20_000 and time.monotonic() - began < WAIT_SECONDS_MAX:
            refused += not is_served(pool)
        seconds = time.monotonic() - began
        attempts = away.attempts - before
    away.close()

    # At the rate at which one refusal waits for a connection it would have taken hours.
    assert 20_000 == refused
    # Both address families of a name are tried, and what was under way when it opened.
    assert attempts <= 2 + seconds / postgres.ATTEMPT_EVERY_SECONDS


def test_a_pool_in_use_refuses_one_read_and_is_not_taken_for_a_lost_server(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A burst may not cost everybody the connections that they need to get through it."""
    monkeypatch.setattr(postgres, "_POOL_WAIT_SECONDS", 0.05)
    with ReadPool(postgres_url, name="test", connections=1) as pool, capture_logs() as logs:
        pool.wait()
        is_refused = False
        deadline = time.monotonic() + WAIT_SECONDS_MAX
        while not is_refused and time.monotonic() < deadline:
            with ThreadPoolExecutor(1) as busy:
                slow = busy.submit(fetch_all, pool, "select 1 from pg_sleep(0.2)", ())
                time.sleep(0.02)
                is_refused = not is_served(pool)
                assert [(1,)] == slow.result()

        assert is_refused
        assert is_served(pool)
    assert [] == [line for line in logs if line["event"] == "postgres_lost"]


def test_its_return_is_noticed_though_every_connection_had_died(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By new connections: the old ones would wait for their turn."""
    attempts: list[float] = []
    connect = psycopg.connect

    def counted(*arguments: Any, **options: Any) -> object:
        attempts.append(time.monotonic())
        return connect(*arguments, **options)

    database = postgres_url.rpartition("/")[2]
    with ReadPool(postgres_url, name="test", connections=4) as pool:
        assert is_served(pool)
        with psycopg.connect(postgres_url.rpartition("/")[0] + "/postgres", autocommit=True) as admin:
            admin.execute(sql.SQL("alter database {} allow_connections false").format(sql.Identifier(database)))
            admin.execute("select pg_terminate_backend(pid) from pg_stat_activity where datname = %s", (database,))
            monkeypatch.setattr("chassis.stores.postgres.psycopg.connect", counted)
            assert not is_served(pool)
            # As long as a pool by itself takes to try only every four seconds.
            wait_for(lambda: len(attempts) >= 4)
            admin.execute(sql.SQL("alter database {} allow_connections true").format(sql.Identifier(database)))
            made = len(attempts)
            wait_for(lambda: is_served(pool))

    # The attempt after its return is the one that finds it; one may have been under way.
    assert len(attempts) - made <= 2


def test_connections_that_died_unnoticed_cost_no_read(postgres_url: str) -> None:
    """A restart of Postgres that nobody has met: all connections are dead, and it is not away."""
    with ReadPool(postgres_url, name="test-dead", connections=4) as pool:
        threads = [threading.Thread(target=lambda: fetch_all(pool, "select pg_sleep(0.2)", ())) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with psycopg.connect(postgres_url, autocommit=True) as owner:
            owner.execute("select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'test-dead'")

        assert is_served(pool)


def test_a_frozen_server_holds_nobody_for_long(postgres_url: str) -> None:
    """The server's own timeout cannot act; ours does, and a new connection is tried."""
    name = f"test-{secrets.token_hex(4)}"
    with ReadPool(postgres_url, name=name, connections=1) as pool:
        assert is_served(pool)
        with frozen(postgres_url, name):
            assert not is_served(pool)
            wait_for(lambda: is_served(pool))


def test_a_listener_that_is_deaf_notices_it(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its connection is open and says nothing; a change that was never delivered is made up for."""
    monkeypatch.setattr(postgres, "PULSE_EVERY_SECONDS", 0.2)
    monkeypatch.setattr(postgres._Listening, "answer_seconds_max", 0.2)
    monkeypatch.setattr(postgres, "_RECONNECT_SECONDS", 0.05)
    heard: list[str] = []
    name = f"test-{secrets.token_hex(4)}"
    listen(postgres_url, ("peaje_tenant",), lambda _, payload: heard.append(payload), name=name)
    wait_for(lambda: heard == [""])

    with frozen(postgres_url, f"{name}-listen"):
        with psycopg.connect(postgres_url, autocommit=True) as owner:
            owner.execute("notify peaje_tenant, 'acme'")
        # Not the change itself, which the frozen connection has: that anything may have changed.
        wait_for(lambda: len(heard) >= 2)

        assert "" == heard[1]


def test_a_listener_behind_a_proxy_that_changes_sessions_notices_it(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every statement is answered, and no notification ever comes: it may not take silence for peace."""
    monkeypatch.setattr(postgres, "PULSE_EVERY_SECONDS", 0.2)
    monkeypatch.setattr(postgres, "_RECONNECT_SECONDS", 0.05)
    execute = psycopg.Connection.execute

    def in_another_session(connection: psycopg.Connection[Any], query: Any, *arguments: Any) -> object:
        answer = execute(connection, query, *arguments)
        execute(connection, "unlisten *")
        return answer

    monkeypatch.setattr(postgres._Listening, "execute", in_another_session, raising=False)
    heard: list[str] = []
    listen(postgres_url, ("peaje_tenant",), lambda _, payload: heard.append(payload), name="test-proxy")

    wait_for(lambda: len(heard) >= 3)

    assert {""} == set(heard)


def test_a_listener_that_hears_is_left_alone(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pulses come and go without anybody being told; changes arrive once."""
    monkeypatch.setattr(postgres, "PULSE_EVERY_SECONDS", 0.2)
    heard: list[str] = []
    name = f"test-{secrets.token_hex(4)}"
    listen(postgres_url, ("peaje_tenant",), lambda _, payload: heard.append(payload), name=name)
    wait_for(lambda: heard == [""])

    with psycopg.connect(postgres_url, autocommit=True) as owner:
        for number in range(5):
            owner.execute("select pg_notify('peaje_tenant', %s)", (str(number),))
            time.sleep(0.15)  # so that they fall on both sides of a pulse
    wait_for(lambda: len(heard) >= 6)

    assert ["", "0", "1", "2", "3", "4"] == heard
