# SPDX-License-Identifier: Apache-2.0
"""
How events look to those who receive them: one function per format, each from events to requests.

Ids are stable: an event that is sent again has the id that it had, in whatever field the format has
for it. Must not know HTTP, Postgres or the time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final
from urllib.parse import urlencode

import orjson
from cloudevents.core.bindings.http import to_structured
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent
from standardwebhooks.webhooks import Webhook as Signer

USAGE_RECORDED: Final = "usage.recorded"
USAGE_HOUR: Final = "usage.hour"
BUDGET_THRESHOLD: Final = "budget.threshold"
KEY_CREATED: Final = "key.created"
KEY_ROTATED: Final = "key.rotated"
KEY_REVOKED: Final = "key.revoked"
KEY_EXPIRING: Final = "key.expiring"
PERIOD_CLOSED: Final = "period.closed"
INVOICE_CLOSED: Final = "invoice.closed"
WEBHOOK_TEST: Final = "webhook.test"

#: What a webhook may ask for. `webhook.test` comes unasked.
KINDS: Final = (
    USAGE_RECORDED, USAGE_HOUR, BUDGET_THRESHOLD, KEY_CREATED, KEY_ROTATED, KEY_REVOKED, KEY_EXPIRING, PERIOD_CLOSED,
    INVOICE_CLOSED,
)
USAGE_KINDS: Final = frozenset({USAGE_RECORDED, USAGE_HOUR})
#: Events of one request in a format that has batches; also the most that are read at a time.
BATCH_MAX: Final = 100

STANDARD, CLOUDEVENTS, CLOUDEVENTS_BATCH, LAGO, STRIPE = FORMATS = (
    "standard", "cloudevents", "cloudevents-batch", "lago", "stripe",
)
#: Metering APIs: they take usage and nothing else.
METERS_ONLY: Final = frozenset({LAGO, STRIPE})
#: Formats whose receivers check our signature; the others check a token that they gave out.
SIGNED: Final = frozenset({STANDARD, CLOUDEVENTS, CLOUDEVENTS_BATCH})

STRIPE_URL: Final = "https://api.stripe.com/v1/billing/meter_events"
#: Fields of a usage event that are a meter of their own at Stripe, called `peaje_<field>`; what the event is metered
#: by besides tokens is another one, called `peaje_<meter>`.
_STRIPE_METERS: Final = ("input_tokens", "output_tokens")
_LAGO_METRIC: Final = "peaje_usage"
_TYPE_PREFIX: Final = "peaje."


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One row of the outbox."""

    position: int
    event_id: str
    kind: str
    tenant_id: str | None
    at: datetime
    data: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What a webhook's requests are made with."""

    format: str
    #: `source` of CloudEvents: which installation speaks.
    source: str
    #: Secrets to sign with: the newest first, then those that still work.
    secrets: tuple[str, ...] = field(default=(), repr=False)
    credential: str | None = field(default=None, repr=False)
    #: What the receiver calls a tenant, where it is not our id.
    customers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outgoing:
    """One HTTP request; the events up to *position* are done once it, and those before it, have succeeded."""

    body: bytes
    headers: dict[str, str]
    #: Of the first event in it.
    event_id: str
    kind: str
    event_count: int
    position: int


def bundles(events: Sequence[Event], format_: str) -> list[Sequence[Event]]:
    """Events that travel together: one by one, or as many as a batch holds."""
    size = BATCH_MAX if format_ == CLOUDEVENTS_BATCH else 1
    return [events[start : start + size] for start in range(0, len(events), size)]


def requests(events: Sequence[Event], recipe: Recipe, *, now: datetime) -> list[Outgoing]:
    """
    The requests that carry one bundle of *events*, in order.

    *now* is what they are signed with, so they are made when they are sent: receivers refuse a signature
    that is five minutes old.
    """
    match recipe.format:
        case "standard":
            return [_signed(recipe, [it], _standard(it), "application/json", now) for it in events]
        case "cloudevents":
            return [_signed(recipe, [it], *_structured(it, recipe.source), now) for it in events]
        case "cloudevents-batch":
            return [_signed(recipe, events, _batch(events, recipe.source), "application/cloudevents-batch+json", now)]
        case "lago":
            return [_outgoing(recipe, [it], _lago(it, recipe), {"content-type": "application/json"}) for it in events]
        case "stripe":
            return [one for it in events for one in _stripe(it, recipe)]
    raise ValueError(recipe.format)


def is_duplicate(format_: str, status: int, answer: bytes) -> bool:
    """
    Whether a refusal says that the receiver has the event already: then it was delivered.

    Stripe answers 400 and Lago 422 to an identifier that they know; sending it on and on would stop
    everything behind it.
    """
    if format_ == STRIPE and status == 400:
        return b"duplicate_meter_event" in answer or b"An event already exists with identifier" in answer
    return format_ == LAGO and status == 422 and b"transaction_id" in answer and b"value_already_exist" in answer


def is_sendable(event: Event, recipe: Recipe) -> bool:
    """Whether the receiver can be told: Stripe knows only customers that somebody has mapped."""
    return recipe.format != STRIPE or event.kind == WEBHOOK_TEST or event.tenant_id in recipe.customers


def _standard(event: Event) -> bytes:
    data = {"tenant": event.tenant_id, **event.data}
    return orjson.dumps({"type": event.kind, "timestamp": event.at, "data": data}, option=orjson.OPT_UTC_Z)


def _cloud(event: Event, source: str) -> CloudEvent:
    attributes: dict[str, Any] = {
        "id": event.event_id, "source": source, "type": _TYPE_PREFIX + event.kind, "specversion": "1.0",
        "time": event.at, "datacontenttype": "application/json",
    }
    if event.tenant_id is not None:
        # OpenMeter meters by subject.
        attributes["subject"] = event.tenant_id
    return CloudEvent(attributes=attributes, data=event.data)


def _structured(event: Event, source: str) -> tuple[bytes, str]:
    message = to_structured(_cloud(event, source), JSONFormat())
    return message.body, message.headers["content-type"]


def _batch(events: Iterable[Event], source: str) -> bytes:
    return b"[" + b",".join(JSONFormat().write(_cloud(it, source)) for it in events) + b"]"


def _lago(event: Event, recipe: Recipe) -> bytes:
    tenant_id = event.tenant_id or ""
    return orjson.dumps(
        {
            "event": {
                "transaction_id": event.event_id,
                "external_subscription_id": recipe.customers.get(tenant_id, tenant_id),
                "code": _LAGO_METRIC,
                "timestamp": int(event.at.timestamp()),
                "properties": event.data,
            }
        }
    )


def _stripe(event: Event, recipe: Recipe) -> list[Outgoing]:
    """A request per meter; a test is a meter event of value 0 that no customer is charged for."""
    customer = recipe.customers.get(event.tenant_id or "", "cus_test")
    values = {name: int(event.data.get(name, 0)) for name in _STRIPE_METERS}
    if event.data.get("meter"):
        values[event.data["meter"]] = int(event.data.get("quantity", 0))
    meters = [name for name, value in values.items() if value > 0] or list(_STRIPE_METERS[:1])
    made = []
    for name in meters:
        fields = {
            "event_name": f"peaje_{name}", "identifier": f"{event.event_id}:{name}", "timestamp": int(event.at.timestamp()),
            "payload[stripe_customer_id]": customer, "payload[value]": values[name],
        }
        headers = {"content-type": "application/x-www-form-urlencoded"}
        # Only the last request of an event completes it.
        position = event.position if name == meters[-1] else event.position - 1
        made.append(_outgoing(recipe, [event], urlencode(fields).encode(), headers, position=position))
    return made


def _signed(recipe: Recipe, events: Sequence[Event], body: bytes, content_type: str, now: datetime) -> Outgoing:
    message_id = events[0].event_id
    signatures = [Signer(secret).sign(message_id, now, body.decode()) for secret in recipe.secrets]
    headers = {
        "content-type": content_type, "webhook-id": message_id, "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": " ".join(signatures),
    }
    return _outgoing(recipe, events, body, headers)


def _outgoing(
    recipe: Recipe, events: Sequence[Event], body: bytes, headers: dict[str, str], *, position: int | None = None
) -> Outgoing:
    if recipe.credential is not None:
        headers = headers | {"authorization": f"Bearer {recipe.credential}"}
    return Outgoing(
        body=body, headers=headers, event_id=events[0].event_id, kind=events[0].kind, event_count=len(events),
        position=events[-1].position if position is None else position,
    )
