# SPDX-License-Identifier: Apache-2.0
"""The second witness against a real ledger: what differs is an exception until somebody says why."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

from metering.adapters.invariants import verify
from metering.adapters.witness import AGE_MIN, Heard, Reconciliation
from metering.core.witness import Sighting
from tests.integration.control_plane import ControlPlane
from tests.journals import NOON, collect, end, images, periodic, request_id, rows, start, write_apart

EXCEPTIONS = "select request_id, kind, state, tenant_id, output_tokens, ledger_tenant_id, ledger_output_tokens from reconciliation_exception order by 1, 2"
LATER = NOON + AGE_MIN + timedelta(seconds=60)


@pytest.fixture
def live(tmp_path: Path) -> Path:
    """Where a journal's live file is."""
    return tmp_path / "journal" / "journal.jsonl"


def seen(number: int, *, tenant: str = "acme", output: int = 5, **changes: Any) -> Sighting:
    """What the witness says of an exchange that the journal has as `end(number)`."""
    facts: dict[str, Any] = {"input_tokens": 3, "output_tokens": output, "quantity": None, "started_at": NOON, "heard_at": NOON} | changes
    return Sighting(request_id=request_id(number), tenant_id=tenant, **facts)


def reconcile(url: str, *sightings: Sighting, heard: Heard | None = None) -> Heard:
    """Compare until nothing is left that can be."""
    heard = heard or Heard()
    heard.add(sightings)
    reconciliation = Reconciliation(url=url, heard=heard, clock=lambda: LATER, every_seconds=1)
    with psycopg.connect(url, autocommit=True, options="-c timezone=UTC") as connection:
        while reconciliation.step(connection, LATER):
            pass
    return heard


def test_what_agrees_is_counted_and_what_differs_is_an_exception(ledger_url: str, live: Path) -> None:
    """A row that is not there, another tenant's, other tokens; a witness that saw no usage says nothing of it."""
    write_apart(live, [line for number in range(1, 6) for line in (start(number), end(number))])
    collect(ledger_url, live, now=LATER)

    reconcile(
        ledger_url, seen(1), seen(2, tenant="bolt"), seen(3, output=9), seen(4, input_tokens=None, output_tokens=None), seen(9)
    )

    assert [
        (request_id(2), "tenant_differs", "open", "bolt", 5, "acme", 5),
        (request_id(3), "usage_differs", "open", "acme", 9, "acme", 5),
        (request_id(9), "row_missing", "open", "acme", 5, None, None),
    ] == rows(ledger_url, EXCEPTIONS)
    assert [(NOON, 2, 3)] == rows(ledger_url, "select * from witness_hour")


def test_images_that_the_witness_saw_otherwise_are_an_exception_until_the_row_says_the_same(ledger_url: str, live: Path) -> None:
    """Tokens agree, there are none; a row that comes late explains itself only with the same number of images."""
    none = {"input_tokens": None, "output_tokens": None}
    write_apart(live, [images(1, 2), images(2, 2)])
    collect(ledger_url, live, now=LATER)

    reconcile(ledger_url, seen(1, quantity=2, **none), seen(2, quantity=1, **none), seen(3, quantity=2, **none), seen(4, quantity=1, **none))
    write_apart(live, [images(3, 2), images(4, 2)])
    collect(ledger_url, live, now=LATER)
    reconcile(ledger_url)

    assert [
        (request_id(2), "usage_differs", "open", 1, 2), (request_id(3), "row_missing", "explained", 2, None),
        (request_id(4), "row_missing", "open", 1, None),
    ] == rows(ledger_url, "select request_id, kind, state, quantity, ledger_quantity from billing_reconciliation_v1 order by 1")


def test_heard_twice_it_is_one_exception(ledger_url: str, live: Path) -> None:
    """Killed between the commit and forgetting, it is compared again."""
    write_apart(live, [end(1)])
    collect(ledger_url, live, now=LATER)

    for _ in range(2):
        reconcile(ledger_url, seen(1, output=9))

    assert [(request_id(1), "usage_differs")] == [row[:2] for row in rows(ledger_url, EXCEPTIONS)]
    assert [(0, 1)] == rows(ledger_url, "select agreed_count, disagreed_count from witness_hour")


def test_nothing_is_judged_before_the_journal_was_read_past_it(ledger_url: str, live: Path) -> None:
    """Postgres or the collector was away: its rows are still to come."""
    write_apart(live, [end(1)])
    collect(ledger_url, live, now=NOON)

    heard = reconcile(ledger_url, seen(1), seen(2))
    assert [] == rows(ledger_url, EXCEPTIONS)

    collect(ledger_url, live, now=LATER)
    reconcile(ledger_url, heard=heard)
    assert [(request_id(2), "row_missing")] == [row[:2] for row in rows(ledger_url, EXCEPTIONS)]


def test_an_exchange_that_is_open_is_waited_for(ledger_url: str, live: Path) -> None:
    """Its end record was torn; once it is closed from its last checkpoint, the witness knows better."""
    write_apart(live, [start(1), periodic(1, output=4)])
    collect(ledger_url, live, now=LATER)
    heard = reconcile(ledger_url, seen(1))
    assert [] == rows(ledger_url, EXCEPTIONS)

    write_apart(live, [end(2, epoch="f" * 32)])
    collect(ledger_url, live, now=LATER)
    reconcile(ledger_url, heard=heard)

    assert [(request_id(1), "usage_differs", "open", "acme", 5, "acme", 4)] == rows(ledger_url, EXCEPTIONS)


def test_a_row_that_comes_after_all_explains_its_exception(ledger_url: str, live: Path) -> None:
    """If it agrees; one that does not stays open."""
    write_apart(live, [end(9)])
    collect(ledger_url, live, now=LATER)
    reconcile(ledger_url, seen(1), seen(2, output=7))

    write_apart(live, [end(1), end(2)])
    collect(ledger_url, live, now=LATER)
    reconcile(ledger_url)

    assert [(request_id(1), "explained"), (request_id(2), "open")] == rows(
        ledger_url, "select request_id, state from reconciliation_exception order by 1"
    )


def test_of_a_retired_day_nothing_is_said(ledger_url: str, live: Path) -> None:
    """Its rows are gone, which is no disagreement."""
    write_apart(live, [end(1)])
    collect(ledger_url, live, now=LATER)
    with psycopg.connect(ledger_url) as connection:
        connection.execute("insert into usage_retired values (%s, 1, %s)", (NOON.date() - timedelta(days=40), NOON))

    reconcile(ledger_url, seen(2, started_at=NOON - timedelta(days=40)), seen(1))

    assert [] == rows(ledger_url, EXCEPTIONS)


def test_a_contradiction_within_the_journal_is_an_exception_too(ledger_url: str, live: Path) -> None:
    """Once, however often it is read."""
    write_apart(live, [end(1), end(1, output=6), end(1, output=7)])

    collect(ledger_url, live)

    assert [(request_id(1), "conflict")] == [row[:2] for row in rows(ledger_url, EXCEPTIONS)]


def test_a_disagreement_that_was_removed_breaks_the_ledger(postgres_url: str, live: Path) -> None:
    """So does a conflict: nothing is dropped in silence, not even by the owner."""
    write_apart(live, [end(1), end(1, output=6)])
    collect(postgres_url, live, now=LATER)
    reconcile(postgres_url, seen(2))
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        assert verify(connection).holds
        with pytest.raises(psycopg.errors.RaiseException):
            connection.execute("delete from reconciliation_exception")
        connection.execute("alter table reconciliation_exception disable trigger user")
        connection.execute("delete from reconciliation_exception")

        broken = {verdict.invariant: verdict.examples for verdict in verify(connection).verdicts if verdict.violations}

    assert [["2026-11-12 12:00 UTC"], [request_id(1)]] == list(broken.values())


def test_a_month_with_an_open_exception_is_closed_once_each_is_explained_or_signed(
    control: ControlPlane, postgres_url: str, live: Path
) -> None:
    """By whom and why is kept and audited; decided is decided; `--exception` still overrules."""
    then = NOON.replace(year=2025)
    control.made("/v1/tenants", {"name": "acme"})
    write_apart(live, [end(1, at=then, input=0, output=0), end(2, at=then, input=0, output=0)])
    collect(postgres_url, live, now=control.services.clock())
    reconcile(postgres_url, seen(1, started_at=then, heard_at=then, output=9), seen(2, started_at=then, heard_at=then, tenant="bolt"))

    refused = control.ask("POST", "/v1/periods/2025-11/close", json={})
    assert 409 == refused.status_code
    assert "2 of its exchanges are told differently" in refused.json()["error"]["message"]
    first, second = [row["exception_id"] for row in control.ask("GET", "/v1/reconciliation?state=open").json()["exceptions"]]
    for note in ("", " ", "x" * 501, "a\nb"):
        assert 400 <= control.ask("POST", f"/v1/reconciliation/{first}/explain", json={"note": note}).status_code < 500
    assert 404 == control.ask("POST", "/v1/reconciliation/999/sign", json={"note": "why"}).status_code
    assert 404 == control.ask("POST", f"/v1/reconciliation/{2**70}/sign", json={"note": "why"}).status_code

    explained = control.ask("POST", f"/v1/reconciliation/{first}/explain", json={"note": "a known fault"})
    signed = control.ask("POST", f"/v1/reconciliation/{second}/sign", json={"note": "accepted"})

    assert ("explained", "signed") == (explained.json()["state"], signed.json()["state"])
    assert 409 == control.ask("POST", f"/v1/reconciliation/{first}/sign", json={"note": "again"}).status_code
    listed = control.ask("GET", "/v1/reconciliation").json()
    assert {"open": 0, "explained": 1, "signed": 1} == listed["counts"]
    assert {"agreed": 0, "disagreed": 2} == listed["witness"]
    assert 201 == control.ask("POST", "/v1/periods/2025-11/close", json={}).status_code
    actions = [row[0] for row in rows(postgres_url, "select action from audit_event order by sequence")]
    assert ["reconciliation.explained", "reconciliation.signed", "period.closed"] == actions[-3:]


def test_the_billing_role_reads_exceptions_by_their_view(ledger_url: str, live: Path) -> None:
    """And nothing else of them."""
    write_apart(live, [end(1)])
    collect(ledger_url, live, now=LATER)
    reconcile(ledger_url, seen(2))
    with psycopg.connect(ledger_url) as connection:
        connection.execute("set role peaje_billing")
        found = connection.execute("select tenant, kind, state, output_tokens from billing_reconciliation_v1").fetchall()
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute("select * from reconciliation_exception")

    assert [("acme", "row_missing", "open", 5)] == found
