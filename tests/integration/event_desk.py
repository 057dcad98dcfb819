# SPDX-License-Identifier: Apache-2.0
"""A desk at which tests make webhooks, let things happen, and have them delivered, without the process's loop."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import psycopg
from psycopg_pool import AsyncConnectionPool

from chassis.clock import utc_now
from metering.adapters.outbox import Outbox
from metering.adapters.sending import Sender
from metering.events import Deliveries
from tests.integration.control_plane import Clock, ControlPlane
from tests.journals import NOON
from tests.receivers import Receiver

#: What a test leaves behind, children first.
_CLEANED = (
    "webhook", "outbox", "event_told", "usage_hour_told", "rate_limit", "api_key", "usage_event", "usage_hour", "open_exchange",
    "journal_position", "journal_state",
)  # fmt: skip


@dataclass
class Desk:
    """The control plane and the delivery process's own code over one database, without its loop."""

    control: ControlPlane
    url: str
    #: Added to the real time: signatures are judged by the receiver's own clock.
    later: timedelta = field(default_factory=timedelta)

    def add(self, receiver: Receiver, by: str | None = None, **asked: Any) -> dict[str, Any]:
        """Make a webhook, as the platform-admin or as the operator whose token is given."""
        return self.control.made("/v1/webhooks", {"url": receiver.url, **asked}, by)

    def ask(self, webhook: dict[str, Any], what: str, **body: Any) -> dict[str, Any]:
        """Do something to one."""
        return self.control.made(f"/v1/webhooks/{webhook['webhook_id']}/{what}", body)

    def show(self, webhook: dict[str, Any]) -> dict[str, Any]:
        """How it is doing."""
        return dict(self.control.ask("GET", f"/v1/webhooks/{webhook['webhook_id']}").json())

    def attempts(self, webhook: dict[str, Any]) -> list[tuple[str, int | None]]:
        """Outcome and status of its attempts, oldest first."""
        found = self.control.ask("GET", f"/v1/webhooks/{webhook['webhook_id']}/deliveries").json()["deliveries"]
        return [(it["outcome"], it["status"]) for it in reversed(found)]

    def now(self) -> datetime:
        """The delivery process's time."""
        return utc_now() + self.later

    def deliver(self, *, steps: int = 1, total_seconds: float = 5.0) -> None:
        """Look *steps* times and finish what was begun each time."""

        async def work(deliveries: Deliveries) -> None:
            for _ in range(steps):
                await deliveries.step()
                await deliveries.finish()

        self.run(work, total_seconds=total_seconds)

    def run(self, work: Callable[[Deliveries], Awaitable[None]], *, total_seconds: float = 5.0) -> None:
        """Do *work* with deliveries of one life."""

        async def whole() -> None:
            async with AsyncConnectionPool(self.url, min_size=1, max_size=4, open=False) as pool:
                sender = Sender(loopback_allowed=True, total_seconds=total_seconds)
                deliveries = Deliveries(
                    outbox=Outbox(pool.connection), sender=sender, peppers=self.control.services.mint.peppers, source="test",
                    clock=self.now, chance=lambda: 0.0,
                )
                try:
                    await work(deliveries)
                finally:
                    await sender.close()

        asyncio.run(whole())

    def notice(self, look: Callable[..., int], now: datetime, **words: Any) -> int:
        """What the process looks for by itself."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            return look(connection, now, **words)

    def clean(self) -> None:
        """Remove what a test has left, and set the clocks back."""
        self.control.clock.now, self.later = Clock().now, timedelta(0)
        with psycopg.connect(self.url, autocommit=True) as connection:
            for table in _CLEANED:
                connection.execute(f"delete from {table}")


def prepared(desk: Desk) -> Desk:
    """With the tenants acme and rival; loopback is allowed."""
    object.__setattr__(desk.control.services, "loopback_allowed", True)
    for name in ("acme", "rival"):
        desk.control.tenant(name)
    return desk


def new_key(desk: Desk, tenant: str = "acme", name: str = "k") -> dict[str, Any]:
    return desk.control.made(f"/v1/tenants/{tenant}/keys", {"name": name})


def told(receiver: Receiver) -> list[dict[str, Any]]:
    return [json.loads(it.body) for it in receiver.got]


def types(receiver: Receiver) -> list[str]:
    return [it["type"] for it in told(receiver)]


def hour_ready(desk: Desk) -> None:
    """The journal is read past the hour, and webhooks listen since before it."""
    with psycopg.connect(desk.url) as connection:
        connection.execute("update journal_state set read_until = %s", (NOON + timedelta(hours=2),))
        connection.execute("update webhook set created_at = %s", (NOON - timedelta(hours=1),))
