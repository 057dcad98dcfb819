# SPDX-License-Identifier: Apache-2.0
"""
`python -m metering.events`: send what is in the outbox to the webhooks that want it.

At least once, in order for each webhook, with ids that stay. Each webhook has its own place and its own
task: one whose receiver is slow or dead waits alone. The ledger is not asked for anything but a look;
it writes its events with its rows and never learns what becomes of them.

Of several such processes on one Postgres one sends, the others wait for its lock.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import psycopg
import structlog
from psycopg_pool import AsyncConnectionPool, PoolTimeout
from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from chassis.clock import utc_now
from chassis.errors import Unavailable
from chassis.secrets import load_peppers
from chassis.serving import run
from chassis.settings import StoreSettings
from chassis.telemetry.log import configure
from chassis.telemetry.metrics import serve
from metering.adapters import events_metrics as metrics
from metering.adapters.credits import settle_all as settle_credits
from metering.adapters.notices import (
    ALL_HOURS,
    HOURS_PER_LOOK,
    RECENT_HOURS,
    tell_expiring,
    tell_hours,
    tell_thresholds,
)
from metering.adapters.outbox import Outbox, Webhook, backlog, trim
from metering.adapters.sending import Answer, Sender
from metering.core.outgoing import Event, Outgoing, Recipe, bundles, is_sendable, requests
from metering.core.retry import Outcome, after_failure

log = structlog.get_logger()

READY_MARK: Final = Path("run/events.ready")
#: Seconds and batches of one webhook before its secrets and the outbox's end are looked at again: a slow receiver
#: must not be sent signatures of a secret that has been rotated out for hours.
TURN_SECONDS: Final = 30.0
_BATCHES_PER_TURN: Final = 20
#: Connections that all webhooks share; they are held for a statement, never for a receiver.
_CONNECTIONS_MAX: Final = 4
#: Names that may be resolved at once: a resolver that hangs holds a thread.
_RESOLVERS: Final = 32
_LOCK: Final = "select pg_try_advisory_lock(hashtextextended('peaje-events', 0))"
#: Seconds between looks, by a steady clock.
_EXPIRING_EVERY: Final = 60.0
_RECENT_HOURS_EVERY: Final = 60.0
_ALL_HOURS_EVERY: Final = 6 * 3600.0
_TRIM_EVERY: Final = 600.0
_CREDITS_EVERY: Final = 30.0
_MEASURE_EVERY: Final = 5.0
#: Times its own length that a look rests.
_REST: Final = 20

#: What a database that is away raises, here or in the pool.
_AWAY = (psycopg.Error, PoolTimeout)


class Settings(BaseSettings):
    """The delivery process's own settings; the stores' are in `StoreSettings`."""

    model_config = SettingsConfigDict(env_prefix="PEAJE_EVENTS_", frozen=True)

    #: `source` of CloudEvents: which installation speaks, where a receiver hears several.
    source: str = Field(default="peaje", min_length=1, max_length=200)
    #: Receivers on this machine's loopback, by http too: for trying things out, never beside other services.
    loopback_allowed: bool = False
    #: Between looks at the outbox.
    idle_seconds: float = Field(default=0.5, gt=0)
    #: Between looks at budgets; each sums the hours of the tenants that want to know.
    threshold_seconds: float = Field(default=10.0, gt=0)
    #: Loopback port for Prometheus; 0 shows no metrics.
    metrics_port: int = Field(default=0, ge=0, le=65535)


@dataclass(slots=True, kw_only=True)
class Deliveries:
    """What is being sent; a task for each webhook that has something and is due."""

    outbox: Outbox
    sender: Sender
    peppers: Mapping[int, bytes] = field(repr=False)
    source: str
    clock: Callable[[], datetime]
    chance: Callable[[], float]
    _under_way: dict[str, asyncio.Task[None]] = field(default_factory=dict)

    async def step(self) -> None:
        """Begin with every webhook that waits and is not under way; waits for none of them."""
        for name, task in list(self._under_way.items()):
            if task.done():
                del self._under_way[name]
                if not task.cancelled() and (defect := task.exception()) is not None:
                    log.error("delivery_broke", webhook=name, error=type(defect).__name__)
        end, waiting = await self.outbox.waiting(self.clock())
        for webhook in waiting:
            if webhook.webhook_id not in self._under_way:
                self._under_way[webhook.webhook_id] = asyncio.create_task(self._turn(webhook, end))

    async def finish(self) -> None:
        """Wait for what is under way."""
        await asyncio.gather(*self._under_way.values())

    async def cancel(self) -> None:
        """Stop at once; what was sent and not written down is sent again."""
        for task in self._under_way.values():
            task.cancel()
        await asyncio.gather(*self._under_way.values(), return_exceptions=True)

    async def _turn(self, webhook: Webhook, end: int) -> None:
        try:
            await self._deliver(webhook, end)
        except _AWAY as exc:
            log.warning("outbox_unavailable", webhook=webhook.webhook_id, error=type(exc).__name__)

    async def _deliver(self, webhook: Webhook, end: int) -> None:
        try:
            customers = await self.outbox.customers(webhook.webhook_id)
            recipe = webhook.recipe(self.peppers, self.source, customers)
        except Unavailable as exc:
            log.error("webhook_secret_unreadable", webhook=webhook.webhook_id, reason=exc.message)
            await self._failed(webhook, None, Answer(outcome=Outcome.SECRET_UNREADABLE), 0)
            return
        position, began = webhook.position, time.monotonic()
        for _ in range(_BATCHES_PER_TURN):
            events = await self.outbox.next_events(webhook, after=position, end=end)
            if not events:
                await self.outbox.passed(webhook.webhook_id, end)
                return
            sendable, group = next((key, list(them)) for key, them in itertools.groupby(events, lambda it: is_sendable(it, recipe)))
            if not sendable:
                await self.outbox.passed(webhook.webhook_id, group[-1].position, missed=len(group))
            else:
                for bundle in bundles(group, recipe.format):
                    if not await self._send(webhook, recipe, bundle) or time.monotonic() - began > TURN_SECONDS:
                        return
                    # From here on it has not failed: the next failure is a first one.
                    webhook = replace(webhook, failing_since=None, failure_count=0)
            position = group[-1].position

    async def _send(self, webhook: Webhook, recipe: Recipe, bundle: Sequence[Event]) -> bool:
        """Whether to go on behind *bundle*."""
        for request in requests(bundle, recipe, now=self.clock()):
            if not await self.outbox.is_active(webhook.webhook_id):
                return False
            began = time.monotonic()
            answer = await self.sender.send(webhook.url, recipe.format, request)
            duration_ms = round(1000 * (time.monotonic() - began))
            if not answer.outcome.is_success:
                await self._failed(webhook, request, answer, duration_ms)
                return False
            metrics.WEBHOOK_ATTEMPTS.labels(answer.outcome.value).inc()
            await self.outbox.succeeded(
                webhook.webhook_id, request, outcome=answer.outcome.value, status=answer.status, duration_ms=duration_ms,
                now=self.clock(),
            )
        return True

    async def _failed(self, webhook: Webhook, request: Outgoing | None, answer: Answer, duration_ms: int) -> None:
        metrics.WEBHOOK_ATTEMPTS.labels(answer.outcome.value).inc()
        now = self.clock()
        fate = after_failure(
            answer.outcome, failing_since=webhook.failing_since, failure_count=webhook.failure_count, now=now,
            chance=self.chance(), asked_to_wait=answer.asked_to_wait,
        )
        await self.outbox.failed(
            webhook.webhook_id, request, fate, outcome=answer.outcome.value, status=answer.status, duration_ms=duration_ms, now=now
        )
        tell = log.error if fate.next_attempt_at is None else log.warning
        tell(
            "webhook_paused" if fate.next_attempt_at is None else "webhook_failed", webhook=webhook.webhook_id,
            outcome=answer.outcome.value, status=answer.status, failure_count=fate.failure_count,
        )


class Notices(threading.Thread):
    """Looks for what is to be told, in a thread and with a connection of its own: sums take their time."""

    def __init__(self, url: str, settings: Settings, stop: threading.Event) -> None:
        super().__init__(name="notices", daemon=True)
        self._url = url
        self._stop_event = stop
        self._looks: list[tuple[float, Callable[[psycopg.Connection[Any], datetime], object]]] = [
            (settings.threshold_seconds, tell_thresholds),
            (_EXPIRING_EVERY, tell_expiring),
            (_RECENT_HOURS_EVERY, lambda connection, now: tell_hours(connection, now, back=RECENT_HOURS)),
            (_ALL_HOURS_EVERY, lambda connection, now: tell_hours(connection, now, back=ALL_HOURS)),
            (_TRIM_EVERY, _trim),
            (_CREDITS_EVERY, settle_credits),
            (_MEASURE_EVERY, _measure),
        ]

    def run(self) -> None:
        """Look until asked to stop."""
        due = [0.0] * len(self._looks)
        while not self._stop_event.is_set():
            try:
                with psycopg.connect(
                    self._url, autocommit=True, application_name="notices", connect_timeout=3,
                    options="-c statement_timeout=60000 -c timezone=UTC",
                ) as connection:
                    while not self._stop_event.wait(min(due) - time.monotonic()):
                        index = due.index(min(due))
                        every, look = self._looks[index]
                        # Before the look: one that fails must not be the next one for ever.
                        began = time.monotonic()
                        due[index] = began + every
                        found = look(connection, utc_now())
                        # A sum over many hours takes its time, and no more than a twentieth of all.
                        due[index] = max(due[index], began + _REST * (time.monotonic() - began))
                        if found == HOURS_PER_LOOK:
                            due[index] = time.monotonic()
            except psycopg.Error as exc:
                log.warning("notices_unavailable", error=type(exc).__name__)
                self._stop_event.wait(1.0)


def _measure(connection: psycopg.Connection[Any], now: datetime) -> None:
    del now
    found = backlog(connection)
    for state, count in found.counts.items():
        metrics.WEBHOOKS.labels(state).set(count)
    metrics.WEBHOOK_MISSED_EVENTS.set(found.missed)
    metrics.OUTBOX_OLDEST_SECONDS.set(found.oldest_seconds)


def _trim(connection: psycopg.Connection[Any], now: datetime) -> None:
    removed, missing = trim(connection, now)
    if removed:
        log.info("outbox_trimmed", count=removed)
    for webhook_id in missing:
        log.error("webhook_missed_events", webhook=webhook_id)


def main() -> None:
    """Send until SIGTERM; what is under way then is finished or sent again by the next life."""
    configure("events")
    stores, settings = StoreSettings(), Settings()
    stop = threading.Event()
    if settings.metrics_port:
        serve(settings.metrics_port, host=stores.metrics_host)
    asyncio.run(_serve(stores, settings, stop))


async def _serve(stores: StoreSettings, settings: Settings, stop: threading.Event) -> None:
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(_RESOLVERS, thread_name_prefix="resolver"))
    stopping = asyncio.Event()

    def ask_to_stop() -> None:
        stop.set()
        stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ask_to_stop)
    url, peppers = stores.require_postgres(), load_peppers(stores.home)
    sender = Sender(loopback_allowed=settings.loopback_allowed)
    notices = Notices(url, settings, stop)
    while not stopping.is_set():
        try:
            async with (
                await psycopg.AsyncConnection.connect(url, autocommit=True, application_name="events", connect_timeout=3) as leader,
                AsyncConnectionPool(
                    url, min_size=1, max_size=_CONNECTIONS_MAX, timeout=10.0, name="events", open=False,
                    kwargs={"application_name": "events", "options": "-c statement_timeout=30000 -c timezone=UTC"},
                ) as pool,
            ):
                deliveries = Deliveries(
                    outbox=Outbox(pool.connection), sender=sender, peppers=peppers, source=settings.source, clock=utc_now,
                    # Spreads retries; nothing rests on its being unguessable.
                    chance=random.random,
                )
                await _lead(deliveries, leader, notices, settings, stopping)
        except _AWAY as exc:
            log.error("outbox_unavailable", error=type(exc).__name__)
            await _pause(stopping, 1.0)
    await sender.close()


async def _lead(
    deliveries: Deliveries, leader: psycopg.AsyncConnection[Any], notices: Notices, settings: Settings, stopping: asyncio.Event
) -> None:
    """Deliver for as long as the lock is held; raises when the connection that holds it is gone."""
    leads = False
    try:
        while not stopping.is_set():
            if not leads:
                leads = await (await leader.execute(_LOCK)).fetchone() == (True,)
                if leads:
                    log.info("delivering")
                    if notices.ident is None:
                        notices.start()
            else:
                await leader.execute("select 1")
                await deliveries.step()
            _say_ready()
            await _pause(stopping, settings.idle_seconds)
    finally:
        await deliveries.cancel()


def _say_ready() -> None:
    if not READY_MARK.exists():
        READY_MARK.parent.mkdir(exist_ok=True)
        READY_MARK.touch(mode=0o600)


async def _pause(stopping: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await stopping.wait()
    except TimeoutError:
        pass


if __name__ == "__main__":
    run(main)
