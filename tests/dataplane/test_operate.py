# SPDX-License-Identifier: Apache-2.0
"""`peaje doctor` and `peaje top` on a running installation."""

from __future__ import annotations

import json
import subprocess
import time

from control.monitoring.rules import alerts, inlined
from tests.dataplane.installation import PEAJE, VISIBLE_SECONDS, Installation, Tenant, chat
from tests.house.test_dashboards import read_series
from tests.promql import names

#: Every part that the doctor must have looked at.
EXAMINED = {
    "parts", "Envoy", "services", "certificates", "Postgres", "clock of Postgres", "schema", "journals", "ledger", "partitions",
    "exchanges", "keys", "key sets", "webhooks", "clock of the store", "store", "disk", "limits", "scripts",
}  # fmt: skip


def examined(road: Installation) -> dict[str, dict[str, str]]:
    """The doctor's remarks by what they are about."""
    answer = road.run("doctor", "--json")
    remarks = json.loads(answer.stdout)["remarks"]
    assert (answer.returncode == 1) == any(one["level"] == "fault" for one in remarks), answer.stdout
    return {one["about"]: one for one in remarks}


def test_the_doctor_looks_at_everything_and_names_what_wants_a_look(road: Installation, tenant: Tenant) -> None:
    """A key that ends tomorrow is told of; no secret and no password is in what it says."""
    made = road.control("POST", f"/v1/tenants/{tenant.tenant_id}/keys", json={"name": "short", "expires": "1d"}).json()
    road.issued.append(made["key"])

    found = examined(road)

    assert set(found) == EXAMINED
    assert "look" == found["keys"]["level"]
    assert made["key_id"] in found["keys"]["says"]
    assert {"fine"} == {found[about]["level"] for about in ("services", "clock of Postgres", "schema", "partitions", "store")}
    text = json.dumps(found)
    for name in ("postgres-password", "valkey-password", "admin-token"):
        assert (road.home / "secrets" / name).read_text().strip() not in text
    road.cli("keys", "revoke", made["key_id"])


def test_top_shows_who_uses_what(road: Installation, tenant: Tenant) -> None:
    """Requests that end between its two looks; the view for people has the same tenants."""
    with subprocess.Popen(
        [PEAJE, "top", "--json", "--every", "4"], env=road.environment, stdout=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + VISIBLE_SECONDS
        sent = 0
        while process.poll() is None and time.monotonic() < deadline:
            assert 200 == road.post(tenant, json=chat("one two")).status_code
            sent += 1
            time.sleep(0.1)
        shown = json.loads(process.communicate()[0])

    [mine] = [one for one in shown["tenants"] if one["tenant"].startswith("tenant-") and one["requests_per_second"] > 0]
    assert 0 < mine["requests_per_second"] * shown["seconds"] <= sent
    assert mine["input_tokens_per_second"] > 0 < mine["output_tokens_per_second"]
    assert shown["lag_seconds"] < VISIBLE_SECONDS
    view = road.run("top", "--once", "--every", "0.5")
    assert 0 == view.returncode, view.stderr
    assert "ledger behind" in view.stdout
    assert "REQUESTS/s" in view.stdout


def test_what_rules_and_panels_read_of_envoy_is_shown_by_it(road: Installation, tenant: Tenant) -> None:
    """Once each thing that it counts has happened once: an error of ratelimit, an engine's 500. Ours: test_metrics.py."""
    read = {name for alert in alerts() for name in names(inlined(alert.expr))} | read_series()
    wanted = {name for name in read if name.startswith("envoy_")}
    assert len(wanted) > 10
    limited = road.new_tenant("series", rpm=100)
    road.post(tenant, json=chat(stream=True))
    road.post(tenant, json=chat(), fault={"error_before": 500})
    road.silence("ratelimit", lambda: road.post(limited, json=chat()))

    deadline = time.monotonic() + VISIBLE_SECONDS
    missing = wanted
    while missing and time.monotonic() < deadline:
        shown = {line.partition("{")[0] for line in road.scrape("envoy").splitlines() if not line.startswith("#")}
        missing = wanted - shown
        time.sleep(0.2)

    assert set() == missing


def test_the_log_level_changes_while_everything_runs(road: Installation, tenant: Tenant) -> None:
    """The collector tells of its batches at debug, and falls silent again; a level that is none is refused."""
    def batches() -> int:
        return (road.home / "log/collector.log").read_text().count('"event": "batch"')

    before = batches()
    assert {"log_level": "debug"} == road.cli("log-level", "debug")
    try:
        deadline = time.monotonic() + VISIBLE_SECONDS
        while batches() == before:
            assert time.monotonic() < deadline
            road.post(tenant, json=chat())
            time.sleep(0.2)
        assert 1 == road.run("log-level", "loud").returncode
    finally:
        assert {"log_level": "default"} == road.cli("log-level", "default")

    text = (road.home / "log/collector.log").read_text()
    assert '"log_level_changed"' in text
