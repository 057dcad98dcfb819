# SPDX-License-Identifier: Apache-2.0
"""Delivery: signed, in order, at least once, to whoever may hear; over a real Postgres to real receivers."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import threading
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from standardwebhooks.webhooks import Webhook as Verifier
from standardwebhooks.webhooks import WebhookVerificationError

from chassis.clock import utc_now
from metering.adapters import events_metrics as metrics
from metering.adapters import outbox
from metering.adapters.outbox import Outbox
from metering.events import Deliveries
from tests.integration.control_plane import ControlPlane
from tests.integration.event_desk import Desk, new_key, told, types
from tests.journals import rows
from tests.receivers import Got, Receiver, Reply, receiving


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


def test_a_slow_receivers_turn_ends_so_that_a_rotation_is_heard_of(
    desk: Desk, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two events of one webhook its secrets are read again."""
    monkeypatch.setattr("metering.events.TURN_SECONDS", 0.0)
    old = desk.add(receiver, tenant="acme", events=["key.created"])
    for _ in range(2):
        new_key(desk)
    desk.deliver()
    new = desk.ask(old, "rotate-secret", overlap="0s")
    assert 1 == len(receiver.got)
    desk.deliver()

    Verifier(new["secret"]).verify(receiver.got[1].body, receiver.got[1].headers)
    with pytest.raises(WebhookVerificationError):
        Verifier(old["secret"]).verify(receiver.got[1].body, receiver.got[1].headers)


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


def test_what_waits_is_measured(desk: Desk, receiver: Receiver) -> None:
    """How old the oldest is that an active webhook has not taken, how webhooks stand, and what came of each attempt."""
    def looked() -> outbox.Backlog:
        with psycopg.connect(desk.url, autocommit=True) as connection:
            return outbox.backlog(connection)

    def attempts(outcome: str) -> float:
        return float(metrics.WEBHOOK_ATTEMPTS.labels(outcome)._value.get())

    delivered, refused = attempts("delivered"), attempts("refused")
    nothing = looked()
    well = desk.add(receiver, tenant="acme", events=["key.created"])
    new_key(desk)
    with psycopg.connect(desk.url, autocommit=True) as connection:
        connection.execute("update outbox set recorded_at = recorded_at - interval '1 hour'")
    waits = looked()
    desk.ask(well, "pause")
    paused = looked()
    desk.ask(well, "resume")
    receiver.answer = lambda _: Reply(status=503)
    desk.deliver()
    receiver.answer = lambda _: Reply()
    desk.later = timedelta(hours=1)
    desk.deliver()
    after = looked()

    assert ({"active": 0, "paused": 0, "failed": 0}, 0, 0) == (nothing.counts, nothing.missed, nothing.oldest_seconds)
    assert {"active": 1, "paused": 0, "failed": 0} == waits.counts
    assert 3600 <= waits.oldest_seconds < 7200
    assert ({"active": 0, "paused": 1, "failed": 0}, 0) == (paused.counts, paused.oldest_seconds)
    assert 0 == after.oldest_seconds
    assert (delivered + 1, refused + 1) == (attempts("delivered"), attempts("refused"))


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


def test_whatever_fails_each_receiver_gets_every_event_in_order(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random refusals, and lives that end between a delivery and its being written down: repeats, no gap, no swap."""
    chance = random.Random(20261125)
    real = Outbox.succeeded

    async def forgetful(self: Outbox, *arguments: Any, **words: Any) -> None:
        if chance.random() < 0.2:
            raise psycopg.OperationalError("the connection is gone")
        await real(self, *arguments, **words)

    monkeypatch.setattr(Outbox, "succeeded", forgetful)
    names = [str(number) for number in range(12)]
    with receiving(lambda _: Reply(status=chance.choice([200, 200, 429, 503]))) as one, receiving() as two:
        failing = desk.add(one, tenant="acme", events=["key.created"])
        desk.add(two, tenant="acme", events=["key.created"])
        for name in names:
            new_key(desk, name=name)
        for _ in range(400):
            desk.deliver()
            desk.later += timedelta(minutes=16)
            if desk.show(failing)["behind_count"] == 0:
                break
        desk.deliver(steps=20)

        for receiver in (one, two):
            heard = [it["data"]["name"] for it in told(receiver)]
            assert names == list(dict.fromkeys(heard))
            # What is heard again is what was heard last.
            assert all(int(after) <= int(before) + 1 for before, after in itertools.pairwise(heard))
            assert all(int(after) >= int(before) for before, after in itertools.pairwise(heard))
            assert len(set(receiver.ids)) == len(names)
