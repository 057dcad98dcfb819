# SPDX-License-Identifier: Apache-2.0
"""
Postgres as the services use it: a small pool for reads, and a listener for changes.

A read that cannot be made raises `Unavailable`; the caller's failure policy decides. Nobody waits for
a server that hangs longer than for one that is gone.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final, LiteralString, Self

import psycopg
import structlog
from psycopg import sql
from psycopg_pool import ConnectionPool, PoolTimeout

from chassis.errors import Unavailable
from chassis.telemetry import metrics, traces

log = structlog.get_logger()

#: Waiting longer for a connection than Envoy waits for the decision helps nobody.
_POOL_WAIT_SECONDS: Final = 0.3
_STATEMENT_TIMEOUT_MS: Final = 300
#: For whatever does not answer at all, so that its own timeout cannot act: a frozen server, a cut path.
_ANSWER_SECONDS_MAX: Final = 0.5
#: Between two attempts while Postgres is away, of the whole process.
ATTEMPT_EVERY_SECONDS: Final = 1.0
#: Between attempts to listen again; also the longest a change goes unnoticed beyond its cache's TTL.
_RECONNECT_SECONDS: Final = 1.0
#: A listener tells itself something this often. What it has not heard after another such time it will never hear.
PULSE_EVERY_SECONDS: Final = 3.0


class _Bounded(psycopg.Connection[Any]):
    """A connection that waits for an answer only so long."""

    answer_seconds_max = _ANSWER_SECONDS_MAX

    def wait(self, gen: Any, interval: float = 0.1, timeout: float | None = None) -> Any:
        """Do as the base class does; psycopg's own default is to wait for ever."""
        return super().wait(gen, interval, self.answer_seconds_max if timeout is None else timeout)


class _Listening(_Bounded):
    answer_seconds_max = PULSE_EVERY_SECONDS


class ReadPool:
    """
    A few connections for short reads; safe to use from several threads.

    Once Postgres does not answer, reads are refused at once and one thread asks it once a second; they
    go on with new connections as soon as it is back. The old ones are thrown away: each would have
    been tried again at ever longer intervals. To find every connection in use for too long is no sign of
    that: only the one read is refused.
    """

    def __init__(self, url: str, *, name: str, connections: int) -> None:
        self._url = url
        self._name = name
        self._connections = connections
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._is_away = False
        self._reading = 0
        self._pool = self._open()

    def fetch_all(self, query: LiteralString, arguments: Sequence[Any] | Mapping[str, Any]) -> list[tuple[Any, ...]]:
        """Run one read; raises `Unavailable`."""
        if self._is_away:
            raise Unavailable("Postgres does not answer.")
        pool = self._pool
        until = time.monotonic() + _POOL_WAIT_SECONDS
        # Each of the connections may have died unnoticed; the one after that is new.
        for _ in range(self._connections + 1):
            try:
                with traces.asking("postgresql", "select"), pool.connection() as connection, self._counted():
                    rows: list[tuple[Any, ...]] = connection.execute(query, arguments).fetchall()
                    return rows
            except PoolTimeout:
                # Whoever has a connection finds out by itself if the server is what keeps it.
                if self._reading:
                    raise Unavailable("Every connection to Postgres is in use.") from None
                break
            except (psycopg.OperationalError, psycopg.InterfaceError):
                if time.monotonic() >= until:
                    break
        self._lost(pool)
        raise Unavailable("Postgres did not answer.")

    @property
    def is_away(self) -> bool:
        """Whether reads are refused because Postgres does not answer."""
        return self._is_away

    @contextmanager
    def _counted(self) -> Iterator[None]:
        with self._lock:
            self._reading += 1
        try:
            yield
        finally:
            with self._lock:
                self._reading -= 1

    def wait(self) -> None:
        """Wait until there is a connection; for tools, which have nothing else to do."""
        self._pool.wait()

    def close(self) -> None:
        """Read nothing any more."""
        self._closed.set()
        self._pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> ConnectionPool[_Bounded]:
        return ConnectionPool(
            self._url,
            connection_class=_Bounded,
            # All of them at once: a burst of reads is no time for handshakes.
            min_size=self._connections,
            max_size=self._connections,
            timeout=_POOL_WAIT_SECONDS,
            reconnect_timeout=5.0,
            name=self._name,
            kwargs={
                "autocommit": True,
                "application_name": self._name,
                "connect_timeout": 2,
                "options": f"-c statement_timeout={_STATEMENT_TIMEOUT_MS}",
            },
            open=True,
        )

    def _lost(self, pool: ConnectionPool[_Bounded]) -> None:
        with self._lock:
            if self._is_away or pool is not self._pool:
                return
            self._is_away = True
        log.error("postgres_lost")
        threading.Thread(target=self._ask_until_back, name="postgres", daemon=True).start()

    def _ask_until_back(self) -> None:
        self._pool.close(timeout=0)
        pause = 0.0
        while not self._closed.wait(pause):
            began = time.monotonic()
            with suppress(psycopg.Error), psycopg.connect(
                self._url, application_name=f"{self._name}-away", connect_timeout=2
            ):
                self._pool = self._open()
                with suppress(PoolTimeout):
                    self._pool.wait(_POOL_WAIT_SECONDS)
                self._is_away = False
                log.info("postgres_back")
                return
            pause = max(0.0, began + ATTEMPT_EVERY_SECONDS - time.monotonic())


class _Pulse:
    """When a listener last heard itself, as metrics show it."""

    def __init__(self, name: str) -> None:
        self._at = time.monotonic()
        self._heard = metrics.LISTENER_HEARD_SECONDS.labels(name)
        metrics.LISTENER_SILENT_SECONDS.labels(name).set_function(lambda: time.monotonic() - self._at)

    def after(self, began: float) -> None:
        """It heard the pulse that it sent at *began*."""
        self._at = time.monotonic()
        self._heard.observe(self._at - began)


def read_pool(url: str, *, name: str, connections: int) -> ReadPool:
    """Open a pool for short reads; it fills itself in the background, so an absent Postgres does not block."""
    return ReadPool(url, name=name, connections=connections)


def fetch_all(pool: ReadPool, query: LiteralString, arguments: Sequence[Any] | Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """Run one read; raises `Unavailable`."""
    return pool.fetch_all(query, arguments)


def listen(
    url: str, channels: Sequence[str], changed: Callable[[str, str], None], *, name: str
) -> threading.Thread:
    """
    Call *changed(channel, payload)* for each notification, from a daemon thread, for ever.

    After a lost connection it calls *changed(channel, "")* once for every channel: whatever
    happened meanwhile went unheard, so the receiver drops all that it remembers. A connection that
    is deaf without being closed (a cut path, a frozen server, a proxy that gives each statement another
    session) counts as lost within two pulses.
    """
    heard = _Pulse(name)

    def run() -> None:
        while True:
            try:
                with _Listening.connect(
                    url, autocommit=True, application_name=f"{name}-listen", connect_timeout=2,
                    keepalives_idle=5, keepalives_interval=2, keepalives_count=3,
                    # A pulse that a crash takes with it is missed by nobody: no disk needs to turn for it.
                    options="-c synchronous_commit=off",
                ) as connection:
                    pulse = f"peaje_pulse_{secrets.token_hex(8)}"
                    for channel in (*channels, pulse):
                        connection.execute(sql.SQL("listen {}").format(sql.Identifier(channel)))
                    for channel in channels:
                        changed(channel, "")
                    while _hear(connection, pulse, changed, heard):
                        pass
                    log.warning("listen_deaf")
            except psycopg.Error as exc:
                log.warning("listen_lost", error=type(exc).__name__)
            threading.Event().wait(_RECONNECT_SECONDS)

    thread = threading.Thread(target=run, name="listen", daemon=True)
    thread.start()
    return thread


def _hear(connection: _Listening, pulse: str, changed: Callable[[str, str], None], heard: _Pulse) -> bool:
    """
    Pass on what is notified until the next pulse is due; whether this one was heard.

    Postgres delivers in the order of commits: whoever hears a pulse has heard all that changed before it.
    """
    began = time.monotonic()
    connection.execute("select pg_notify(%s, '')", (pulse,))
    is_heard = False
    for notice in connection.notifies(timeout=PULSE_EVERY_SECONDS):
        if notice.channel == pulse:
            is_heard = True
            heard.after(began)
        else:
            changed(notice.channel, notice.payload)
    return is_heard
