# SPDX-License-Identifier: Apache-2.0
"""What the delivery of events counts. In a module of its own: no other process shows any of it."""

from __future__ import annotations

from typing import Final

from prometheus_client import Counter, Gauge

WEBHOOK_ATTEMPTS: Final = Counter("peaje_webhook_attempts_total", "Requests to webhooks by what became of them.", ["outcome"])
WEBHOOKS: Final = Gauge("peaje_webhooks", "Webhooks by state; one that failed for too long is not tried any more.", ["state"])
WEBHOOK_MISSED_EVENTS: Final = Gauge(
    "peaje_webhook_missed_events", "Events that webhooks which are there now have never been sent and never will be."
)
OUTBOX_OLDEST_SECONDS: Final = Gauge(
    "peaje_outbox_oldest_seconds", "Age of the oldest event that an active webhook has not taken; 0 if all have all."
)
