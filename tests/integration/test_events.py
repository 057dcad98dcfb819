# SPDX-License-Identifier: Apache-2.0
"""Events out: from the transaction that did it to a real receiver, over a real Postgres."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import psycopg
import pytest
from cloudevents.core.bindings.http import HTTPMessage, from_http
from cloudevents.core.formats.json import JSONFormat
from psycopg_pool import AsyncConnectionPool
from standardwebhooks.webhooks import Webhook as Verifier
from standardwebhooks.webhooks import WebhookVerificationError

from chassis.clock import utc_now
from metering.adapters import notices, outbox
from metering.adapters.outbox import Outbox
from metering.adapters.sending import Sender
from metering.core.outgoing import BATCH_MAX
from metering.events import Deliveries
from tests.integration.control_plane import ControlPlane
from tests.journals import NOON, collect, end, exchanges, request_id, rows, write
from tests.receivers import Got, Receiver, Reply, receiving


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


@pytest.fixture
def desk(control: ControlPlane, postgres_url: str) -> Desk:
    """A desk with the tenants acme and rival; loopback is allowed."""
    object.__setattr__(control.services, "loopback_allowed", True)
    control.tenant("acme")
    control.tenant("rival")
    return Desk(control=control, url=postgres_url)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """One that is well."""
    with receiving() as receiver:
        yield receiver


def new_key(desk: Desk, tenant: str = "acme", name: str = "k") -> dict[str, Any]:
    return desk.control.made(f"/v1/tenants/{tenant}/keys", {"name": name})


def told(receiver: Receiver) -> list[dict[str, Any]]:
    return [json.loads(it.body) for it in receiver.got]


def types(receiver: Receiver) -> list[str]:
    return [it["type"] for it in told(receiver)]


def test_key_events_are_signed_so_that_the_official_library_says_yes(desk: Desk, receiver: Receiver) -> None:
    """Created, rotated, revoked, in order; nothing in them helps to use the key."""
    webhook = desk.add(receiver, tenant="acme", events=["key.created", "key.rotated", "key.revoked"])
    made = new_key(desk)
    desk.control.made(f"/v1/keys/{made['key_id']}/rotate", {"overlap": "1h"})
    desk.control.ask("POST", f"/v1/keys/{made['key_id']}/revoke")

    desk.deliver()

    assert ["key.created", "key.rotated", "key.revoked"] == types(receiver)
    for got in receiver.got:
        verified = Verifier(webhook["secret"]).verify(got.body, got.headers)
        assert ("acme", made["key_id"]) == (verified["data"]["tenant"], verified["data"]["key_id"])
        assert made["key"].encode() not in got.body and b"hash" not in got.body
    assert [("delivered", 200)] * 3 == desk.attempts(webhook)
    with pytest.raises(WebhookVerificationError):
        Verifier(webhook["secret"]).verify(receiver.got[0].body + b" ", receiver.got[0].headers)


def test_during_a_rotation_both_secrets_verify_and_afterwards_only_the_new_one(desk: Desk, receiver: Receiver) -> None:
    """Overlap, so that no receiver is ever without a right secret."""
    old = desk.add(receiver, tenant="acme")
    desk.control.clock.now = utc_now()
    new = desk.ask(old, "rotate-secret", overlap="1h")
    assert old["secret"] != new["secret"]
    new_key(desk)
    desk.deliver()
    during = receiver.got[-1]
    desk.later = timedelta(minutes=61)
    new_key(desk)
    desk.deliver()
    after = receiver.got[-1]

    for secret in (old["secret"], new["secret"]):
        Verifier(secret).verify(during.body, during.headers)
    assert 2 == len(during.headers["webhook-signature"].split()) and 1 == len(after.headers["webhook-signature"].split())


def test_a_repeated_event_has_the_id_it_had(desk: Desk, receiver: Receiver) -> None:
    """At least once: the process dies after the receiver has it and before that is written down."""
    webhook = desk.add(receiver, tenant="acme")
    new_key(desk)
    desk.deliver()
    with psycopg.connect(desk.url) as connection:
        connection.execute("update webhook set position = 0")

    desk.deliver()

    assert 2 == len(receiver.got) and 1 == len(set(receiver.ids))
    Verifier(webhook["secret"]).verify(receiver.got[1].body, receiver.got[1].headers)


def test_what_is_rolled_back_is_never_told(desk: Desk, receiver: Receiver) -> None:
    """The outbox is part of the transaction."""
    desk.add(receiver, tenant="acme")
    refused = desk.control.ask("POST", "/v1/tenants/acme/keys", json={"name": "x", "project": "nothing"})
    with psycopg.connect(desk.url) as connection:
        connection.execute("select tell('key.created', 'acme', now(), '{}')")
        connection.rollback()

    desk.deliver()

    assert (404, []) == (refused.status_code, receiver.got)


def test_order_holds_across_failures_and_a_dead_receiver_holds_nobody_else_up(desk: Desk, receiver: Receiver) -> None:
    """The second of three is refused twice: the third waits for it; the other webhook has all three meanwhile."""
    answers = iter([200, 503, 503])
    with receiving(lambda _: Reply(status=next(answers, 200))) as shaky:
        failing = desk.add(shaky, tenant="acme", events=["key.created"])
        well = desk.add(receiver, tenant="acme", events=["key.created"])
        names = ["first", "second", "third"]
        for name in names:
            new_key(desk, name=name)
        desk.deliver()

        assert names == [it["data"]["name"] for it in told(receiver)]
        assert ["first", "second"] == [it["data"]["name"] for it in told(shaky)]
        shown = desk.show(failing)
        assert ("active", 1, 2) == (shown["state"], shown["failure_count"], shown["behind_count"])
        desk.deliver()
        assert 2 == len(shaky.got), "not before its time"
        desk.later = timedelta(seconds=2)
        desk.deliver()
        desk.later = timedelta(seconds=10)
        desk.deliver()

        assert ["first", "second", "second", "second", "third"] == [it["data"]["name"] for it in told(shaky)]
        assert [("delivered", 200), ("refused", 503), ("refused", 503), ("delivered", 200), ("delivered", 200)] == desk.attempts(failing)
        assert (0, None, 0) == tuple(desk.show(failing)[name] for name in ("failure_count", "failing_since", "behind_count"))
        assert 0 == desk.show(well)["failure_count"]


def test_a_receiver_that_does_not_answer_is_left_after_a_bounded_time_and_others_do_not_wait(desk: Desk, receiver: Receiver) -> None:
    """Twenty that hang; the one that is well has its events while they do."""
    release = threading.Event()

    def hang(_: Got) -> Reply:
        release.wait(30)
        return Reply()

    with receiving(hang) as dead:
        stuck = [desk.add(dead, tenant="rival", events=["key.created"]) for _ in range(20)]
        desk.add(receiver, tenant="acme", events=["key.created"])
        new_key(desk, "rival")
        new_key(desk, "acme")

        async def work(deliveries: Deliveries) -> None:
            await deliveries.step()
            under_way = deliveries._under_way
            async with asyncio.timeout(20):
                while len(dead.got) < len(stuck) or sum(not task.done() for task in under_way.values()) > len(stuck):
                    await asyncio.sleep(0.01)
            assert len(stuck) == sum(not task.done() for task in under_way.values())
            assert 1 == len(receiver.got)
            await deliveries.finish()

        try:
            desk.run(work, total_seconds=4.0)
        finally:
            release.set()

    assert [("timeout", None)] == desk.attempts(stuck[0])


def test_a_webhook_that_fails_for_days_is_paused_told_of_and_resumed(desk: Desk) -> None:
    """What happened meanwhile is still sent; with --skip without the one that it could not be told."""
    status = [500]
    with receiving(lambda _: Reply(status=status[0])) as receiver:
        webhook = desk.add(receiver, tenant="acme", events=["key.created"])
        new_key(desk, name="poison")
        new_key(desk, name="good")
        for hours in (0, 24, 48, 72.1):
            desk.later = timedelta(hours=hours)
            desk.deliver()
        shown = desk.show(webhook)
        desk.later += timedelta(hours=1)
        desk.deliver()
        assert ("failed", 4, 4) == (shown["state"], shown["failure_count"], len(receiver.got))
        assert 409 == desk.control.ask("POST", f"/v1/webhooks/{webhook['webhook_id']}/test").status_code

        status[0] = 200
        resumed = desk.ask(webhook, "resume", skip=True)
        desk.deliver()

    assert ("active", 0, 1) == (resumed["state"], resumed["failure_count"], resumed["missed_count"])
    assert ["poison"] * 4 + ["good"] == [it["data"]["name"] for it in told(receiver)]


def test_a_receiver_that_is_gone_is_not_called_again(desk: Desk) -> None:
    """410, as Standard Webhooks has it."""
    with receiving(lambda _: Reply(status=410)) as receiver:
        webhook = desk.add(receiver, tenant="acme")
        new_key(desk)
        desk.deliver(steps=3)

        assert ("failed", 1) == (desk.show(webhook)["state"], len(receiver.got))


def test_a_paused_webhook_is_sent_nothing_and_has_everything_afterwards(desk: Desk, receiver: Receiver) -> None:
    """Pausing loses nothing within two weeks."""
    webhook = desk.add(receiver, tenant="acme", events=["key.created"])
    desk.ask(webhook, "pause")
    new_key(desk)
    desk.deliver()
    assert [] == receiver.got
    desk.ask(webhook, "resume")

    desk.deliver()

    assert ["key.created"] == types(receiver)


def test_a_test_event_goes_to_the_one_that_is_tested(desk: Desk, receiver: Receiver) -> None:
    """Whatever it listens to."""
    webhook = desk.add(receiver, tenant="acme", events=["budget.threshold"])
    with receiving() as other:
        desk.add(other, tenant="acme")
        desk.ask(webhook, "test")
        desk.deliver()

        assert (["webhook.test"], []) == (types(receiver), other.got)


def test_webhooks_of_a_tenant_hear_of_that_tenant_and_those_of_all_hear_everything(desk: Desk, receiver: Receiver) -> None:
    """Isolation, and the platform's view."""
    with receiving() as of_all:
        desk.add(receiver, tenant="acme", events=["key.created"])
        desk.add(of_all, events=["key.created"])
        new_key(desk, "rival", "theirs")
        new_key(desk, "acme", "ours")
        desk.deliver()

        assert ["ours"] == [it["data"]["name"] for it in told(receiver)]
        assert ["theirs", "ours"] == [it["data"]["name"] for it in told(of_all)]


def test_who_may_add_a_webhook_and_for_what(desk: Desk, receiver: Receiver) -> None:
    """A tenant-admin for its tenant, a billing-admin for all, and no kind of event that its role may not read."""
    tenant_admin, billing = desk.control.operator("tenant-admin", "acme"), desk.control.operator("billing-admin")

    own = desk.add(receiver, tenant_admin)
    of_all = desk.add(receiver, billing)

    def refused(token: str, **asked: Any) -> int:
        return int(desk.control.ask("POST", "/v1/webhooks", token, json={"url": receiver.url, **asked}).status_code)

    assert "acme" == own["tenant_id"] and "period.closed" not in own["events"]
    assert of_all["tenant_id"] is None and ["budget.threshold", "period.closed", "invoice.closed"] == of_all["events"]
    assert [404, 400, 400, 403, 403] == [
        refused(tenant_admin, tenant="rival"), refused(tenant_admin, events=["period.closed"]),
        refused(billing, events=["key.created"]), refused(desk.control.operator("developer", "acme")),
        refused(desk.control.operator("billing-reader")),
    ]
    listed = desk.control.ask("GET", "/v1/webhooks", tenant_admin).json()["webhooks"]
    assert [own["webhook_id"]] == [it["webhook_id"] for it in listed]
    assert not any("secret" == name for it in listed for name in it)


@pytest.mark.parametrize(
    "asked",
    [
        {"url": "http://example.com/x"}, {"url": "ftp://example.com"}, {"url": "https://u:p@example.com/"}, {"url": "https://"},
        {"url": "https://169.254.169.254/latest"}, {"url": "https://[::ffff:10.0.0.1]/"}, {"url": "https://10.1.2.3/"},
        {"url": "http://127.0.0.1:1/"}, {"url": "https://localhost.example:0/"},
        {"url": "https://exämple.com/"}, {"url": "https://example.com/" + "a" * 2000}, {"url": "https://example.com/#x"},
        {"format": "carrier-pigeon"}, {"events": []}, {"events": ["key.stolen"]}, {"events": ["usage.hour", "usage.recorded"]},
        {"format": "stripe"}, {"format": "lago", "token": "t", "events": ["key.created"]}, {"token": "with space"}, {"name": ""},
        {"colour": "blue"},
    ],
    ids=lambda asked: "-".join(f"{name}={str(value)[:30]}" for name, value in asked.items()),
)
def test_a_webhook_that_could_not_work_is_refused_and_changes_nothing(idle_control: ControlPlane, asked: dict[str, Any]) -> None:
    """One sentence, no row."""
    answer = idle_control.ask("POST", "/v1/webhooks", json={"url": "https://example.com/hook", **asked})

    assert 400 == answer.status_code, answer.text
    assert [] == idle_control.ask("GET", "/v1/webhooks").json()["webhooks"]


def test_secrets_are_sealed_and_shown_once(desk: Desk, receiver: Receiver) -> None:
    """Not in the database, not in the audit log, not in any later answer; another webhook's do not open."""
    made = desk.add(receiver, token="sk-receivers-own-key")
    everything = json.dumps([rows(desk.url, f"select to_jsonb(t)::text from {name} t") for name in ("webhook", "audit_event", "outbox")])

    assert made["secret"][6:] not in everything and "sk-receivers" not in everything
    assert "secret" not in desk.show(made) and "credential" not in desk.show(made)
    other = desk.add(receiver)
    with psycopg.connect(desk.url) as connection:
        connection.execute("update webhook set secret = (select secret from webhook where webhook_id = %s)", (made["webhook_id"],))
    new_key(desk)
    desk.deliver()

    assert {"sk-receivers-own-key"} == {it.headers["authorization"].removeprefix("Bearer ") for it in receiver.got}
    assert 1 == desk.show(other)["failure_count"]


def test_each_usage_row_is_a_cloudevent_for_openmeter(desk: Desk, receiver: Receiver, tmp_path: Path) -> None:
    """Written with the row, told once although the journal is read twice; read by the official library."""
    desk.add(receiver, format="cloudevents", events=["usage.recorded"])
    live = write(tmp_path / "journal/journal.jsonl", [end(1), end(2, tenant="rival", output=7)])
    collect(desk.url, live)
    with psycopg.connect(desk.url) as connection:
        connection.execute("delete from journal_position")
    collect(desk.url, live)

    desk.deliver()

    events = [from_http(HTTPMessage(headers=it.headers, body=it.body), JSONFormat()) for it in receiver.got]
    assert [request_id(1), request_id(2)] == [it.get_id() for it in events]
    assert [("peaje.usage.recorded", "test", "acme"), ("peaje.usage.recorded", "test", "rival")] == [
        (it.get_type(), it.get_source(), it.get_subject()) for it in events
    ]
    data = events[1].get_data()
    assert isinstance(data, dict)
    assert (3, 7, "reported", NOON) == (data["input_tokens"], data["output_tokens"], data["basis"], events[1].get_time())


def test_no_row_of_the_outbox_is_written_where_nobody_wants_usage(desk: Desk, receiver: Receiver, tmp_path: Path) -> None:
    """A webhook for keys costs the ledger a look."""
    desk.add(receiver, events=["key.created"])
    collect(desk.url, write(tmp_path / "journal/journal.jsonl", exchanges(50)))

    assert [(0,)] == rows(desk.url, "select count(*) from outbox")


def test_batches_are_bounded_and_hold_every_event_in_order(desk: Desk, receiver: Receiver, tmp_path: Path) -> None:
    """A hundred in a request, as OpenMeter takes them."""
    desk.add(receiver, format="cloudevents-batch", events=["usage.recorded"])
    count = 2 * BATCH_MAX + 1
    collect(desk.url, write(tmp_path / "journal/journal.jsonl", [end(n, at=NOON + timedelta(seconds=n)) for n in range(count)]))

    desk.deliver()

    batches = [json.loads(it.body) for it in receiver.got]
    assert [BATCH_MAX, BATCH_MAX, 1] == [len(it) for it in batches]
    assert [request_id(n) for n in range(count)] == [it["id"] for batch in batches for it in batch]
    assert {"application/cloudevents-batch+json"} == {it.headers["content-type"] for it in receiver.got}


def hour_ready(desk: Desk) -> None:
    """The journal is read past the hour, and webhooks listen since before it."""
    with psycopg.connect(desk.url) as connection:
        connection.execute("update journal_state set read_until = %s", (NOON + timedelta(hours=2),))
        connection.execute("update webhook set created_at = %s", (NOON - timedelta(hours=1),))


def test_hourly_sums_are_told_once_and_late_rows_as_the_difference(desk: Desk, receiver: Receiver, tmp_path: Path) -> None:
    """All that was told adds up to the ledger's hour."""
    desk.add(receiver, format="cloudevents", events=["usage.hour"])
    live = write(tmp_path / "journal/journal.jsonl", [end(1), end(2)])
    collect(desk.url, live)
    hour_ready(desk)
    counts = [desk.notice(notices.tell_hours, NOON + timedelta(minutes=minutes), back=notices.RECENT_HOURS) for minutes in (64, 66, 67)]
    write(live, [end(3, output=11)])
    collect(desk.url, live)
    hour_ready(desk)
    counts.append(desk.notice(notices.tell_hours, NOON + timedelta(hours=5), back=notices.RECENT_HOURS))

    desk.deliver()

    assert [0, 1, 0, 1] == counts
    data = [json.loads(it.body)["data"] for it in receiver.got]
    assert [(2, 6, 10, False), (1, 3, 11, True)] == [
        (it["request_count"], it["input_tokens"], it["output_tokens"], it["is_correction"]) for it in data
    ]
    assert 2 == len({json.loads(it.body)["id"] for it in receiver.got})


def test_an_hour_whose_journal_is_behind_waits(desk: Desk, receiver: Receiver, tmp_path: Path) -> None:
    """More may come."""
    desk.add(receiver, format="cloudevents", events=["usage.hour"])
    collect(desk.url, write(tmp_path / "journal/journal.jsonl", [end(1)]))
    with psycopg.connect(desk.url) as connection:
        connection.execute("update webhook set created_at = %s", (NOON,))
        connection.execute("update journal_state set read_until = %s", (NOON + timedelta(minutes=59),))

    assert 0 == desk.notice(notices.tell_hours, NOON + timedelta(hours=3), back=notices.RECENT_HOURS)


def test_lago_has_its_own_shape_and_knows_what_it_has(desk: Desk, tmp_path: Path) -> None:
    """A transaction id that it has is no failure."""
    duplicate = Reply(status=422, body=b'{"status":422,"error_details":{"transaction_id":["value_already_exist"]}}')
    replies = iter([duplicate])
    with receiving(lambda _: next(replies, Reply())) as receiver:
        webhook = desk.add(receiver, format="lago", token="lago-key", events=["usage.recorded"])
        path = f"/v1/webhooks/{webhook['webhook_id']}/customers/rival"
        desk.control.made(path, {"customer": "sub_42"}, method="PUT")
        collect(desk.url, write(tmp_path / "journal/journal.jsonl", [end(1), end(2, tenant="rival")]))
        desk.deliver()

        bodies = [json.loads(it.body)["event"] for it in receiver.got]
        assert [(request_id(1), "acme"), (request_id(2), "sub_42")] == [(it["transaction_id"], it["external_subscription_id"]) for it in bodies]
        assert ("peaje_usage", int(NOON.timestamp()), 5) == (bodies[0]["code"], bodies[0]["timestamp"], bodies[0]["properties"]["output_tokens"])
        assert "Bearer lago-key" == receiver.got[0].headers["authorization"]
        assert [("duplicate", 422), ("delivered", 200)] == desk.attempts(webhook)


def test_stripe_gets_a_meter_event_per_meter_with_a_stable_identifier(desk: Desk, tmp_path: Path) -> None:
    """A tenant that nobody has mapped to a customer is counted as missed, not sent and not waited for."""
    duplicate = Reply(status=400, body=b'{"error":{"message":"An event already exists with identifier x.","type":"invalid_request_error"}}')
    replies = iter([Reply(), duplicate])
    with receiving(lambda _: next(replies, Reply())) as receiver:
        webhook = desk.add(receiver, format="stripe", token="sk_test_1", events=["usage.recorded"])
        desk.control.made(f"/v1/webhooks/{webhook['webhook_id']}/customers/rival", {"customer": "cus_9"}, method="PUT")
        lines = [end(1), end(2, tenant="rival", input=4, output=6), end(3, tenant="rival", input=8, output=0)]
        collect(desk.url, write(tmp_path / "journal/journal.jsonl", lines))
        desk.deliver()

        forms = [{name: values[0] for name, values in parse_qs(it.body.decode()).items()} for it in receiver.got]
        assert [
            ("peaje_input_tokens", f"{request_id(2)}:input_tokens", "4"), ("peaje_output_tokens", f"{request_id(2)}:output_tokens", "6"),
            ("peaje_input_tokens", f"{request_id(3)}:input_tokens", "8"),
        ] == [(it["event_name"], it["identifier"], it["payload[value]"]) for it in forms]
        assert {("cus_9", str(int(NOON.timestamp())))} == {(it["payload[stripe_customer_id]"], it["timestamp"]) for it in forms}
        assert ("application/x-www-form-urlencoded", "Bearer sk_test_1") == (
            receiver.got[0].headers["content-type"], receiver.got[0].headers["authorization"]
        )
        assert (1, 0) == (desk.show(webhook)["missed_count"], desk.show(webhook)["behind_count"])
        assert ("duplicate", 400) in desk.attempts(webhook)


def test_thresholds_of_budgets_and_quotas_are_told_once_each(desk: Desk, receiver: Receiver, tmp_path: Path) -> None:
    """50, 80, 100 percent of 100 tokens this month; a raised limit is another budget."""
    desk.add(receiver, tenant="acme", events=["budget.threshold"])
    desk.control.made("/v1/tenants/acme/limits", {"monthly_tokens": 100}, method="PUT")
    live = tmp_path / "journal/journal.jsonl"

    def percents(number: int, output: int) -> list[int]:
        write(live, [end(number, input=0, output=output)])
        collect(desk.url, live)
        already = len(receiver.got)
        desk.notice(notices.tell_thresholds, NOON)
        desk.notice(notices.tell_thresholds, NOON)
        desk.deliver()
        return [it["data"]["percent"] for it in told(receiver)[already:]]

    assert [[], [50], [80, 100], []] == [percents(1, 49), percents(2, 1), percents(3, 55), percents(4, 10)]
    last = told(receiver)[-1]["data"]
    assert ("tokens", "calendar_month", 100, 105, "2026-11-01T00:00:00Z") == tuple(
        last[name] for name in ("unit", "period", "amount", "used", "window_starts_at")
    )
    desk.control.made("/v1/tenants/acme/limits", {"monthly_tokens": 200}, method="PUT")
    assert [50] == percents(5, 1)
    # A new month begins at nothing.
    desk.notice(notices.tell_thresholds, NOON + timedelta(days=30))
    assert [(4,)] == rows(desk.url, "select count(*) from event_told")


def test_a_key_that_is_about_to_expire_is_told_once(desk: Desk, receiver: Receiver) -> None:
    """A week before; not if it has a successor."""
    desk.add(receiver, tenant="acme", events=["key.expiring"])
    now = desk.control.clock.now
    soon = desk.control.made("/v1/tenants/acme/keys", {"name": "soon", "expires": "6d"})
    desk.control.made("/v1/tenants/acme/keys", {"name": "later", "expires": "8d"})
    rotated = desk.control.made("/v1/tenants/acme/keys", {"name": "rotated", "expires": "6d"})
    successor = desk.control.made(f"/v1/keys/{rotated['key_id']}/rotate", {"overlap": "1h"})
    desk.control.ask("POST", f"/v1/keys/{successor['key_id']}/revoke")

    counts = [desk.notice(notices.tell_expiring, now + timedelta(minutes=n)) for n in (1, 2)]
    desk.deliver()

    assert ([1, 0], [soon["key_id"]]) == (counts, [it["data"]["key_id"] for it in told(receiver)])


def test_a_closed_month_is_told_to_the_platform_and_each_tenants_invoice_to_it(desk: Desk, receiver: Receiver, tmp_path: Path) -> None:
    """With the root hash, and with the totals."""
    desk.control.clock.now = datetime(2026, 10, 1, tzinfo=UTC)
    desk.control.made("/v1/prices", {"model": "tiny", "input": "1", "output": "2"})
    collect(desk.url, write(tmp_path / "journal/journal.jsonl", [end(1), end(2, tenant="rival")]), now=datetime(2026, 12, 2, tzinfo=UTC))
    desk.control.clock.now = datetime(2026, 12, 2, tzinfo=UTC)
    token = desk.control.operator("platform-admin")
    with receiving() as of_all:
        desk.add(receiver, token, tenant="acme", events=["invoice.closed"])
        desk.add(of_all, token, events=["period.closed", "invoice.closed"])
        closed = desk.control.made("/v1/periods/2026-11/close", {}, token)
        desk.deliver()

        [mine] = told(receiver)
        assert ("2026-11", [{"currency": "USD", "amount_nano": 13_000, "amount": "0.000013"}]) == (mine["data"]["period"], mine["data"]["totals"])
        assert [("period.closed", None), ("invoice.closed", "acme"), ("invoice.closed", "rival")] == [
            (it["type"], it["data"]["tenant"]) for it in told(of_all)
        ]
        assert closed["root_hash"] == told(of_all)[0]["data"]["root_hash"]


def test_writers_that_overlap_are_read_in_the_order_of_their_positions(desk: Desk, receiver: Receiver) -> None:
    """A position that is seen has nothing unseen before it: the second writer waits for the first one's commit."""
    desk.add(receiver, events=["key.created"])
    tell = "select tell('key.created', 'acme', now(), jsonb_build_object('name', %s::text))"
    with psycopg.connect(desk.url) as first, psycopg.connect(desk.url) as second:
        first.execute(tell, ("first",))

        def tell_second() -> None:
            second.execute(tell, ("second",))
            second.commit()

        waiting = threading.Thread(target=tell_second)
        waiting.start()
        with psycopg.connect(desk.url, autocommit=True) as watch:
            blocked = "select exists (select from pg_locks where locktype = 'advisory' and not granted)"
            for _ in range(3000):
                if watch.execute(blocked).fetchone() == (True,):
                    break
        desk.deliver()
        assert [] == receiver.got
        first.commit()
        waiting.join(timeout=30)

    desk.deliver()

    assert ["first", "second"] == [it["data"]["name"] for it in told(receiver)]


def test_the_outbox_is_trimmed_by_its_rule_and_what_somebody_missed_is_counted(desk: Desk, receiver: Receiver) -> None:
    """A day after all have it; two weeks or too many rows whoever has not."""
    with receiving() as other:
        well = desk.add(receiver, tenant="acme", events=["key.created"])
        paused = desk.add(other, tenant="acme", events=["key.created"])
        desk.ask(paused, "pause")
        for n in range(3):
            new_key(desk, name=str(n))
        desk.deliver()

        def trimmed(**words: Any) -> tuple[int, list[str]]:
            later = words.pop("later", timedelta(0))
            with psycopg.connect(desk.url, autocommit=True) as connection:
                return outbox.trim(connection, utc_now() + later, **words)

        assert (0, []) == trimmed(later=timedelta(days=13))
        assert (1, [paused["webhook_id"]]) == trimmed(rows_max=2)
        assert (2, [paused["webhook_id"]]) == trimmed(later=timedelta(days=15))
        assert (3, 0) == (desk.show(paused)["missed_count"], desk.show(well)["missed_count"])
        desk.ask(paused, "resume")
        new_key(desk, name="after")
        desk.deliver()
        assert ["after"] == [it["data"]["name"] for it in told(other)]
        assert (0, []) == trimmed()
        assert (1, []) == trimmed(later=timedelta(days=1, minutes=1))


def test_attempts_are_kept_up_to_a_bound(desk: Desk, receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest ones."""
    webhook = desk.add(receiver, tenant="acme", events=["key.created"])
    with psycopg.connect(desk.url) as connection:
        connection.execute(
            "insert into webhook_attempt (webhook_id, attempted_at, event_id, kind, event_count, outcome, duration_ms) "
            "select %s, now(), gen_random_uuid(), 'key.created', n, 'delivered', 1 from generate_series(1, %s) n",
            (webhook["webhook_id"], outbox.ATTEMPTS_KEPT + 5),
        )
    with psycopg.connect(desk.url, autocommit=True) as connection:
        outbox.trim(connection, utc_now())

    assert [(outbox.ATTEMPTS_KEPT, 6)] == rows(desk.url, "select count(*), min(event_count) from webhook_attempt")


def test_webhooks_are_bounded_per_tenant(desk: Desk, receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the bound."""
    monkeypatch.setattr("control.webhooks.PER_TENANT_MAX", 2)
    answers = [
        desk.control.ask("POST", "/v1/webhooks", json={"url": receiver.url, "tenant": tenant}).status_code
        for tenant in ("acme", "acme", "acme", "rival")
    ]

    assert [201, 201, 409, 201] == answers


def test_removed_webhooks_are_sent_nothing_more(desk: Desk, receiver: Receiver) -> None:
    """And leave nothing."""
    webhook = desk.add(receiver, tenant="acme")
    new_key(desk)
    answer = desk.control.ask("DELETE", f"/v1/webhooks/{webhook['webhook_id']}")

    desk.deliver()

    assert (200, []) == (answer.status_code, receiver.got)
    assert [(0, 0)] == rows(desk.url, "select (select count(*) from webhook), (select count(*) from webhook_attempt)")


