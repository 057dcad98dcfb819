# SPDX-License-Identifier: Apache-2.0
"""The bill against what the engine says it did."""

from __future__ import annotations

import json
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.dataplane.installation import Installation, Tenant, chat

pytestmark = pytest.mark.express("on", "off")


def send(road: Installation, tenant: Tenant, *, cut_after: int | None, **fields: Any) -> tuple[str, int]:
    """One request through the gateway, cut by the client after so many chunks; its id and content chunks seen."""
    headers = {"authorization": f"Bearer {tenant.key}", "x-fake-engine": '{"chunk_ms": 10}'}
    if not fields.get("stream"):
        answer = httpx.post(f"{road.url}/v1/chat/completions", json=chat(**fields), headers=headers, timeout=60)
        assert answer.status_code == 200, answer.text
        return answer.headers["x-request-id"], 0
    seen = 0
    with httpx.stream("POST", f"{road.url}/v1/chat/completions", json=chat(**fields), headers=headers) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            seen += '"content":" ' in line
            assert '"usage"' not in line
            if cut_after is not None and seen >= cut_after:
                break
    return answer.headers["x-request-id"], seen


def test_two_hundred_requests_of_which_some_are_cut(road: Installation, tenant: Tenant) -> None:
    """32 at a time, half streamed, a tenth of the streams cut: a row each, with the engine's own numbers."""
    chance = random.Random(7)
    plans = []
    for number in range(200):
        # A stream that is cut goes on far longer than its client stays, so that no busy machine finishes it first.
        is_cut = number % 20 == 0
        tokens = 1000 if is_cut else chance.randint(5, 40)
        cut = chance.randint(1, 38) if is_cut else None
        plans.append({"stream": number % 2 == 0, "max_tokens": tokens, "cut_after": cut})

    with ThreadPoolExecutor(32) as pool:
        sent = list(pool.map(lambda plan: send(road, tenant, **plan), plans))

    rows = {row["request_id"]: row for row in road.rows(tenant, 200)}
    truth = road.truth()
    assert sorted(request_id for request_id, _ in sent) == sorted(rows)
    for (request_id, seen), plan in zip(sent, plans, strict=True):
        row, engine = rows[request_id], truth[request_id]
        if plan["cut_after"] is None:
            assert ("reported", "ok") == (row["basis"], row["outcome"])
            assert (engine["prompt_tokens"], engine["completion_tokens"]) == (row["input_tokens"], row["output_tokens"])
        else:
            assert ("running", "client_closed") == (row["basis"], row["outcome"])
            # Between what the client had read and what the engine had handed over.
            assert seen <= row["output_tokens"] <= engine["completion_tokens"]


def test_hourly_sums_equal_the_rows(road: Installation, tenant: Tenant) -> None:
    """Integer equality."""
    for tokens in (1, 2, 3):
        road.post(tenant, json=chat(max_tokens=tokens))
    rows = road.rows(tenant, 3)

    [hourly] = road.sql(
        "select sum(request_count) n, sum(input_tokens) i, sum(output_tokens) o from billing_usage_hourly_v1 "
        "where tenant = %s",
        tenant.tenant_id,
    )

    assert (3, sum(r["input_tokens"] for r in rows), 6) == (hourly["n"], hourly["i"], hourly["o"])


def test_a_hundred_requests_with_one_request_id_are_a_hundred_rows(road: Installation, tenant: Tenant) -> None:
    """The billing id is minted by the gateway, never the client's."""
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda _: road.post(tenant, json=chat(), headers={"x-request-id": "same"}), range(100)))

    assert 100 == len({row["request_id"] for row in road.rows(tenant, 100)})


def test_a_hundred_answers_with_one_id_are_a_hundred_rows(road: Installation, tenant: Tenant) -> None:
    """Nor the model server's."""
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: road.post(tenant, json=chat(), fault={"same_id": True}), range(100)))

    assert 1 == len({answer.json()["id"] for answer in answers})
    assert 100 == len(road.rows(tenant, 100))


FAULTS: dict[str, tuple[dict[str, Any], tuple[int | None, int | None, str]]] = {
    "split at every byte": ({"split": 1}, (3, 5, "reported")),
    "split at every third byte": ({"split": 3}, (3, 5, "reported")),
    "in one piece": ({"coalesce": True}, (3, 5, "reported")),
    "CRLF": ({"crlf": True}, (3, 5, "reported")),
    "comments": ({"comments": True}, (3, 5, "reported")),
    "data over several lines": ({"multiline": True}, (3, 5, "reported")),
    "compressed unasked": ({"gzip": True}, (3, 5, "reported")),
    "text that looks like usage": ({"fake_usage_text": True}, (3, 5, "reported")),
    "zero stays zero": ({"usage": "zero"}, (0, 0, "reported")),
    "no usage at all": ({"usage": "missing"}, (None, None, "estimated")),
    "negative": ({"usage": "negative"}, (None, None, "reported")),
    "no number": ({"usage": "nan"}, (None, None, "reported")),
    "2 to the 63": ({"usage": "huge"}, (None, None, "reported")),
    "large event": ({"big_event": 200_000}, (3, 5, "reported")),
}


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("name", FAULTS)
def test_usage_is_read_whatever_the_engine_does(
    road: Installation, tenant: Tenant, name: str, streamed: bool
) -> None:
    """However it is cut, wrapped, compressed or wrong: a row, never negative, never absurd."""
    fault, (prompt, output, basis) = FAULTS[name]

    answer = road.post(tenant, json=chat(stream=streamed), fault=fault)

    [row] = road.rows(tenant, 1)
    assert 200 == answer.status_code
    # Frames with text are counted where the engine sends a token in each; an answer in one piece has none.
    if name == "no usage at all" and streamed:
        output, basis = 5, "counted"
    assert basis == row["basis"]
    assert prompt is None or prompt == row["input_tokens"]
    assert output is None or output == row["output_tokens"]
    assert 0 <= row["input_tokens"] < 1000
    assert 0 <= row["output_tokens"] < 1000


BREAKS: dict[str, tuple[dict[str, Any], int, str, int]] = {
    "error before the first byte": ({"error_before": 500}, 500, "upstream_error", 0),
    "refused by the engine": ({"error_before": 400}, 400, "refused_by_engine", 0),
    "error as the only event": ({"error_after": 0}, 200, "ok", 0),
    "error inside the stream": ({"error_after": 3}, 200, "ok", 3),
    "reset inside the stream": ({"reset_after": 3}, 200, "upstream_error", 3),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_stream_is_billed_to_where_it_broke(road: Installation, tenant: Tenant, name: str) -> None:
    """Zero before the first token, k after k."""
    fault, status, outcome, tokens = BREAKS[name]

    seen_status = 0
    try:
        with httpx.stream(
            "POST", f"{road.url}/v1/chat/completions", json=chat(stream=True, max_tokens=9),
            headers={
                "authorization": f"Bearer {tenant.key}",
                "x-fake-engine": json.dumps(fault | {"chunk_ms": 20}),
            },
        ) as answer:
            seen_status = answer.status_code
            answer.read()
    except httpx.RemoteProtocolError:
        pass

    [row] = road.rows(tenant, 1)
    assert (status, outcome, tokens) == (seen_status, row["outcome"], row["output_tokens"])


def test_the_usage_api_and_the_cli_agree_with_the_view(road: Installation, tenant: Tenant) -> None:
    """Three faces, one sum."""
    for _ in range(3):
        road.post(tenant, json=chat())
    rows = road.rows(tenant, 3)

    report = road.cli("usage", "--tenant", tenant.tenant_id, "--since", "1h", "--by", "model")

    text = str(report)
    assert "tiny" in text
    assert str(sum(row["output_tokens"] for row in rows)) in text


def test_explain_says_what_became_of_a_request(road: Installation) -> None:
    """Billed, and refused: both in plain words."""
    caller = road.new_tenant("explain", rpm=1)
    billed = road.post(caller, json=chat()).headers["x-request-id"]
    refused = road.post(caller, json=chat()).headers["x-request-id"]
    road.rows(caller, 1)

    assert "billed" == road.cli("explain", billed)["state"]
    assert "refused" == road.cli("explain", refused)["state"]
    assert 0 != road.run("explain", "00000000-0000-4000-8000-000000000000").returncode
    would = road.cli("explain", "--key-id", caller.key_id, "--model", "nobody-serves-this")
    assert (False, "model_served") == (would["allowed"], would["rule"])


def test_the_bill_says_which_tenant(road: Installation) -> None:
    """Two tenants at once: nobody pays for the other."""
    one, two = road.new_tenant("one"), road.new_tenant("two")
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda i: road.post((one, two)[i % 2], json=chat(max_tokens=1 + i % 2)), range(60)))

    rows = [*road.rows(one, 30), *road.rows(two, 30)]
    assert Counter({(one.tenant_id, 1): 30, (two.tenant_id, 2): 30}) == Counter(
        (row["tenant"], row["output_tokens"]) for row in rows
    )
