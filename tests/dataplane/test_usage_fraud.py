# SPDX-License-Identifier: Apache-2.0
"""Rows B05, B06, B09 and B10 of the bad inputs, through Envoy: whoever leaves, hides or multiplies pays what was delivered."""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.dataplane.installation import VISIBLE_SECONDS, Installation, Tenant, chat

pytestmark = pytest.mark.express("on", "off")

MULTIPLIED: dict[str, tuple[str, dict[str, Any]]] = {
    "many choices": ("/v1/chat/completions", chat(n=100, max_tokens=10)),
    "the best of many": ("/v1/completions", {"model": "tiny", "prompt": "a", "best_of": 100, "max_tokens": 10}),
    "many prompts": ("/v1/completions", {"model": "tiny", "prompt": ["a"] * 100, "max_tokens": 10}),
    "many prompts with many choices": ("/v1/completions", {"model": "tiny", "prompt": ["a"] * 10, "n": 10, "max_tokens": 10}),
    "a query read with many documents": ("/v1/rerank", {"model": "tiny", "query": "toll " * 50, "documents": ["a"] * 100}),
}


def test_what_is_multiplied_is_reserved_multiplied(road: Installation) -> None:
    """A thousand tokens do not fit into two hundred a minute, however they are asked for, and reach no engine."""
    caller = road.new_tenant("multiplied", tpm=200)
    before = len(road.truth())

    answers = {name: road.post(caller, path, json=body) for name, (path, body) in MULTIPLIED.items()}

    assert dict.fromkeys(MULTIPLIED, 429) == {name: answer.status_code for name, answer in answers.items()}
    assert before == len(road.truth())
    assert 200 == road.post(caller, json=chat()).status_code


@pytest.mark.parametrize("options", [{"include_usage": False}, {"include_usage": False, "continuous_usage_stats": True}, {}, None], ids=str)
def test_usage_that_the_caller_wants_nobody_to_see_is_billed_and_hidden(
    road: Installation, tenant: Tenant, options: dict[str, Any] | None
) -> None:
    """The engine is asked all the same."""
    answer = road.post(tenant, json=chat(stream=True, stream_options=options))

    [row] = road.rows(tenant, 1)
    assert '"usage":{' not in answer.text
    assert (3, 5, "reported") == (row["input_tokens"], row["output_tokens"], row["basis"])


def close(connection: socket.socket) -> None:
    """By FIN."""
    connection.close()


def reset(connection: socket.socket) -> None:
    """By RST."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def half_close(connection: socket.socket) -> None:
    """By a FIN of one direction, going on to read: Envoy takes it for leaving."""
    connection.shutdown(socket.SHUT_WR)
    while connection.recv(65536):
        pass
    connection.close()


@pytest.mark.parametrize("chunks", [0, 1, 4])
@pytest.mark.parametrize("leave", [close, reset, half_close], ids=lambda it: it.__name__)
def test_who_leaves_pays_what_had_passed(road: Installation, tenant: Tenant, leave: Callable[[socket.socket], None], chunks: int) -> None:
    """After none, one or some chunks, however they leave: no less than they read, no more than the engine made."""
    body = json.dumps(chat(stream=True, max_tokens=2000)).encode()
    fault = json.dumps({"chunk_ms": 10, "first_ms": 0 if chunks else 60_000})
    with socket.create_connection(("127.0.0.1", road.port), timeout=60) as connection:
        connection.sendall(
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {tenant.key}\r\nx-fake-engine: {fault}\r\n"
            f"content-length: {len(body)}\r\n\r\n".encode() + body
        )
        read = b""
        if not chunks:
            # Admitted, and nothing has come.
            _wait_for_the_engine(road, tenant)
        while read.count(b'"content":" ') < chunks:
            read += connection.recv(65536)
        leave(connection)

    [row] = road.rows(tenant, 1)
    assert "client_closed" == row["outcome"]
    if chunks:
        produced = road.truth()[row["request_id"]]["completion_tokens"]
        assert "running" == row["basis"]
        assert read.count(b'"content":" ') <= row["output_tokens"] <= produced < 2000
    else:
        assert ("none", 0, 0) == (row["basis"], row["input_tokens"], row["output_tokens"])


def _wait_for_the_engine(road: Installation, tenant: Tenant) -> None:
    deadline = time.monotonic() + VISIBLE_SECONDS
    while not road.sql("select from open_exchange where entry -> 'identity' ->> 'tenant' = %s", tenant.tenant_id):
        assert time.monotonic() < deadline
        time.sleep(0.1)


RESPONSES: dict[str, tuple[dict[str, Any], str, int]] = {
    "cut short by its limit": ({"finish": "length"}, "response.incomplete", 9),
    "failed within": ({"error_after": 4}, "response.failed", 4),
}


@pytest.mark.parametrize("name", RESPONSES)
def test_a_response_that_does_not_complete_is_billed_by_its_own_usage(road: Installation, tenant: Tenant, name: str) -> None:
    """Its last event says what was used, whatever it is called."""
    fault, event, tokens = RESPONSES[name]
    body = {"model": "tiny", "input": "one two three", "max_output_tokens": 9, "stream": True}

    answer = road.post(tenant, "/v1/responses", json=body, fault=fault)

    [row] = road.rows(tenant, 1)
    assert event in answer.text
    assert (3, tokens, "reported") == (row["input_tokens"], row["output_tokens"], row["basis"])
