# SPDX-License-Identifier: Apache-2.0
"""Row B14 of the bad inputs, through Envoy: who sends or reads byte by byte holds nothing for long, and pays what passed."""

from __future__ import annotations

import json
import select
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx

from tests.dataplane.installation import VISIBLE_SECONDS, Installation, Tenant, chat
from tests.dataplane.test_ledger import last_status, until

#: As many as the engine gives: twenty megabytes of events, more than all buffers on the way hold.
_TOKENS = 131_072


def _concurrent(small: Installation, name: str) -> Tenant:
    """A tenant that may have one request under way, once the limit acts."""
    tenant = small.new_tenant(name)
    small.control("PUT", f"/v1/tenants/{tenant.tenant_id}/limits", json={"concurrency": 1}).raise_for_status()
    time.sleep(1.0)  # the promise is one second
    return tenant


def _drip(small: Installation, sent: bytes, dripped: bytes) -> bytes:
    """The answer to *sent* at once and then *dripped*, byte by byte, until there is one."""
    with socket.create_connection(("127.0.0.1", small.port), timeout=60) as connection:
        connection.sendall(sent)
        for number in range(len(dripped)):
            if select.select([connection], [], [], 0.1)[0]:
                break
            connection.sendall(dripped[number : number + 1])
        return connection.recv(65536)


def test_who_sends_too_slowly_is_cut_and_holds_nothing(small: Installation) -> None:
    """B14, a head or a body byte by byte: 408 in time, no slot and no engine before the request is whole."""
    tenant = _concurrent(small, "drips")
    before = len(small.truth())
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {tenant.key}\r\n".encode()

    with ThreadPoolExecutor(2) as pool:
        of_head = pool.submit(_drip, small, head, b"x-slow: " + b"a" * 10_000)
        of_body = pool.submit(_drip, small, head + b"content-length: 10000\r\n\r\n", b'{"model":"tiny",' + b" " * 9_000)
        meanwhile = [small.post(tenant, json=chat()).status_code for _ in range(3)]
        answers = [of_head.result(), of_body.result()]

    assert [200] * 3 == meanwhile
    assert [b"HTTP/1.1 408 "] * 2 == [answer[:13] for answer in answers], answers
    error = json.loads(answers[1].partition(b"\r\n\r\n")[2])["error"]
    assert ("request_timeout", True) == (error["code"], bool(error["request_id"]))
    assert 3 == len(small.rows(tenant, 3))
    assert before + 3 == len(small.truth())


@contextmanager
def _silence_of(small: Installation, seconds: int) -> Iterator[None]:
    """Envoy ends a stream on which nothing moves for so long, in place of ten minutes."""
    routes = small.home / "envoy/routes.yaml"
    text = routes.read_text()
    dump = f"http://127.0.0.1:{small.admin_port}/config_dump"

    def put(text: str, seconds: int) -> None:
        made = routes.with_name("routes.new")
        made.write_text(text)
        made.rename(routes)
        until(lambda: f'"idle_timeout": "{seconds}s"' in httpx.get(dump, params={"resource": "dynamic_route_configs"}, timeout=10).text)

    put(text.replace("idle_timeout: 600s", f"idle_timeout: {seconds}s"), seconds)
    try:
        yield
    finally:
        put(text, 600)


def test_who_reads_too_slowly_is_cut_pays_what_passed_and_holds_nothing(small: Installation) -> None:
    """B14, a byte now and then of twenty megabytes: once all buffers are full nothing moves, and the stream ends."""
    tenant = _concurrent(small, "sips")
    body = json.dumps(chat(stream=True, max_tokens=_TOKENS)).encode()
    fault = json.dumps({"tokens_per_chunk": 2})
    with _silence_of(small, 2), socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", small.port))
        connection.sendall(
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {tenant.key}\r\nx-fake-engine: {fault}\r\n"
            f"content-length: {len(body)}\r\n\r\n".encode() + body
        )
        assert connection.recv(1)
        held = small.post(tenant, json=chat()).status_code
        deadline = time.monotonic() + 2 * VISIBLE_SECONDS
        while not (rows := small.sql("select * from billing_usage_v1 where tenant = %s", tenant.tenant_id)) and time.monotonic() < deadline:
            connection.recv(1)
            time.sleep(0.2)
        freed = last_status(small, tenant, 200)

    assert (429, 200) == (held, freed)
    [row] = rows
    produced = small.truth()[row["request_id"]]["completion_tokens"]
    assert ("running", "upstream_error") == (row["basis"], row["outcome"])
    assert 1000 <= row["output_tokens"] <= produced < _TOKENS
