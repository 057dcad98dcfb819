# SPDX-License-Identifier: Apache-2.0
"""Every part of the road gets a new process, one after another, under load: nobody is refused, nothing is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.dataplane.installation import VISIBLE_SECONDS, Installation, chat

CLIENTS = 4
#: Requests that must pass after each process is back.
PASSED_MIN = 20
#: One of each kind: its siblings are asked meanwhile, where it has any.
PARTS = ("extauth", "ratelimit", "metering", "collector", "events", "beacon", "control")
#: Of a stream that Envoy's old process goes on with: longer than a new one takes to start.
_EVENTS, _EVENT_MS = 40, 150
#: Edits of the bootstrap, each acting with a restart.
_ONCE, _TWICE = ("1s", "2s"), ("2s", "1s")


@pytest.mark.chaos
def test_each_process_ends_in_order_and_nobody_notices(fleet: Installation) -> None:
    """Requests of both kinds, asked about each time; as many rows as answers, each told by the engine."""
    tenant = fleet.new_tenant("rolling")
    fleet.control("PUT", f"/v1/tenants/{tenant.tenant_id}/limits", json={"monthly_tokens": 1_000_000_000}).raise_for_status()
    time.sleep(1.0)  # the promise is one second
    statuses: list[int] = []
    stop = threading.Event()

    def client(number: int) -> None:
        with httpx.Client(headers={"authorization": f"Bearer {tenant.key}"}, timeout=30) as session:
            while not stop.is_set():
                body = chat(max_tokens=3, stream=number % 2 == 0)
                statuses.append(session.post(f"{fleet.url}/v1/chat/completions", json=body).status_code)

    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(client, number) for number in range(CLIENTS)]
        try:
            for part in PARTS:
                _restart(fleet, part)
                _wait_for(statuses, len(statuses) + PASSED_MIN)
        finally:
            stop.set()
        for one in clients:
            one.result()

    assert {200} == set(statuses)
    rows = fleet.rows(tenant, len(statuses))
    assert len(statuses) == len(rows)
    assert {("reported", "ok")} == {(row["basis"], row["outcome"]) for row in rows}


@pytest.mark.chaos
def test_envoy_is_replaced_under_load_and_ends_what_it_has(fleet: Installation) -> None:
    """Twice: no request fails, a stream goes on to its end, each answer has its row, and the collector takes neither life for dead."""
    tenant, streaming = fleet.new_tenant("replaced"), fleet.new_tenant("streaming")
    orphans = fleet.sql("select count(*) as count from usage_event where basis = 'checkpoint' or outcome = 'lost'")
    failed: list[object] = []
    served: list[int] = []
    stop = threading.Event()

    def client(number: int) -> None:
        # Half of them come anew each time, and find a listener each time.
        keeps_alive = number < CLIENTS // 2
        with httpx.Client(headers={"authorization": f"Bearer {tenant.key}"}, timeout=30) as session:
            while not stop.is_set():
                body = chat(max_tokens=3, stream=number % 2 == 0)
                try:
                    answer = session.post(f"{fleet.url}/v1/chat/completions", json=body) if keeps_alive else fleet.post(tenant, json=body)
                except httpx.HTTPError as exc:
                    failed.append(exc)
                else:
                    served.append(answer.status_code)

    def stream() -> str:
        return fleet.post(streaming, json=chat(stream=True, max_tokens=_EVENTS), fault={"chunk_ms": _EVENT_MS}).text

    with ThreadPoolExecutor(CLIENTS + 2) as pool:
        clients = [pool.submit(client, number) for number in range(CLIENTS)]
        try:
            for edit in (_ONCE, _TWICE):
                _edit_bootstrap(fleet, *edit)
                long = pool.submit(stream)
                _wait_for(served, len(served) + PASSED_MIN)
                pid = fleet.pid("envoy")
                _restart_envoy(fleet)
                assert pid != fleet.pid("envoy")
                assert f'"access_log_flush_interval": "{edit[1]}"' in httpx.get(f"http://127.0.0.1:{fleet.admin_port}/config_dump").text
                _wait_for(served, len(served) + 10 * PASSED_MIN)
                assert long.result().rstrip().endswith("data: [DONE]")
        finally:
            stop.set()
        for one in clients:
            one.result()

    assert [] == failed
    assert {200} == set(served)
    rows = fleet.rows(tenant, len(served))
    assert len(served) == len(rows)
    assert {("reported", "ok")} == {(row["basis"], row["outcome"]) for row in rows}
    assert [("reported", "ok", _EVENTS)] * 2 == [(row["basis"], row["outcome"], row["output_tokens"]) for row in fleet.rows(streaming, 2)]
    assert orphans == fleet.sql("select count(*) as count from usage_event where basis = 'checkpoint' or outcome = 'lost'")
    assert [] == fleet.sql("select * from usage_conflict where request_id = any(%s)", [row["request_id"] for row in rows])


@pytest.mark.chaos
def test_an_edit_that_envoy_would_not_start_with_is_refused_and_the_old_one_serves_on(fleet: Installation) -> None:
    """With its own words; and the next restart is of the files as they were."""
    pid, tenant = fleet.pid("envoy"), fleet.new_tenant("edited")
    source = fleet.home.with_name(f"{fleet.home.name}-envoy") / "envoy.yaml"
    before, rendered = source.read_text(), (fleet.home / "envoy/envoy.yaml").read_text()
    source.write_text(before.replace("stream_idle_timeout:", "stream_idle_timeouts:"))

    try:
        refused = _asked_for_a_new_envoy(fleet)
    finally:
        source.write_text(before)

    assert 1 == refused.returncode
    assert "Envoy refuses envoy/envoy.yaml" in refused.stderr
    assert pid == fleet.pid("envoy")
    assert rendered == (fleet.home / "envoy/envoy.yaml").read_text()
    assert 200 == fleet.post(tenant, json=chat()).status_code


def _edit_bootstrap(fleet: Installation, old: str, new: str) -> None:
    """In the directory that `up` was given."""
    path = fleet.home.with_name(f"{fleet.home.name}-envoy") / "envoy.yaml"
    text = path.read_text()
    assert 1 == text.count(f"access_log_flush_interval: {old}")
    path.write_text(text.replace(f"access_log_flush_interval: {old}", f"access_log_flush_interval: {new}"))


def _restart_envoy(fleet: Installation) -> None:
    answer = _asked_for_a_new_envoy(fleet)
    assert 0 == answer.returncode, answer.stderr


def _asked_for_a_new_envoy(fleet: Installation) -> subprocess.CompletedProcess[str]:
    """How it was answered once the one before it had ended: until then it is refused."""
    deadline = time.monotonic() + 2 * VISIBLE_SECONDS
    answer = fleet.run("restart", "envoy")
    while "still serves what it has" in answer.stderr and time.monotonic() < deadline:
        time.sleep(0.5)
        answer = fleet.run("restart", "envoy")
    return answer


def _restart(fleet: Installation, part: str) -> None:
    """Ask it to end, and wait for the next one as the supervisor tells of it: no request of ours helps it up."""
    pid = fleet.pid(part)
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + 2 * VISIBLE_SECONDS
    while time.monotonic() < deadline:
        [found] = [one for one in fleet.status()["parts"] if one["name"] == part]
        if found["pid"] not in (None, pid) and found["state"] == "ready":
            return
        time.sleep(0.1)
    raise AssertionError(f"{part} did not come back")


def _wait_for(statuses: list[int], count: int) -> None:
    deadline = time.monotonic() + VISIBLE_SECONDS
    while len(statuses) < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)
