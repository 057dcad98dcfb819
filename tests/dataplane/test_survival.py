# SPDX-License-Identifier: Apache-2.0
"""Exactly one row per admitted request, whoever dies."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import redis

from tests.dataplane.installation import Installation, Tenant, chat

#: Refused because a part was away; such a request may or may not have been admitted before that.
_BROKEN = (httpx.HTTPError,)
#: What Envoy dropped of what it had for the witness, and the batches that are still under way to it.
_DROPPED = "access_logs.open_telemetry_access_log.logs_dropped"
_UNDER_WAY = "cluster.metering.upstream_rq_active"


def hammer(road: Installation, tenant: Tenant, seconds: float, *, chunk_ms: int = 10) -> list[tuple[str, int]]:
    """Requests from 16 clients for *seconds*, half of them streams; ids and statuses of those that got an answer."""
    until = time.monotonic() + seconds
    answered: list[tuple[str, int]] = []
    headers = {
        "authorization": f"Bearer {tenant.key}",
        "x-fake-engine": json.dumps({"chunk_ms": chunk_ms}),
    }

    def client(number: int) -> None:
        with httpx.Client(timeout=30) as session:
            turn = number
            while time.monotonic() < until:
                turn += 1
                try:
                    answer = session.post(
                        f"{road.url}/v1/chat/completions", json=chat(stream=turn % 2 == 0), headers=headers
                    )
                    answered.append((answer.headers["x-request-id"], answer.status_code))
                    if answer.status_code >= 500:
                        time.sleep(0.05)
                except _BROKEN:
                    time.sleep(0.05)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(client, range(16)))
    return answered


def settled_rows(road: Installation, tenant: Tenant) -> list[dict[str, Any]]:
    """All rows of the tenant once nothing of it is open any more."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        [still] = road.sql(
            "select count(*) n from open_exchange where entry -> 'identity' ->> 'tenant' = %s", tenant.tenant_id
        )
        before = len(road.rows(tenant, 0))
        time.sleep(0.5)
        if still["n"] == 0 and before == len(road.rows(tenant, 0)):
            break
    return road.rows(tenant, 0)


@pytest.mark.parametrize("part", ["metering", "collector", "extauth", "ratelimit", "valkey", "postgres"])
def test_a_part_killed_under_load_loses_no_row_and_doubles_none(road: Installation, part: str) -> None:
    """Every answer of 200 has its row with the engine's numbers; no request has two."""
    tenant = road.new_tenant(f"kill-{part}")
    found: list[list[tuple[str, int]]] = []
    load = threading.Thread(target=lambda: found.append(hammer(road, tenant, 5.0)))
    load.start()
    time.sleep(1.5)

    old = road.kill(part)
    road.wait_restarted(part, old)
    load.join()

    rows = settled_rows(road, tenant)
    ids = [row["request_id"] for row in rows]
    truth = road.truth()
    passed = {request_id for request_id, status in found[0] if status == 200}
    assert len(passed) > 50
    assert len(ids) == len(set(ids))
    assert passed <= set(ids)
    # Whatever the engine was asked to do is on the bill, also where the client heard nothing.
    assert {i for i in truth if truth[i]["path"] == "/v1/chat/completions"} & set(ids) >= passed
    for row in rows:
        engine = truth.get(row["request_id"])
        if row["basis"] == "reported":
            assert engine is not None
            assert (engine["prompt_tokens"], engine["completion_tokens"]) == (row["input_tokens"], row["output_tokens"])
    # Asking the engine for usage needs no service, so nothing is estimated, whichever part was away.
    assert {"reported", "running", "none"} >= {row["basis"] for row in rows}


def test_envoy_killed_in_mid_stream_leaves_rows_from_the_last_checkpoint(road: Installation, tenant: Tenant) -> None:
    """What the journal last heard is billed, marked as such; streams killed before any checkpoint have a row too."""
    seen: dict[str, int] = {}
    statuses: list[int] = []

    def stream(delay: float) -> None:
        time.sleep(delay)
        headers = {"authorization": f"Bearer {tenant.key}", "x-fake-engine": '{"chunk_ms": 50}'}
        try:
            with httpx.stream(
                "POST", f"{road.url}/v1/chat/completions", json=chat(stream=True, max_tokens=1500), headers=headers
            ) as answer:
                statuses.append(answer.status_code)
                request_id = answer.headers["x-request-id"]
                for line in answer.iter_lines():
                    seen[request_id] = seen.get(request_id, 0) + ('"content":" ' in line)
        except httpx.HTTPError:
            pass

    clients = [threading.Thread(target=stream, args=(delay,)) for delay in (0.0, 0.0, 0.5, 2.2)]
    started = time.monotonic()
    for client in clients:
        client.start()
    # Not before the last one streams, however busy the machine is.
    while time.monotonic() < started + 2.8 or (len(seen) < 4 and time.monotonic() < started + 30):
        time.sleep(0.05)
    old = road.kill("envoy")
    for client in clients:
        client.join()
    assert [200] * 4 == statuses
    road.wait_restarted("envoy", old)
    # The next record of the new Envoy tells that the old one is gone.
    assert 200 == road.post(tenant, json=chat()).status_code

    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and len(road.rows(tenant, 5)) < 5:
        time.sleep(0.2)
    rows = {row["request_id"]: row for row in road.rows(tenant, 5)}
    assert seen.keys() < rows.keys()
    assert 5 == len(rows)
    for request_id, chunks in seen.items():
        row = rows[request_id]
        assert ("checkpoint", "lost") == (row["basis"], row["outcome"])
        assert row["output_tokens"] <= chunks + 1
    # 2.8 s of 50 ms chunks with a checkpoint a second: the older streams are billed to at least the second one.
    assert sum(row["output_tokens"] >= 15 for row in rows.values()) >= 2


def test_valkey_flushed_under_load_changes_no_bill(road: Installation, tenant: Tenant) -> None:
    """Valkey is never the record."""
    road.set_limits(tenant.tenant_id, rpm=1_000_000, tpm=1_000_000_000)
    found: list[list[tuple[str, int]]] = []
    load = threading.Thread(target=lambda: found.append(hammer(road, tenant, 3.0)))
    load.start()
    store = redis.Redis(
        unix_socket_path=str(road.home / "run/valkey.sock"),
        password=(road.home / "secrets/valkey-password").read_text().strip(),
    )
    for _ in range(5):
        time.sleep(0.4)
        store.flushall()
        store.script_flush()
    load.join()

    passed = [request_id for request_id, status in found[0] if status == 200]
    rows = {row["request_id"]: row for row in settled_rows(road, tenant)}
    assert len(passed) == len(found[0])
    assert sorted(passed) == sorted(rows)
    truth = road.truth()
    assert sum(truth[i]["completion_tokens"] for i in passed) == sum(r["output_tokens"] for r in rows.values())


def test_a_stalled_collector_delays_rows_and_loses_none(road: Installation, tenant: Tenant) -> None:
    """The journal is the buffer."""

    assert 200 == road.post(tenant, json=chat()).status_code
    pid = road.pid("collector")
    os.kill(pid, signal.SIGSTOP)
    try:
        found = hammer(road, tenant, 1.5)
        assert len(road.rows(tenant, 0)) <= 1
    finally:
        os.kill(pid, signal.SIGCONT)

    passed = {request_id for request_id, status in found if status == 200}
    assert passed <= {row["request_id"] for row in settled_rows(road, tenant)}


def test_a_stalled_witness_holds_up_nothing(road: Installation, tenant: Tenant) -> None:
    """
    Its receiver takes no byte: Envoy goes on, keeps what it has for it for some seconds, and from then on drops it.

    An entry has no timeout in Envoy 1.40; each batch stayed under way for as long as the receiver stood.
    """
    assert 200 == road.post(tenant, json=chat()).status_code
    answers: list[httpx.Response] = []

    def stall() -> None:
        with httpx.Client(headers={"authorization": f"Bearer {tenant.key}"}, timeout=30) as session:

            def send() -> None:
                answers.append(session.post(f"{road.url}/v1/chat/completions", json=chat()))
                time.sleep(0.01)

            deadline = time.monotonic() + 60
            before = road.stat(_DROPPED)
            while road.stat(_DROPPED) == before and time.monotonic() < deadline:
                send()
            under_way = road.stat(_UNDER_WAY)
            dropped = road.stat(_DROPPED)
            while road.stat(_DROPPED) < dropped + 200 and time.monotonic() < deadline:
                send()
            assert under_way >= road.stat(_UNDER_WAY)
            assert time.monotonic() < deadline

    road.silence("metering", stall)

    assert {200} == {answer.status_code for answer in answers}
    assert {answer.headers["x-request-id"] for answer in answers} <= {row["request_id"] for row in settled_rows(road, tenant)}


@pytest.mark.express("on", "off")
def test_a_revoked_key_is_dead_within_a_second(road: Installation, tenant: Tenant) -> None:
    """Pushed to the services, not waited for."""
    assert 200 == road.post(tenant, json=chat()).status_code

    assert road.control("POST", f"/v1/keys/{tenant.key_id}/revoke").status_code in (200, 204)
    time.sleep(1.0)

    assert 401 == road.post(tenant, json=chat()).status_code
