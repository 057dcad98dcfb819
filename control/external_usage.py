# SPDX-License-Identifier: Apache-2.0
"""
Usage that did not pass by Envoy, such as an offline batch: into the same ledger, at the price of its moment.

Idempotent by the poster's own id: what is posted again changes nothing, and what is posted with other
numbers under a known id is refused with everything that came with it.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from chassis.contract import METERS
from chassis.errors import Conflict, Invalid
from control import audit, projects, tenants
from control.act import Act
from control.store import Connection, Store
from metering.adapters.ledger import add_events
from metering.core.journal import TOKENS_MAX, UsageEvent

ITEMS_MAX: Final = 1000
ID_LENGTH_MAX: Final = 200
MODEL_LENGTH_MAX: Final = 200
#: Clocks differ; beyond this a moment is a mistake.
AHEAD_MAX: Final = timedelta(minutes=5)
AGE_MAX: Final = timedelta(days=400)
DIALECT: Final = "external"
#: Any constant of our own: ids are made of it, the tenant and the poster's id, so that they cannot meet Envoy's.
_NAMESPACE: Final = uuid.UUID("b1a7c7f0-6f0b-4c7e-9c55-7065616a6509")
#: Ids that are named in a refusal.
_NAMED_MAX: Final = 5

_REMEMBER: Final = """
insert into external_usage (request_id, tenant_id, external_id, posted_by, posted_at)
select unnest(%(requests)s::text[]), unnest(%(tenants)s::text[]), unnest(%(ids)s::text[]), %(by)s, %(now)s
order by 1
on conflict do nothing returning request_id
"""
_KNOWN: Final = """
select request_id, tenant_id, project_id, key_id, model, started_at, ended_at, input_tokens, output_tokens, cached_tokens,
       reasoning_tokens, meter, quantity
from usage_event where request_id = any(%s)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """What was used, as its poster says."""

    id: str
    tenant: str
    model: str
    input_tokens: int
    output_tokens: int
    started_at: datetime
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    #: One of `contract.METERS`, if something else than tokens was used, and how much of it.
    meter: str | None = None
    quantity: int = 0
    #: None: at once.
    ended_at: datetime | None = None
    project: str = tenants.DEFAULT_PROJECT
    key_id: str | None = None


def post(store: Store, act: Act, items: Sequence[Item]) -> dict[str, Any]:
    """Add *items*, all or none: how many were new, how many known; `Conflict` for a known id with other numbers."""
    if not 1 <= len(items) <= ITEMS_MAX:
        raise Invalid(f"One call takes 1 to {ITEMS_MAX} items.")
    for number, item in enumerate(items):
        _refuse_bad(number, item, act.now)
    with store.transaction(act.scope) as connection:
        events = _events(connection, items)
        words = {
            "requests": list(events), "tenants": [it.tenant_id for it in events.values()],
            "ids": [item.id for item in items], "by": act.actor, "now": act.now,
        }
        new = {row["request_id"] for row in connection.execute(_REMEMBER, words).fetchall()}
        _refuse_other_numbers(connection, items, events, new)
        if new:
            connection.execute("create temp table incoming (like usage_event) on commit drop")
            add_events(connection, [event for name, event in events.items() if name in new], act.now, leases={})
        done = {"added": len(new), "known": len(items) - len(new)}
        audit.append(connection, act, "usage.posted", "usage", tenant_id=None, after=done)
    return done


def _events(connection: Connection, items: Sequence[Item]) -> dict[str, UsageEvent]:
    """The row of each item by its request id, in order; raises `NotFound` for a tenant, project or key that is not there."""
    places: dict[tuple[str, str, str | None], str] = {}
    events: dict[str, UsageEvent] = {}
    for item in items:
        place = (item.tenant, item.project, item.key_id)
        if place not in places:
            places[place] = _tenant_of(connection, item)
        tenant_id = places[place]
        request_id = str(uuid.uuid5(_NAMESPACE, f"{tenant_id}/{item.id}"))
        if request_id in events:
            raise Invalid(f"The id {item.id!r} is there twice.")
        events[request_id] = UsageEvent(
            request_id=request_id, tenant_id=tenant_id, project_id=item.project, key_id=item.key_id or "", model=item.model,
            dialect=DIALECT, started_at=item.started_at, ended_at=item.ended_at or item.started_at, status=200, outcome="ok",
            input_tokens=item.input_tokens, output_tokens=item.output_tokens, cached_tokens=item.cached_tokens,
            reasoning_tokens=item.reasoning_tokens, meter=item.meter, quantity=item.quantity, basis="reported", anomaly=None, streamed=False, upstream=None,
        )
    return events


def _tenant_of(connection: Connection, item: Item) -> str:
    tenant_id: str = tenants.resolve(connection, item.tenant)["tenant_id"]
    projects.resolve(connection, tenant_id, item.project)
    if item.key_id is not None:
        key = connection.execute("select from api_key where key_id = %s and tenant_id = %s", (item.key_id, tenant_id)).fetchone()
        if key is None:
            raise Invalid(f"There is no key {item.key_id!r} of tenant {tenant_id!r}.")
    return tenant_id


def _refuse_bad(number: int, item: Item, now: datetime) -> None:
    counts = (item.input_tokens, item.output_tokens, item.cached_tokens, item.reasoning_tokens, item.quantity)
    faults = (
        (not (1 <= len(item.id) <= ID_LENGTH_MAX and item.id.isprintable()), f"its id has 1 to {ID_LENGTH_MAX} printable characters"),
        (not (1 <= len(item.model) <= MODEL_LENGTH_MAX and item.model.isprintable()), "its model is no name"),
        (not all(0 <= count <= TOKENS_MAX for count in counts), f"a count is from 0 to {TOKENS_MAX}"),
        (item.cached_tokens > item.input_tokens, "cached tokens are part of the input"),
        (item.reasoning_tokens > item.output_tokens, "reasoning tokens are part of the output"),
        (item.meter is not None and item.meter not in METERS, f"a meter is one of {', '.join(METERS)}"),
        ((item.meter is None) != (item.quantity == 0), "a meter and a quantity above 0 belong together"),
        (item.started_at.tzinfo is None or (item.ended_at or now).tzinfo is None, "a moment says its zone"),
    )
    for is_fault, what in faults:
        if is_fault:
            raise Invalid(f"Item {number}: {what}.")
    ended_at = item.ended_at or item.started_at
    if not now - AGE_MAX <= item.started_at <= ended_at <= now + AHEAD_MAX:
        raise Invalid(f"Item {number}: it started in the last {AGE_MAX.days} days, and ended after that and not in the future.")


def _refuse_other_numbers(
    connection: Connection, items: Sequence[Item], events: dict[str, UsageEvent], new: set[str]
) -> None:
    """What is known must be what was posted; rows that were retired since can no longer be compared, and stand."""
    known = {name: event for name, event in events.items() if name not in new}
    names = {request_id: item.id for request_id, item in zip(events, items, strict=True)}
    other = [
        names[row["request_id"]] for row in connection.execute(_KNOWN, (list(known),)).fetchall()
        if any(getattr(known[row["request_id"]], name) != value for name, value in row.items())
    ]
    if other:
        raise Conflict(
            f"{len(other)} items are known with other numbers, such as {', '.join(sorted(other)[:_NAMED_MAX])}.",
            mend="Nothing was added. A correction is an item with an id of its own.",
        )
