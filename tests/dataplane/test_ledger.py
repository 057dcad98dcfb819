# SPDX-License-Identifier: Apache-2.0
"""Money, months and the journal's upkeep on a running installation."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet as pq
from standardwebhooks.webhooks import Webhook

from tests.dataplane.installation import VISIBLE_SECONDS, Installation, Tenant, chat
from tests.receivers import receiving
from tests.waiting import until


def test_a_price_becomes_an_amount_and_an_invoice(road: Installation, tmp_path: Path) -> None:
    """Set by the command line, charged by the collector, read by the billing team."""
    tenant = road.new_tenant("money")
    made = road.cli(
        "prices", "set", "--model", "tiny", "--tenant", tenant.tenant_id, "--input", "0.15", "--output", "0.60", "--cached", "0.075"
    )
    month = f"{datetime.now(UTC):%Y-%m}"

    for _ in range(3):
        road.post(tenant, json=chat(max_tokens=5))
    rows = road.rows(tenant, 3)

    assert ["0.15", "0.60", "0.075"] == [made[name] for name in ("input", "output", "cached")]
    assert [("USD", 3 * 150 + 5 * 600, made["rate_card_id"])] * 3 == [
        (row["currency"], row["amount_nano"], row["rate_card_id"]) for row in rows
    ]
    invoice = road.cli("invoice", "--tenant", tenant.tenant_id, "--month", month)
    assert [{"currency": "USD", "amount_nano": 10_350, "amount": "0.00001035"}] == invoice["totals"]
    [line] = csv.DictReader(io.StringIO(road.run("invoice", "--tenant", tenant.tenant_id, "--month", month, "--csv").stdout))
    assert ("3", "15", "0.00001035") == (line["request_count"], line["output_tokens"], line["amount"])
    assert "total USD 0.00001035" in road.run("invoice", "--tenant", tenant.tenant_id, "--month", month).stdout
    written = tmp_path / "invoice.parquet"
    of_month = ("invoice", "--tenant", tenant.tenant_id, "--month", month)
    assert 0 == road.run(*of_month, "--format", "parquet", "--out", str(written)).returncode
    assert [10_350] == [it["amount_nano"] for it in pq.read_table(written).to_pylist()]
    assert [(1, ""), (1, "")] == [
        (it.returncode, it.stdout) for it in (road.run(*of_month, "--format", "parquet"), road.run(*of_month, "--format", "csv", "--json"))
    ]
    assert made["rate_card_id"] in [it["rate_card_id"] for it in road.cli("prices", "list", "--in-force")["prices"]]
    refused = road.run("prices", "set", "--model", "tiny", "--input", "1e3", "--output", "1")
    assert (1, 1) == (refused.returncode, len(refused.stderr.splitlines()))
    not_over = road.run("period", "close", month, "--exception", "hurry")
    assert (1, f"{month} is not over. Close it next month.") == (not_over.returncode, not_over.stderr.strip())


def test_rotation_under_load_loses_no_row_and_the_replay_has_the_same_sums(small: Installation) -> None:
    """Envoy and the tap follow every rename; the ledger holds; its journal makes it again from nothing."""
    tenant = small.new_tenant("rotated")
    small.cli("prices", "set", "--model", "tiny", "--input", "1", "--output", "2")
    sent = []
    for _ in range(5):
        with ThreadPoolExecutor(8) as pool:
            sent += list(pool.map(lambda n: small.post(tenant, json=chat(stream=n % 2 == 0)), range(20)))
        time.sleep(6)  # the collector looks at the files every five seconds

    rows = small.rows(tenant, len(sent))

    assert {answer.headers["x-request-id"] for answer in sent} == {row["request_id"] for row in rows}
    old = [path for path in (small.home / "journal").iterdir() if path.name.startswith("journal-")]
    assert len(old) >= 3
    starts = {path.name for path in (small.home / "journal").iterdir() if path.name.startswith("starts-")}
    assert starts <= {path.name.replace("journal", "starts") for path in old}
    assert len(starts) >= 2
    live = (small.home / "journal/journal.jsonl").read_text().splitlines()
    last = {"DownstreamEnd"}
    small.post(tenant, json=chat())
    small.rows(tenant, len(sent) + 1)
    written = [json.loads(line)["type"] for line in (small.home / "journal/journal.jsonl").read_text().splitlines()[len(live):]]
    assert last == set(written)

    assert small.cli("journal", "verify")["ok"]
    verified = small.cli("ledger", "verify")
    assert verified["ok"]
    with small.database() as connection:
        connection.execute("create database replayed")
        replayed = small.cli("journal", "replay", "--into", _sibling(small, "replayed"))
        assert replayed["sums_digest"] == small.cli("ledger", "verify")["sums_digest"]


def test_a_closed_road_refuses_before_anything_is_lost(small: Installation) -> None:
    """What the collector does when the journal's disk is nearly full."""
    tenant = small.new_tenant("closed")
    assert 200 == small.post(tenant, json=chat()).status_code

    mark = small.home / "journal/closed"
    assert 503 == last_status(small, tenant, 503, before_each=mark.touch)
    # The collector itself takes the mark away, because the disk is not full.
    _wait_until_gone(mark)
    assert 200 == last_status(small, tenant, 200)


def test_the_ledger_has_what_the_engine_counted(small: Installation) -> None:
    """Between two quiet moments at least a minute apart, whatever was sent before: the very same tokens."""
    tenant = small.new_tenant("conserved")
    deadline = time.monotonic() + 200
    compared: list[dict[str, Any]] = []
    while time.monotonic() < deadline and not any(row["request_count"] for row in compared):
        small.post(tenant, json=chat(max_tokens=7))
        time.sleep(5)  # a quiet moment takes two seconds
        compared = small.sql("select * from conservation_check where state = 'compared'")

    assert any(row["request_count"] for row in compared)
    for row in compared:
        assert (row["engine_input_tokens"], row["engine_output_tokens"]) == (
            row["ledger_input_tokens"], row["ledger_output_tokens"]
        ), row


def test_a_start_that_cannot_be_written_refuses_the_request(small: Installation) -> None:
    """The disk is full: 503 in the caller's dialect, the engine is not asked, and all is well once there is room."""
    tenant = small.new_tenant("full")
    before = small.post(tenant, json=chat())

    with _full(small, small.home / "journal/starts.jsonl"):
        refused: list[httpx.Response] = []
        said: list[tuple[int, float]] = []
        deadline = time.monotonic() + 2 * VISIBLE_SECONDS
        # Each worker writes on to the file that it has open, for two seconds at most.
        while len(refused) < 10 and time.monotonic() < deadline:
            answer = small.post(tenant, json=chat(stream=len(refused) % 2 == 1))
            said.append((answer.status_code, answer.elapsed.total_seconds()))
            refused = [*refused, answer] if answer.status_code == 503 else []
            time.sleep(0.2)
    assert 200 == last_status(small, tenant, 200)

    assert 10 == len(refused), said
    assert {"service_unavailable"} == {it.json()["error"]["code"] for it in refused}
    rows = {row["request_id"]: row for row in small.rows(tenant, 2)}
    assert before.headers["x-request-id"] in rows
    ids = {it.headers["x-request-id"] for it in refused}
    assert set() == ids & small.truth().keys()
    assert {(0, 0, "none")} >= {(rows[i]["input_tokens"], rows[i]["output_tokens"], rows[i]["basis"]) for i in ids & rows.keys()}


def test_ends_that_envoy_could_not_write_are_rows_all_the_same_and_the_witness_tells(small: Installation) -> None:
    """Envoy drops what it cannot write without a word: the starts keep the row, the second witness knows its tokens."""
    tenant = small.new_tenant("endless")
    whole = small.post(tenant, json=chat(max_tokens=3)).headers["x-request-id"]
    small.rows(tenant, 1)

    with _full(small, small.home / "journal/journal.jsonl"):
        _reopen(small)
        # Its log is opened anew with the next record.
        small.post(tenant, json=chat())
        _wait_flushed(small)
        cut = {small.post(tenant, json=chat(max_tokens=7)).headers["x-request-id"] for _ in range(3)}
        asked = {"model": "tiny", "prompt": "a toll bridge", "n": 2}
        painted = small.post(tenant, "/v1/images/generations", json=asked).headers["x-request-id"]
        _wait_flushed(small)
        assert small.stat("filesystem.write_failed") > 0
    _reopen(small)
    assert 200 == small.post(tenant, json=chat()).status_code

    deadline = time.monotonic() + 60
    told: dict[str, dict[str, Any]] = {}
    while time.monotonic() < deadline and not cut | {painted} <= told.keys():
        time.sleep(0.5)
        told = {row["request_id"]: row for row in small.sql("select * from billing_reconciliation_v1 where tenant = %s", tenant.tenant_id)}
    rows = {row["request_id"]: row for row in small.rows(tenant, 7)}
    assert cut | {painted} <= told.keys()
    assert ("usage_differs", 2, 0) == (told[painted]["kind"], told[painted]["quantity"], told[painted]["ledger_quantity"])
    assert {("usage_differs", "open", 7)} == {(told[i]["kind"], told[i]["state"], told[i]["output_tokens"]) for i in cut}
    assert {("lost", "checkpoint", 0)} == {(rows[i]["outcome"], rows[i]["basis"], rows[i]["output_tokens"]) for i in cut}
    assert "reported" == rows[whole]["basis"]
    assert whole not in told
    listed = small.cli("reconcile", "list", "--state", "open")
    for row in listed["exceptions"]:
        assert "signed" == small.cli("reconcile", "sign", str(row["exception_id"]), "--note", "the disk was full")["state"]
    listed = small.cli("reconcile", "list")
    assert 0 == listed["counts"]["open"]
    # What came before and after, however few tests ran before this one.
    assert listed["witness"]["agreed"] >= 2
    assert small.cli("ledger", "verify")["ok"]


@contextmanager
def _full(small: Installation, path: Path) -> Iterator[None]:
    """
    Have every write to *path* fail as on a full disk; what is there already stays to be read.

    The collector stands still meanwhile: it would rotate the file that is none.
    """
    collector = small.pid("collector")
    os.kill(collector, signal.SIGSTOP)
    path.rename(path.with_name(f"{path.name}.{time.time_ns()}"))
    path.symlink_to("/dev/full")
    try:
        yield
    finally:
        path.unlink()
        os.kill(collector, signal.SIGCONT)


def _reopen(small: Installation) -> None:
    httpx.post(f"http://127.0.0.1:{small.admin_port}/reopen_logs", timeout=10).raise_for_status()


def _wait_flushed(small: Installation) -> None:
    """Wait until Envoy holds no record back, be it that it has lost them."""
    # A record is made a little after its answer has been read.
    time.sleep(0.3)
    until(lambda: small.stat("filesystem.write_total_buffered") == 0)


def last_status(small: Installation, tenant: Tenant, wanted: int, before_each: Callable[[], None] = lambda: None) -> int:
    """The status of the last request, sent again and again until it is the *wanted* one or the time is over."""
    deadline = time.monotonic() + VISIBLE_SECONDS
    status = 0
    while time.monotonic() < deadline and status != wanted:
        before_each()
        status = small.post(tenant, json=chat()).status_code
        time.sleep(0.2)
    return status


def _wait_until_gone(path: Path) -> None:
    deadline = time.monotonic() + VISIBLE_SECONDS
    while path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def _sibling(installation: Installation, database: str) -> str:
    state = json.loads((installation.home / "run/state.json").read_text())
    password = (installation.home / "secrets/postgres-password").read_text().strip()
    url = state["postgres_url"]
    return f"{url.rpartition('/')[0].replace('@', f':{password}@', 1)}/{database}"


def test_credits_are_what_a_tenant_may_spend(road: Installation) -> None:
    """402 once they are used up, 200 with the next grant; the books have what the ledger charged."""
    tenant = road.new_tenant("prepaid")
    asked = ("--tenant", tenant.tenant_id)
    # A request costs 0.008 and may cost a little more: the second one does not fit.
    road.cli("prices", "set", "--model", "tiny", *asked, "--input", "1000", "--output", "1000")
    road.cli("credits", "grant", "0.06", *asked, "--reason", "first payment")
    assert 402 == last_status(road, tenant, 402)
    road.cli("credits", "grant", "1000", *asked, "--reason", "second payment", "--expires", "365d")
    assert 200 == last_status(road, tenant, 200)

    def agree() -> bool:
        query = "select coalesce(sum(amount_nano), 0)::bigint as nano from billing_usage_v1 where tenant = %s"
        [charged] = road.sql(query, tenant.tenant_id)
        return charged["nano"] > 0 and 1_000_060_000_000 - charged["nano"] == road.cli("credits", "show", *asked)["available_nano"]

    until(agree)


def test_events_reach_a_receiver_through_the_death_of_their_process(small: Installation) -> None:
    """Each request as a CloudEvent, a key, a budget; killed between two of them, nothing is lost and ids tell repeats."""
    tenant = small.new_tenant("heard")
    with receiving() as receiver:
        asked = ("--tenant", tenant.tenant_id, "--format", "cloudevents", "--events", "usage.recorded,budget.threshold,key.created")
        webhook = small.cli("webhooks", "add", receiver.url, *asked)
        small.cli("limits", "set", "--tenant", tenant.tenant_id, "--monthly-tokens", "40", "--soft")
        sent = [small.post(tenant, json=chat()).headers["x-request-id"]]
        until(lambda: receiver.got)
        small.wait_restarted("events", small.kill("events"))
        sent += [small.post(tenant, json=chat()).headers["x-request-id"] for _ in range(2)]
        key = small.cli("keys", "create", "--tenant", tenant.tenant_id)

        def heard(kind: str) -> list[dict[str, Any]]:
            events = [json.loads(it.body) for it in receiver.got]
            return [it for it in events if it["type"] == f"peaje.{kind}"]

        until(lambda: {it["id"] for it in heard("usage.recorded")} >= set(sent) and heard("key.created") and heard("budget.threshold"))
        assert key["key_id"] == heard("key.created")[0]["data"]["key_id"]
        assert 50 == heard("budget.threshold")[0]["data"]["percent"]
        verified = Webhook(webhook["secret"])
        for got in receiver.got:
            verified.verify(got.body, got.headers)
        shown = small.cli("webhooks", "show", webhook["webhook_id"])
        assert ("active", 0) == (shown["state"], shown["failure_count"])
        assert {"delivered"} == {it["outcome"] for it in small.cli("webhooks", "deliveries", webhook["webhook_id"])["deliveries"]}
        small.cli("webhooks", "remove", webhook["webhook_id"])
