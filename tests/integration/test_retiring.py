# SPDX-License-Identifier: Apache-2.0
"""A journal whose Envoy is gone for good: nothing waits for it any more, and nothing that is known of it is lost."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

from metering.adapters import retiring
from metering.adapters import witness_metrics as metrics
from metering.adapters.invariants import verify
from tests.integration.control_plane import ControlPlane
from tests.integration.test_reconciliation import reconcile, seen
from tests.journals import (
    NOON,
    collect,
    collecting,
    end,
    lease_id,
    periodic,
    request_id,
    rows,
    start,
    write,
    write_apart,
)

#: In a month that was over when the control plane's clock stands.
THEN = NOON.replace(year=2025)
#: After the one that is gone was read for the last time.
LATER = THEN + timedelta(minutes=5)


@pytest.fixture
def live(tmp_path: Path) -> Path:
    """Where a journal's live file is."""
    return tmp_path / "journal" / "journal.jsonl"


@pytest.fixture
def plane(control: ControlPlane, postgres_url: str, live: Path) -> ControlPlane:
    """With a journal that is read, and one that was left in the middle of its month, with three exchanges under way."""
    control.tenant("acme")
    facts: dict[str, Any] = {"at": THEN, "input": 0, "output": 0}
    collect(postgres_url, write_apart(live, [start(1, at=THEN), end(1, **facts)]), now=control.clock())
    gone = write_apart(live.parent.parent / "gone/journal.jsonl", [start(number, at=THEN, lease=lease_id(number)) for number in (2, 3, 4)])
    write(gone, [periodic(3, at=THEN, output=7, lease=lease_id(3)), end(5, **facts)])
    collect(postgres_url, gone, journal="gone", now=THEN + timedelta(minutes=1))
    return control


def retire(plane: ControlPlane, journal: str = "gone", **changes: str) -> tuple[int, str]:
    """Status, and what was said."""
    body = {"reason": "its node burnt down", "files": "gone"} | changes
    answer = plane.ask("POST", f"/v1/journals/{journal}/retire", json=body)
    return answer.status_code, answer.text


def test_a_retired_journal_holds_back_neither_a_month_nor_a_comparison(plane: ControlPlane, postgres_url: str) -> None:
    """What was heard of its exchanges becomes their rows, flagged; who did it and why is kept."""
    refused = plane.ask("POST", "/v1/periods/2025-11/close", json={})
    heard = reconcile(postgres_url, seen(5, started_at=THEN, heard_at=LATER, input_tokens=0, output=0))
    assert "gone was last read to its end at" in refused.json()["error"]["message"]
    assert 1 == len(heard.before(NOON + timedelta(days=1)))
    assert 300 * 24 * 3600 < metrics.JOURNALS_BEHIND_SECONDS._value.get()

    status, said = retire(plane)

    assert 200 == status, said
    assert [("lost", "checkpoint", 0), ("lost", "checkpoint", 7), ("lost", "checkpoint", 0)] == rows(
        postgres_url, "select outcome, basis, output_tokens from usage_event where request_id = any(%s) order by request_id",
        [request_id(number) for number in (2, 3, 4)],
    )
    assert [(lease_id(2), 0), (lease_id(3), 7), (lease_id(4), 0)] == rows(
        postgres_url, "select lease_id, output_tokens from lease_use order by 1"
    )
    assert [] == reconcile(postgres_url, heard=heard).before(NOON + timedelta(days=1))
    closed = plane.ask("POST", "/v1/periods/2025-11/close", json={"exception": "no price"})
    assert 201 == closed.status_code
    listed = plane.ask("GET", "/v1/journals").json()
    assert ["local"] == [it["journal"] for it in listed["journals"]]
    assert [("gone", "its node burnt down", 3, "gone")] == [
        (it["journal"], it["reason"], it["closed_count"], it["files"]) for it in listed["retired"]
    ]
    assert ("journal.retired", "gone") in rows(postgres_url, "select action, object from audit_event")
    with psycopg.connect(postgres_url) as connection:
        assert verify(connection).holds


def test_more_open_exchanges_than_one_step_takes_are_all_closed(
    plane: ControlPlane, postgres_url: str, live: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step by step, in one transaction."""
    monkeypatch.setattr(retiring, "STEP_MAX", 2)

    assert 200 == retire(plane)[0]

    assert [(0,)] == rows(postgres_url, "select count(*) from open_exchange")
    assert [(5,)] == rows(postgres_url, "select count(*) from usage_event")


def test_a_journal_that_is_alive_is_not_retired(plane: ControlPlane, postgres_url: str, live: Path) -> None:
    """One that a collector reads, however slowly; one that was read just now; one that nobody knows."""
    with collecting(postgres_url, live.parent.parent / "gone/journal.jsonl", journal="gone"):
        reads = retire(plane)
    lately = retire(plane, "local")
    unknown = retire(plane, "nobody")

    assert (409, True) == (reads[0], "A collector reads" in reads[1])
    assert (409, True) == (lately[0], "less than 5 minutes ago" in lately[1])
    assert 404 == unknown[0]
    assert [(2,)] == rows(postgres_url, "select count(*) from journal_state")
    assert [(3,)] == rows(postgres_url, "select count(*) from open_exchange")


@pytest.mark.parametrize("changes", [{"reason": ""}, {"reason": " "}, {"reason": "x" * 501}, {"reason": "a\nb"}, {"files": "perhaps"}])
def test_a_retirement_without_a_reason_is_refused_and_changes_nothing(
    plane: ControlPlane, postgres_url: str, changes: dict[str, str]
) -> None:
    """One clear error."""
    assert 400 <= retire(plane, **changes)[0] < 500

    assert [(2,)] == rows(postgres_url, "select count(*) from journal_state")


def test_who_may_not_close_months_may_not_retire_a_journal(plane: ControlPlane) -> None:
    """Nor may a tenant's own administrator see which there are."""
    for role, tenant in (("auditor", None), ("developer", "acme"), ("tenant-admin", "acme")):
        token = plane.operator(role, tenant)
        assert 403 == plane.ask("POST", "/v1/journals/gone/retire", token, json={"reason": "why", "files": "gone"}).status_code
    assert 403 == plane.ask("GET", "/v1/journals", plane.operator("tenant-admin", "acme")).status_code


def test_a_journal_that_is_read_again_after_all_is_there_again(plane: ControlPlane, postgres_url: str, live: Path) -> None:
    """What it still tells of an exchange that was closed contradicts it, and is kept for a person."""
    gone = live.parent.parent / "gone/journal.jsonl"
    assert 200 == retire(plane)[0]
    write(gone, [end(2, at=THEN, output=9), end(6, at=THEN)])

    collect(postgres_url, gone, journal="gone", now=THEN + timedelta(hours=1))

    assert ["gone", "local"] == [it["journal"] for it in plane.ask("GET", "/v1/journals").json()["journals"]]
    assert [("lost", 0), ("ok", 5)] == rows(
        postgres_url, "select outcome, output_tokens from usage_event where request_id = any(%s) order by request_id",
        [request_id(2), request_id(6)],
    )
    assert [("conflict", request_id(2))] == rows(postgres_url, "select kind, request_id from reconciliation_exception")
    with psycopg.connect(postgres_url) as connection:
        assert verify(connection).holds


def test_what_the_witness_saw_and_only_lost_records_could_tell_is_an_exception(plane: ControlPlane, postgres_url: str) -> None:
    """Somebody has to answer for it before its month closes."""
    retire(plane)

    reconcile(postgres_url, seen(8, started_at=THEN, heard_at=LATER))

    assert [("row_missing", request_id(8))] == rows(postgres_url, "select kind, request_id from reconciliation_exception")
