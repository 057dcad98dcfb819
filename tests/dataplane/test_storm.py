# SPDX-License-Identifier: Apache-2.0
"""The short form of the kill storm: every part dies under load that misbehaves, and the bill is the engine's truth."""

from __future__ import annotations

import threading
import time

from tests.chaos.storm import DISCONNECTS, INEXACT_SHARE_MAX, TENANTS, Storm, down, judge
from tests.dataplane.installation import Installation

#: A quarter of a minute of two cores. `--chaos` has the long form.
_REQUESTS = 12_000


def test_a_kill_storm_loses_no_row_doubles_none_and_charges_nobody_else(road: Installation) -> None:
    """Exact rows equal the engine's truth; those that Envoy took with it are flagged, and hardly any other is inexact."""
    storm = Storm(road=road, requests=_REQUESTS, seed=20261125, between=2.0, requests_per_envoy_death=_REQUESTS // 3)

    storm.rage()
    report = judge(storm, storm.settled())

    print(report)
    assert {} == report["wrong"]
    assert report["rows"] > _REQUESTS / 2
    assert report["disconnects"] > _REQUESTS * DISCONNECTS / 4
    assert report["inexact_otherwise"]["share"] <= INEXACT_SHARE_MAX
    with_envoy = report["inexact_with_their_envoy"]
    assert with_envoy["under_way"] <= with_envoy["under_way_at_most"]
    assert sum(storm.deaths.values()) > 3
    exceptions = road.sql(
        "select e.request_id, e.kind, u.outcome from reconciliation_exception e left join usage_event u using (request_id) "
        "where e.tenant_id = any(%s)", [tenant.tenant_id for tenant in storm.tenants],
    )  # fmt: skip
    # Envoy told the witness and was killed before it told the journal: known, kept, and of no other row.
    assert {("usage_differs", "lost")} >= {(row["kind"], row["outcome"]) for row in exceptions}, exceptions


def test_postgres_away_under_load_loses_no_row(road: Installation) -> None:
    """Known callers pass all the while; the journal is the buffer, and the rows come when Postgres does."""
    outage(road, seconds=5.0, requests=1200)


def outage(road: Installation, *, seconds: float, requests: int) -> None:
    """Postgres is away for *seconds* while *requests* are sent."""
    storm = Storm(road=road, requests=requests, seed=2, between=1.0, parts=())
    load = threading.Thread(target=storm.rage)
    load.start()
    # Until every tenant is known to extauth.
    while load.is_alive() and len(set(storm.heard.tenants.values())) < TENANTS:
        time.sleep(0.05)

    with down(road, "postgres"):
        before = len(storm.heard.tenants)
        time.sleep(seconds)
        passed = len(storm.heard.tenants) - before
    load.join()
    report = judge(storm, storm.settled())

    assert {} == report["wrong"]
    assert passed > 50
    # Only Postgres was away: nothing is a guess.
    assert 0 == report["inexact"]
