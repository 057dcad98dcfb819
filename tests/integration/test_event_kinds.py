# SPDX-License-Identifier: Apache-2.0
"""What is told and in which form: usage, hours, budgets, keys, months; CloudEvents, Lago, Stripe."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import parse_qs

import psycopg
from cloudevents.core.bindings.http import HTTPMessage, from_http
from cloudevents.core.formats.json import JSONFormat

from metering.adapters import notices
from metering.core.outgoing import BATCH_MAX
from tests.integration.event_desk import Desk, hour_ready, told
from tests.journals import NOON, collect, end, exchanges, images, request_id, rows, write
from tests.receivers import Receiver, Reply, receiving


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


def test_many_hours_are_told_some_at_a_time_and_each_once(desk: Desk, receiver: Receiver, tmp_path: Path) -> None:
    """The outbox's lock is held for as many as a look may tell."""
    desk.add(receiver, format="cloudevents-batch", events=["usage.hour"])
    lines = [end(n, model=f"m{n}") for n in range(5)]
    collect(desk.url, write(tmp_path / "journal/journal.jsonl", lines))
    hour_ready(desk)

    counts = [desk.notice(notices.tell_hours, NOON + timedelta(hours=3), back=notices.RECENT_HOURS, most=2) for _ in range(4)]
    desk.deliver()

    assert [2, 2, 1, 0] == counts
    assert {f"m{n}" for n in range(5)} == {it["data"]["model"] for got in receiver.got for it in json.loads(got.body)}


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
        lines.append(images(4, 2, tenant="rival"))
        collect(desk.url, write(tmp_path / "journal/journal.jsonl", lines))
        desk.deliver()

        forms = [{name: values[0] for name, values in parse_qs(it.body.decode()).items()} for it in receiver.got]
        assert [
            ("peaje_input_tokens", f"{request_id(2)}:input_tokens", "4"), ("peaje_output_tokens", f"{request_id(2)}:output_tokens", "6"),
            ("peaje_input_tokens", f"{request_id(3)}:input_tokens", "8"), ("peaje_images", f"{request_id(4)}:images", "2"),
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


def test_a_closed_month_is_told_to_the_platform_and_each_tenants_invoice_to_it(
    fresh_desk: Desk, receiver: Receiver, tmp_path: Path
) -> None:
    """With the root hash, and with the totals."""
    desk = fresh_desk
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
