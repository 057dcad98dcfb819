# SPDX-License-Identifier: Apache-2.0
"""What Envoy did not settle is settled from the ledger."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime, timedelta

import psycopg
import pytest

from chassis.stores.postgres import read_pool
from ratelimit.adapters.counters import StoredCounters, connect
from ratelimit.adapters.sweep import AGE_MIN, ORPHAN_AGE_MIN, Sweep
from ratelimit.core.demand import Kind
from ratelimit.core.limits import Unit
from tests.integration.test_ratelimit_stores import demand, seeds

LEASES = "peaje:{sweep}:leases"


LATE, EARLY = ORPHAN_AGE_MIN + timedelta(seconds=10), ORPHAN_AGE_MIN - timedelta(seconds=10)


@pytest.mark.parametrize(
    ("known_as", "age", "epoch", "own_read", "other_read", "kept"),
    [
        ("ended", AGE_MIN + timedelta(seconds=1), "life", True, True, False),
        ("ended", timedelta(seconds=1), "life", True, True, True),
        ("under way", timedelta(hours=1) - timedelta(seconds=60), "life", True, True, True),
        ("nothing", EARLY, "life", True, True, True),
        ("nothing", LATE, "life", True, True, False),
        ("nothing", LATE, "life", False, True, True),
        ("nothing", LATE, "life", True, False, False),
        ("nothing", LATE, "never read", True, True, True),
        ("nothing", LATE, "life~1", True, True, False),
        ("nothing", LATE, "life~1", False, True, True),
        ("nothing", LATE, "", True, True, False),
        ("nothing", LATE, "", True, False, True),
    ],
    ids=[
        "ended", "Envoy's to settle", "a long stream", "not yet read", "never reached an engine", "its journal stands still",
        "another journal stands still", "no journal of its Envoy", "an heir", "an heir's journal stands still",
        "Envoy unknown", "Envoy unknown, a journal stands still",
    ],
)  # fmt: skip
def test_a_reservation_is_settled_when_its_exchange_is_known_to_be_over(
    postgres_url: str, counter_store: str, *, known_as: str, age: timedelta, epoch: str, own_read: bool, other_read: bool, kept: bool
) -> None:
    """And not before: what may still be under way keeps its slot and its tokens."""
    store = connect(counter_store, cluster=False)
    store.delete(*store.keys("peaje:{sweep}:*") or ["none"])
    stored = StoredCounters(store)
    tokens = demand("sweep", amount=100, kinds=(Kind.QUOTA, Kind.LEASES))
    requests = dataclasses.replace(tokens.counters[0], name="peaje:{sweep}:requests", unit=Unit.REQUESTS, full=1, lean=1)
    asked = dataclasses.replace(tokens, counters=(*tokens.counters, requests), epoch=epoch)
    stored.take(asked, seeds(asked))
    now = datetime.now(UTC) + age
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        for journal, is_read in (("own", own_read), ("other", other_read)):
            connection.execute("insert into journal_state values (%s, %s)", (journal, now if is_read else now - age))
        connection.execute("insert into journal_stream (journal, stream, epoch) values ('own', 's', 'now'), ('other', 's', 'another')")
        connection.execute("insert into ended_life (journal, epoch, ended_at) values ('own', 'life', now())")
        # A file that was rotated away long ago and is kept for a replay.
        connection.execute("insert into journal_position values ('own', 'f', 1, %s)", (now - timedelta(days=1),))
        if known_as == "ended":
            connection.execute(
                "insert into usage_event (request_id, tenant_id, project_id, key_id, model, dialect, started_at, ended_at, "
                "status, outcome, input_tokens, output_tokens, cached_tokens, reasoning_tokens, basis, streamed, recorded_at) "
                "values (%s, 'sweep', 'default', 'k', 'm', 'openai.chat', now(), now(), 200, 'ok', 7, 8, 0, 0, 'reported', "
                "false, now())",
                (asked.request_id,),
            )
        if known_as == "under way":
            connection.execute(
                "insert into open_exchange values (%s, now(), now(), 'j', 'e', '{}')", (asked.request_id,)
            )
    pool = read_pool(postgres_url, name="test", connections=1)

    settled = Sweep(stored, pool, lambda: ["sweep"]).run(now)

    pool.close()
    assert (int(not kept), int(kept)) == (settled, store.zcard(LEASES))
    used = (b"15", b"1") if known_as == "ended" and not kept else (b"0", b"0")
    assert used == tuple(store.hget(f"peaje:{{sweep}}:{name}", "used") for name in ("quota", "requests"))
