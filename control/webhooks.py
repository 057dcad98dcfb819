# SPDX-License-Identifier: Apache-2.0
"""
Webhooks: who hears of what, where. Make, list, rotate the secret, pause, resume, test, remove.

A webhook of one tenant hears of that tenant; one of all tenants hears everything. A secret is shown
once and kept sealed: the delivery process signs with it, so a hash would not do.
"""

from __future__ import annotations

import base64
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

from chassis import keys as formats
from chassis.errors import Conflict, Invalid, NotFound
from chassis.sealing import seal
from control import audit, tenants
from control.act import Act
from control.core import rights
from control.minting import Mint
from control.outbox import tell
from control.store import Connection, Store
from metering.core import outgoing
from metering.core.targets import target

NAME_LENGTH_MAX: Final = 100
PER_TENANT_MAX: Final = 20
#: Of all tenants: each is a task that looks at every event.
OF_ALL_MAX: Final = 50
OVERLAP_MAX: Final = timedelta(days=30)
CREDENTIAL_LENGTH_MAX: Final = 500
CUSTOMER_LENGTH_MAX: Final = 200
#: Bytes; the Standard Webhooks specification asks for 24 to 64.
_SECRET_BYTES: Final = 32
#: The specification's own; what follows is the secret.
_SECRET_PREFIX: Final = "whsec_"
_ID_PREFIX: Final = "wh_"

_COLUMNS: Final = (
    "webhook_id, tenant_id, name, url, format, kinds as events, state, created_at, last_success_at, failing_since, "
    "failure_count, next_attempt_at, missed_count, previous_secret_expires_at, "
    "greatest(outbox_end() - position, 0) as behind_count"
)
_INSERT: Final = f"""
insert into webhook (webhook_id, tenant_id, name, url, format, kinds, secret, credential, position, created_at)
values (%(webhook_id)s, %(tenant_id)s, %(name)s, %(url)s, %(format)s, %(kinds)s, %(secret)s, %(credential)s, outbox_end(), %(now)s)
returning {_COLUMNS}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewWebhook:
    """What is asked of a new webhook."""

    #: None: Stripe's own.
    url: str | None = None
    name: str = "webhook"
    format: str = outgoing.STANDARD
    #: None: what fits the format and the operator, and no usage unless the format is for usage alone.
    events: Sequence[str] | None = None
    #: None: all tenants, or the operator's own.
    tenant: str | None = None
    #: What the receiver knows us by.
    credential: str | None = None


def create(
    store: Store, act: Act, mint: Mint, asked: NewWebhook, *, may_hear: Collection[str], loopback_allowed: bool
) -> dict[str, Any]:
    """Make a webhook that hears what happens from now on; the answer is the only one that has `secret`."""
    if asked.format not in outgoing.FORMATS:
        raise Invalid(f"There is no format {asked.format!r}.", mend=f"Known: {', '.join(outgoing.FORMATS)}.")
    url = asked.url or (outgoing.STRIPE_URL if asked.format == outgoing.STRIPE else None)
    if url is None:
        raise Invalid("A webhook needs a URL.")
    target(url, loopback_allowed=loopback_allowed)
    webhook_id = _ID_PREFIX + formats.mint_token("webhook", mint.random_bytes).token_id
    secret = _new_secret(mint) if asked.format in outgoing.SIGNED else None
    row = {
        "webhook_id": webhook_id, "url": url, "format": asked.format, "now": act.now,
        "name": rights.name(asked.name, what="A webhook's", length_max=NAME_LENGTH_MAX),
        "secret": None if secret is None else _sealed(mint, secret, webhook_id),
        "credential": None if asked.credential is None else _sealed(mint, _credential(asked.credential), webhook_id),
    }
    if row["credential"] is None and asked.format in outgoing.METERS_ONLY:
        raise Invalid(f"A receiver of format {asked.format} asks for its own API key.", mend="Give it with --token-file.")
    with store.transaction(act.scope) as connection:
        tenant_id = tenants.resolve_id(connection, asked.tenant) or act.tenant_id
        row |= {"tenant_id": tenant_id, "kinds": _kinds(asked, may_hear=may_hear, of_all=tenant_id is None)}
        if tenant_id is not None:
            connection.execute("select from tenant where tenant_id = %s for update", (tenant_id,))
        _refuse_too_many(connection, tenant_id)
        made = connection.execute(_INSERT, row).fetchone()
        assert made is not None
        audit.append(connection, act, "webhook.created", webhook_id, tenant_id=tenant_id, after=made)
    return made if secret is None else made | {"secret": secret}


def list_page(store: Store, act: Act, *, after: str | None, limit: int) -> list[dict[str, Any]]:
    """Webhooks in scope by id, never their secrets."""
    with store.transaction(act.scope) as connection:
        return connection.execute(
            f"select {_COLUMNS} from webhook where webhook_id > coalesce(%(after)s, '') order by webhook_id limit %(limit)s",
            {"after": after, "limit": limit},
        ).fetchall()


def find(store: Store, act: Act, webhook_id: str) -> dict[str, Any]:
    """One webhook and what its receiver calls our tenants; raises `NotFound`."""
    with store.transaction(act.scope) as connection:
        found = _look_up(connection, webhook_id)
        customers = connection.execute(
            "select tenant_id, customer from webhook_customer where webhook_id = %s order by 1", (webhook_id,)
        ).fetchall()
    return found | {"customers": {row["tenant_id"]: row["customer"] for row in customers}}


def rotate_secret(store: Store, act: Act, mint: Mint, webhook_id: str, *, overlap: timedelta) -> dict[str, Any]:
    """Sign with a new secret and, until *overlap* is over, with the old one too; the answer has the new one."""
    if not timedelta(0) <= overlap <= OVERLAP_MAX:
        raise Invalid("overlap must be between 0 and 30 days.")
    with store.transaction(act.scope) as connection:
        before = _resolve(connection, webhook_id)
        if before["format"] not in outgoing.SIGNED:
            raise Invalid(f"A webhook of format {before['format']} is not signed.", mend="Its receiver's token is set when it is made.")
        secret = _new_secret(mint)
        connection.execute(
            "update webhook set secret = %(new)s, previous_secret = case when %(ends)s > %(now)s then secret end, "
            "previous_secret_expires_at = case when %(ends)s > %(now)s then %(ends)s end where webhook_id = %(id)s",
            {"new": _sealed(mint, secret, webhook_id), "ends": act.now + overlap, "now": act.now, "id": webhook_id},
        )
        after = _resolve(connection, webhook_id)
        audit.append(connection, act, "webhook.secret_rotated", webhook_id, tenant_id=after["tenant_id"], before=before, after=after)
    return after | {"secret": secret}


def pause(store: Store, act: Act, webhook_id: str) -> dict[str, Any]:
    """Send it nothing until it is resumed; what happens meanwhile waits, for two weeks at most."""
    return _change(store, act, webhook_id, "webhook.paused", "state = 'paused', next_attempt_at = null")


def resume(store: Store, act: Act, webhook_id: str, *, skip: bool) -> dict[str, Any]:
    """Go on where it stopped, at once; with *skip* behind the event that it could not be told, which counts as missed."""
    past = (
        "position = coalesce((select min(waits) from outbox_of(%(id)s) as waits), position), "
        "missed_count = missed_count + (select least(count(*), 1) from outbox_of(%(id)s)), "
        if skip else ""
    )
    return _change(
        store, act, webhook_id, "webhook.skipped" if skip else "webhook.resumed",
        f"{past}state = 'active', failing_since = null, failure_count = 0, next_attempt_at = null",
    )


def test(store: Store, act: Act, webhook_id: str) -> dict[str, Any]:
    """Put an event of kind `webhook.test` behind what waits for it; raises `Conflict` if it is not active."""
    with store.transaction(act.scope) as connection:
        found = _resolve(connection, webhook_id)
        if found["state"] != "active":
            raise Conflict(f"Webhook {webhook_id!r} is {found['state']}.", mend=f"Run peaje webhooks resume {webhook_id}.")
        audit.append(connection, act, "webhook.tested", webhook_id, tenant_id=found["tenant_id"])
        tell(
            connection, act, outgoing.WEBHOOK_TEST, tenant_id=found["tenant_id"], webhook_id=webhook_id,
            data={"webhook_id": webhook_id, "request_id": act.request_id},
        )
        return _resolve(connection, webhook_id)


def deliveries(store: Store, act: Act, webhook_id: str, *, limit: int) -> list[dict[str, Any]]:
    """Its latest attempts, newest first: outcome, status, duration; never what was sent or answered."""
    with store.transaction(act.scope) as connection:
        _look_up(connection, webhook_id)
        return connection.execute(
            "select attempted_at, event_id::text as event_id, kind, event_count, outcome, status, duration_ms from webhook_attempt "
            "where webhook_id = %s order by attempt_id desc limit %s",
            (webhook_id, limit),
        ).fetchall()


def remove(store: Store, act: Act, webhook_id: str) -> dict[str, Any]:
    """Forget a webhook, its secrets and its attempts."""
    with store.transaction(act.scope) as connection:
        before = _resolve(connection, webhook_id)
        connection.execute("delete from webhook where webhook_id = %s", (webhook_id,))
        audit.append(connection, act, "webhook.removed", webhook_id, tenant_id=before["tenant_id"], before=before)
    return before


def set_customer(store: Store, act: Act, webhook_id: str, tenant: str, customer: str | None) -> dict[str, Any]:
    """Say what its receiver calls a tenant; None: nothing of its own."""
    if customer is not None and not (1 <= len(customer) <= CUSTOMER_LENGTH_MAX and customer.isprintable()):
        raise Invalid(f"A customer has 1 to {CUSTOMER_LENGTH_MAX} printable characters.")
    with store.transaction(act.scope) as connection:
        found = _resolve(connection, webhook_id)
        tenant_id = tenants.resolve(connection, tenant)["tenant_id"]
        if found["tenant_id"] not in (None, tenant_id):
            raise Invalid(f"Webhook {webhook_id!r} never hears of tenant {tenant_id!r}.")
        words = {"id": webhook_id, "tenant": tenant_id, "customer": customer}
        connection.execute("delete from webhook_customer where webhook_id = %(id)s and tenant_id = %(tenant)s", words)
        if customer is not None:
            connection.execute("insert into webhook_customer values (%(id)s, %(tenant)s, %(customer)s)", words)
        audit.append(
            connection, act, "webhook.customer_set", webhook_id, tenant_id=found["tenant_id"],
            after={"tenant": tenant_id, "customer": customer},
        )
    return {"webhook_id": webhook_id, "tenant_id": tenant_id, "customer": customer}


def _change(store: Store, act: Act, webhook_id: str, action: str, changes: str) -> dict[str, Any]:
    with store.transaction(act.scope) as connection:
        before = _resolve(connection, webhook_id)
        connection.execute(f"update webhook set {changes} where webhook_id = %(id)s", {"id": webhook_id})
        after = _resolve(connection, webhook_id)
        audit.append(connection, act, action, webhook_id, tenant_id=after["tenant_id"], before=before, after=after)
    return after


def _resolve(connection: Connection, webhook_id: str) -> dict[str, Any]:
    """One webhook, locked until the transaction ends; raises `NotFound`."""
    connection.execute("select from webhook where webhook_id = %s for update", (webhook_id,))
    return _look_up(connection, webhook_id)


def _look_up(connection: Connection, webhook_id: str) -> dict[str, Any]:
    found = connection.execute(f"select {_COLUMNS} from webhook where webhook_id = %s", (webhook_id,)).fetchone()
    if found is None:
        raise NotFound(f"There is no webhook {webhook_id!r}.", mend="See `peaje webhooks list`.")
    return found


def _refuse_too_many(connection: Connection, tenant_id: str | None) -> None:
    count = connection.execute(
        "select count(*) as count from webhook where tenant_id is not distinct from %s", (tenant_id,)
    ).fetchone()
    assert count is not None
    most = OF_ALL_MAX if tenant_id is None else PER_TENANT_MAX
    if count["count"] >= most:
        raise Conflict(f"There are {most} webhooks already.", mend="Remove one: `peaje webhooks remove`.")


def _kinds(asked: NewWebhook, *, may_hear: Collection[str], of_all: bool) -> list[str]:
    known = [kind for kind in outgoing.KINDS if of_all or kind != outgoing.PERIOD_CLOSED]
    if asked.events is None:
        if asked.format in outgoing.METERS_ONLY:
            return [outgoing.USAGE_HOUR]
        return [kind for kind in known if kind in may_hear and kind not in outgoing.USAGE_KINDS]
    kinds = sorted(set(asked.events))
    if not kinds:
        raise Invalid("A webhook hears at least one kind of event.")
    for kind in kinds:
        if kind not in outgoing.KINDS:
            raise Invalid("There is no such kind of event.", mend=f"Known: {', '.join(outgoing.KINDS)}.")
        if kind not in known:
            raise Invalid(f"{kind} is the platform's; a tenant hears {outgoing.INVOICE_CLOSED}.")
        if kind not in may_hear:
            raise Invalid(f"{kind} tells more than this operator may read.")
        if asked.format in outgoing.METERS_ONLY and kind not in outgoing.USAGE_KINDS:
            raise Invalid(f"A receiver of format {asked.format} takes usage only.", mend="Use usage.hour or usage.recorded.")
    if {outgoing.USAGE_RECORDED, outgoing.USAGE_HOUR} <= set(kinds):
        raise Invalid("usage.recorded and usage.hour tell the same tokens twice.", mend="Choose one.")
    return kinds


def _new_secret(mint: Mint) -> str:
    return _SECRET_PREFIX + base64.b64encode(mint.random_bytes(_SECRET_BYTES)).decode()


def _sealed(mint: Mint, secret: str, webhook_id: str) -> bytes:
    return seal(mint.peppers, secret, owner=webhook_id, random_bytes=mint.random_bytes)


def _credential(text: str) -> str:
    if not (1 <= len(text) <= CREDENTIAL_LENGTH_MAX and text.isascii() and text.isprintable() and " " not in text):
        raise Invalid(f"A receiver's token has 1 to {CREDENTIAL_LENGTH_MAX} printable ASCII characters without spaces.")
    return text
