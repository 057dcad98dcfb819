# SPDX-License-Identifier: Apache-2.0
"""Who does not get through is told so in its own dialect, and nothing reaches a model server."""

from __future__ import annotations

import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from tests.dataplane.installation import Installation, Tenant, chat

pytestmark = pytest.mark.express("on", "off")

UNKNOWN_KEY = "peaje_live_0123456789AB_0123456789abcdefghijklmnopqrstuv1fTxeV"


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({}, 401, "missing_credential"),
        ({"authorization": "Bearer nonsense"}, 401, "invalid_api_key"),
        ({"authorization": f"Bearer {UNKNOWN_KEY[:-1]}W"}, 401, "invalid_api_key"),
        ({"authorization": f"Bearer {UNKNOWN_KEY}"}, 401, "invalid_api_key"),
        ({"x-api-key": UNKNOWN_KEY}, 401, "invalid_api_key"),
        ({"authorization": f"Bearer {UNKNOWN_KEY}", "x-api-key": "other"}, 400, "conflicting_credentials"),
        ({"authorization": "Bearer ' OR (SELECT pg_sleep(8)) IS NOT NULL --"}, 401, "invalid_api_key"),
        ({"authorization": "Bearer " + "a" * 10_000}, 401, "invalid_api_key"),
    ],
    ids=["none", "garbage", "checksum", "unknown", "unknown x-api-key", "conflict", "sql", "10k"],
)
def test_a_bad_credential_is_refused(road: Installation, headers: dict[str, str], status: int, code: str) -> None:
    """OpenAI's error shape, a stable code, the request id that is in the header."""
    answer = httpx.post(f"{road.url}/v1/chat/completions", json=chat(), headers=headers)

    error = answer.json()["error"]
    assert (status, code) == (answer.status_code, error["code"])
    assert answer.headers["x-request-id"] == error["request_id"]
    assert (status == 401) == ("www-authenticate" in answer.headers)
    assert answer.headers["x-request-id"] not in road.truth()


def test_two_authorization_headers_are_refused_in_either_order(road: Installation, tenant: Tenant) -> None:
    """Never "the last one wins"."""
    good, bad = ("authorization", f"Bearer {tenant.key}"), ("authorization", f"Bearer {UNKNOWN_KEY}")

    answers = [
        httpx.post(f"{road.url}/v1/chat/completions", json=chat(), headers=headers)
        for headers in ([good, bad], [bad, good], [good, good])
    ]

    assert [401, 401, 401] == [answer.status_code for answer in answers]


def test_a_header_that_is_no_utf8_is_refused(road: Installation) -> None:
    """A credential of raw bytes reaches the decision and fails there; nothing fails open."""
    with socket.create_connection(("127.0.0.1", road.port), timeout=10) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\nauthorization: Bearer \xff\xfe\x80\r\n"
            b'content-length: 16\r\n\r\n{"model":"tiny"}'
        )
        status_line = connection.recv(4096).split(b"\r\n")[0]

    assert re.match(rb"HTTP/1.1 40[01] ", status_line), status_line


@pytest.mark.parametrize(
    ("path", "status"),
    [
        # What has no meter: engines behind the gateway may well serve it.
        ("/v1/audio/transcriptions", 404), ("/v1/images/edits", 404), ("/v1/realtime", 404), ("/v1/batches", 404),
        ("/v1/files", 404), ("/v1/moderations", 404), ("/tokenize", 404), ("/rerank", 404), ("/score", 404), ("/v1/score", 404),
        ("/pooling", 404), ("/v1/responses/resp_1/cancel", 404), ("/v1/messages/count_tokens", 404), ("/", 404), ("/metrics", 404), ("/v1/models/../admin", 404), ("/v1//models/x", 404),
        ("/v1/chat%2Fcompletions", 400), ("/v1/%2e%2e/admin", 404), ("/v1;x=1/chat/completions", 404),
    ],
)
def test_what_is_not_on_the_list_does_not_exist(
    road: Installation, tenant: Tenant, path: str, status: int
) -> None:
    """The route allow-list is closed, with or without a good key."""
    with httpx.Client() as client:
        request = client.build_request(
            "POST", road.url, json=chat(), headers={"authorization": f"Bearer {tenant.key}"}
        )
        request.url = request.url.copy_with(raw_path=path.encode())
        answer = client.send(request)

    assert status == answer.status_code
    error = answer.json()["error"]
    assert ("not_found" if status == 404 else "invalid_request") == error["code"]
    # Each dialect in its own shape: Anthropic's has the kind outside, too.
    assert path.startswith("/v1/messages") == (answer.json().get("type") == "error")


def test_what_envoy_cannot_read_is_answered_in_json_and_damages_no_journal(road: Installation, tenant: Tenant) -> None:
    """Anybody can send it, without a key: it is no defect, and nobody is told of a damaged journal."""
    before = road.sql("select count(*) as count from journal_defect")
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\n"
    for rest, status in ((b"x_api_key: a\r\n\r\n", b"400"), (b"content-length: x\r\n\r\n", b"400"), (b"x-long: " + b"a" * 70_000 + b"\r\n\r\n", b"431")):
        with socket.create_connection(("127.0.0.1", road.port), timeout=10) as connection:
            connection.sendall(head + rest)
            answer = connection.recv(4096)
        assert (b"HTTP/1.1 " + status, True) == (answer[:12], b'"type":"invalid_request_error"' in answer), answer

    # What comes after it in the journal is read.
    road.post(tenant, json=chat())
    road.rows(tenant, 1)
    assert before == road.sql("select count(*) as count from journal_defect")


def test_a_wrong_method_is_refused(road: Installation, tenant: Tenant) -> None:
    """GET on a POST path never reaches an engine."""
    answer = httpx.get(
        f"{road.url}/v1/chat/completions", headers={"authorization": f"Bearer {tenant.key}"}
    )

    assert (405, "POST") == (answer.status_code, answer.headers["allow"])


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"not json", 400),
        (b'{"messages":[]}', 400),
        (b'{"model":"tiny","model":"other"}', 400),
        (b'{"model":"tiny","max_tokens":5,"max_tokens":5000}', 400),
        (b'{"model":"tiny","mod\\u0065l":"other"}', 400),
        (b'{"model":"tiny","max_tokens":-1}', 400),
        (b'{"model":"tiny","max_tokens":"10"}', 400),
        (b'{"model":"tiny","max_tokens":1e18}', 400),
        (b'{"model":"tiny","n":100000}', 400),
        (b'{"model":"tiny","stream":"yes"}', 400),
        (b'{"model":"tiny"} {"model":"other"}', 400),
        (b"\xef\xbb\xbf" + b'{"model":"tiny"}', 400),
        (b'{"model":"tiny","x":' + b"[" * 10_000 + b"]" * 10_000 + b"}", 400),
        (b'{"model":"TINY"}', 404),
        (b'{"model":"../tiny"}', 404),
        ('{"model":"tіny"}'.encode(), 404),
        (b'{"model":"tiny","pad":"' + b"x" * (17 << 20) + b'"}', 413),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_body_that_can_be_read_two_ways_is_refused(
    road: Installation, tenant: Tenant, body: bytes, status: int
) -> None:
    """Refused by the gateway in the caller's dialect; the engine never sees it."""
    answer = road.post(tenant, content=body, headers={"content-type": "application/json"})

    assert status == answer.status_code, answer.text
    assert answer.headers["x-request-id"] == answer.json()["error"]["request_id"]
    assert answer.headers["x-request-id"] not in road.truth()


def test_a_compressed_request_is_refused(road: Installation, tenant: Tenant) -> None:
    """No zip bombs, and no body that is judged unread."""
    answer = road.post(tenant, content=b"\x1f\x8b", headers={"content-encoding": "gzip"})

    assert (415, "unsupported_encoding") == (answer.status_code, answer.json()["error"]["code"])


def test_anthropic_callers_are_refused_in_their_dialect(road: Installation) -> None:
    """Same decision, other shape."""
    answer = httpx.post(f"{road.url}/v1/messages", json=chat(), headers={"x-api-key": "nonsense"})

    body = answer.json()
    assert (401, "error", "authentication_error") == (answer.status_code, body["type"], body["error"]["type"])
    assert answer.headers["x-request-id"] == body["request_id"]


def test_over_the_request_limit_is_429_with_headers_that_are_true(road: Installation) -> None:
    """Five a minute: five pass, the sixth is told when to come back, and then it passes."""
    caller = road.new_tenant("rpm", rpm=5)

    answers = [road.post(caller, json=chat()) for _ in range(6)]

    assert [200] * 5 + [429] == [answer.status_code for answer in answers]
    assert ["4", "3", "2", "1", "0", "0"] == [a.headers["x-ratelimit-remaining-requests"] for a in answers]
    assert {"5"} == {a.headers["x-ratelimit-limit-requests"] for a in answers}
    refused = answers[-1]
    error = refused.json()["error"]
    assert ("rate_limit_exceeded", "requests") == (error["code"], error["type"])
    wait = int(refused.headers["retry-after"])
    assert 1 <= wait <= 12
    time.sleep(wait)
    assert 200 == road.post(caller, json=chat()).status_code
    assert 6 == len(road.rows(caller, 6))


def test_over_the_token_limit_is_429_and_settling_gives_back(road: Installation) -> None:
    """The reservation is larger than the use; what was not used is free again."""
    caller = road.new_tenant("tpm", tpm=600)

    first = road.post(caller, json=chat(max_tokens=400))
    held = int(first.headers["x-ratelimit-remaining-tokens"])
    refused = road.post(caller, json=chat(max_tokens=590))

    assert 200 == first.status_code
    assert held < 200
    error = refused.json()["error"]
    assert (429, "tokens") == (refused.status_code, error["type"])


def test_a_request_larger_than_its_limit_is_told_that_it_never_passes(road: Installation) -> None:
    """No retry-after that would be a lie; the openai package gives up at once."""
    caller = road.new_tenant("never", tpm=50)
    client = openai.OpenAI(base_url=f"{road.url}/v1", api_key=caller.key, max_retries=2)

    before = time.monotonic()
    with pytest.raises(openai.RateLimitError) as refused:
        client.chat.completions.create(**chat("word " * 100, max_tokens=1000))

    assert time.monotonic() - before < 1.0
    assert "never" in str(refused.value)
    assert "retry-after" not in refused.value.response.headers


def test_two_hundred_at_once_with_room_for_ten_admits_ten(road: Installation) -> None:
    """All at the same moment: the limit holds exactly."""
    caller = road.new_tenant("burst", rpm=10)

    started = time.monotonic()
    with ThreadPoolExecutor(50) as pool:
        statuses = list(pool.map(lambda _: road.post(caller, json=chat()).status_code, range(200)))
    drained = int((time.monotonic() - started) / 6.0)

    assert 10 <= statuses.count(200) <= 10 + drained
    assert 200 == statuses.count(200) + statuses.count(429)
    assert statuses.count(200) == len(road.rows(caller, statuses.count(200)))


def test_the_journal_and_the_logs_hold_no_key(road: Installation, tenant: Tenant) -> None:
    """Also not when the key came where it does not belong."""
    httpx.post(f"{road.url}/v1/chat/completions?api_key={tenant.key}", json=chat())
    road.post(tenant, json=chat())
    road.rows(tenant, 1)

    files = [path for place in ("log", "journal") for path in (road.home / place).iterdir()]
    assert [] == [path.name for path in files if tenant.key.encode() in path.read_bytes()]
