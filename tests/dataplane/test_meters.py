# SPDX-License-Identifier: Apache-2.0
"""What is metered by more than tokens, or by something else: reranks, images, speech."""

from __future__ import annotations

import json
import time
from collections import Counter
from typing import Any

import httpx
import openai
import pytest

from tests.dataplane.installation import Installation, Tenant, chat

pytestmark = pytest.mark.express("on", "off")

RERANK, IMAGES, SPEECH = "/v1/rerank", "/v1/images/generations", "/v1/audio/speech"
#: One word of a query that is read with each of three documents of one, two and three words.
SEARCH = {"model": "tiny", "query": "toll", "documents": ["a", "b c", {"text": "d e f"}]}
SEARCH_TOKENS = 3 + 6
PAINT = {"model": "tiny", "prompt": "a toll bridge", "n": 2}
TEXT = "Péage: 5 € ☃"


def billed(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a row is metered by."""
    return row["input_tokens"], row["output_tokens"], row["meter"], row["quantity"], row["basis"], row["outcome"]


def price(road: Installation, tenant: Tenant, **fields: str) -> None:
    """A price of the tenant's own, waited for where limits are counted."""
    body = {"model": "tiny", "input": "0", "output": "0", "tenant": tenant.tenant_id, **fields}
    answer = road.control("POST", "/v1/prices", json=body)
    assert answer.status_code == 201, answer.text


ANSWERS: dict[str, tuple[str, dict[str, Any], dict[str, Any], tuple[Any, ...]]] = {
    "rerank": (RERANK, SEARCH, {}, (SEARCH_TOKENS, 0, None, 0, "reported", "ok")),
    "rerank compressed": (RERANK, SEARCH, {"gzip": True}, (SEARCH_TOKENS, 0, None, 0, "reported", "ok")),
    "rerank that says searches": (RERANK, SEARCH, {"usage": "missing", "searches": 1}, (0, 0, "searches", 1, "reported", "ok")),
    "rerank that says both": (RERANK, SEARCH, {"searches": 2}, (SEARCH_TOKENS, 0, "searches", 2, "reported", "ok")),
    "rerank that says zero": (RERANK, SEARCH, {"usage": "zero"}, (0, 0, None, 0, "reported", "ok")),
    "rerank that fails": (RERANK, SEARCH, {"error_before": 500}, (0, 0, None, 0, "none", "upstream_error")),
    "images": (IMAGES, PAINT, {}, (3, 32, "images", 2, "reported", "ok")),
    "images without usage": (IMAGES, PAINT, {"usage": "missing"}, (0, 0, "images", 2, "counted", "ok")),
    "images compressed": (IMAGES, PAINT, {"usage": "missing", "gzip": True}, (0, 0, "images", 2, "counted", "ok")),
    "images with text that looks like usage": (IMAGES, PAINT, {"fake_usage_text": True}, (3, 32, "images", 2, "reported", "ok")),
    "images that cannot be read": (IMAGES, PAINT, {"mislabel": True}, (0, 0, "images", 2, "estimated", "ok")),
    "images refused by the engine": (IMAGES, PAINT, {"error_before": 400}, (0, 0, None, 0, "none", "refused_by_engine")),
    "speech": (SPEECH, {"model": "tiny", "voice": "v", "input": TEXT}, {}, (0, 0, "characters", len(TEXT), "counted", "ok")),
    "speech that fails": (SPEECH, {"model": "tiny", "input": TEXT}, {"error_before": 500}, (0, 0, None, 0, "none", "upstream_error")),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_each_answer_is_billed_by_its_meter(road: Installation, tenant: Tenant, name: str) -> None:
    """The engine's tokens where it says them, and what was delivered by the dialect's meter."""
    path, body, fault, expected = ANSWERS[name]

    answer = road.post(tenant, path, json=body, fault=fault)

    [row] = road.rows(tenant, 1)
    assert expected == billed(row)
    assert answer.status_code == row["status"]
    if row["basis"] == "reported" and row["input_tokens"]:
        truth = road.truth()[row["request_id"]]
        assert (truth["prompt_tokens"], truth["completion_tokens"]) == (row["input_tokens"], row["output_tokens"])


@pytest.mark.express("on")
def test_a_caller_whom_a_worker_remembers_is_metered_alike(road: Installation, tenant: Tenant) -> None:
    """On the express lane, where nobody is asked."""
    plans = [(RERANK, SEARCH), (IMAGES, PAINT), (SPEECH, {"model": "tiny", "input": TEXT})]
    for path, body in plans * 2:
        road.post(tenant, path, json=body)
    asked = road.asked_extauth()
    for path, body in plans * 10:
        road.post(tenant, path, json=body)

    # Each worker asks now and then; not for every request.
    assert road.asked_extauth() - asked < 30
    found = Counter((row["dialect"], *billed(row)) for row in road.rows(tenant, 36))
    assert {
        ("rerank", SEARCH_TOKENS, 0, None, 0, "reported", "ok"): 12, ("openai.images", 3, 32, "images", 2, "reported", "ok"): 12,
        ("openai.speech", 0, 0, "characters", len(TEXT), "counted", "ok"): 12,
    } == found


def test_the_openai_client_makes_images_and_speech(road: Installation, tenant: Tenant) -> None:
    """Unmodified, and what it gets is what the engine made."""
    client = openai.OpenAI(base_url=f"{road.url}/v1", api_key=tenant.key, max_retries=0)

    images = client.images.generate(model="tiny", prompt="a toll bridge", n=3)
    sound = client.audio.speech.create(model="tiny", voice="alloy", input=TEXT).read()

    rows = road.rows(tenant, 2)
    assert images.data is not None
    assert [("images", 3), ("characters", len(TEXT))] == [(row["meter"], row["quantity"]) for row in rows]
    assert 3 == len(images.data)
    assert 2 + 32 * len(TEXT) == len(sound)


def test_a_meter_has_a_price_of_its_own(road: Installation, tenant: Tenant) -> None:
    """Images at four cents beside tokens; characters are not charged by the price of images, and have none."""
    price(road, tenant, input="1", output="2", meter="images", each="0.04")

    for path, body in ((IMAGES, PAINT), (SPEECH, {"model": "tiny", "input": TEXT}), (RERANK, SEARCH)):
        road.post(tenant, path, json=body)
    rows = road.rows(tenant, 3)

    assert [2 * 40_000_000 + 3 * 1000 + 32 * 2000, None, SEARCH_TOKENS * 1000] == [row["amount_nano"] for row in rows]
    said = road.cli("explain", rows[0]["request_id"])["explanation"]
    assert "3 input and 32 output tokens, 2 images by" in said
    [usage] = road.cli("usage", "--tenant", tenant.tenant_id, "--since", "1h")["usage"]
    assert (2, len(TEXT), 0) == (usage["images"], usage["characters"], usage["searches"])
    month = f"{rows[0]['started_at']:%Y-%m}"
    invoice = road.cli("invoice", "--tenant", tenant.tenant_id, "--month", month)
    lines = {(line["meter"], line["quantity"], line["amount"]) for line in invoice["lines"]}
    assert {("images", 2, "0.080067"), ("characters", len(TEXT), None), (None, 0, "0.000009")} == lines
    assert 1 == invoice["requests_without_price"]


def test_a_budget_is_spent_by_images_and_not_beyond(road: Installation) -> None:
    """What is asked for is reserved at its price: three images do not fit into a budget for two, and reach nobody."""
    caller = road.new_tenant("painter")
    price(road, caller, meter="images", each="0.04")
    road.control("PUT", f"/v1/tenants/{caller.tenant_id}/limits", json={"monthly_budget": "0.10"}).raise_for_status()
    time.sleep(1.0)  # the promise is one second

    fault = {"usage": "missing"}
    # The second cannot be read: what was asked for is charged to the budget, as it is on the bill.
    plans = [(3, fault), (1, fault), (1, {"mislabel": True}), (1, fault)]
    statuses = [road.post(caller, IMAGES, json=PAINT | {"n": n}, fault=fault).status_code for n, fault in plans]

    rows = road.rows(caller, 2)
    assert [402, 200, 200, 402] == statuses
    assert [(40_000_000, 1, "counted"), (40_000_000, 1, "estimated")] == [(row["amount_nano"], row["quantity"], row["basis"]) for row in rows]


FORMS = ("/v1/audio/transcriptions", "/v1/audio/translations", "/v1/images/edits", "/v1/images/variations")


@pytest.mark.parametrize("path", FORMS)
def test_a_form_is_told_why_it_is_not_served(road: Installation, tenant: Tenant, path: str) -> None:
    """Clearly, before anything is read of it, and it reaches no engine."""
    before = len(road.truth())

    answer = httpx.post(
        f"{road.url}{path}", data={"model": "tiny"}, files={"file": ("a.wav", b"RIFF" + b"\0" * 5000)},
        headers={"authorization": f"Bearer {tenant.key}"}, timeout=60,
    )

    error = answer.json()["error"]
    assert (404, "not_found") == (answer.status_code, error["code"])
    assert "could not be metered" in error["message"]
    assert before == len(road.truth())


@pytest.mark.parametrize("path", ["/v1/realtime?model=tiny", "/v1/realtime/sessions"])
def test_a_websocket_is_told_why_it_is_not_served(road: Installation, tenant: Tenant, path: str) -> None:
    """With an upgrade or without one, as an answer of HTTP: nothing is upgraded, no engine hears of it."""
    before = len(road.truth())
    upgrade = {
        "connection": "upgrade", "upgrade": "websocket", "sec-websocket-key": "AAAAAAAAAAAAAAAAAAAAAA==", "sec-websocket-version": "13",
    }  # fmt: skip

    answers = [
        httpx.get(f"{road.url}{path}", timeout=60, headers={"authorization": f"Bearer {tenant.key}"} | more) for more in (upgrade, {})
    ]

    assert [404, 404] == [answer.status_code for answer in answers]
    for error in (answer.json()["error"] for answer in answers):
        assert "not_found" == error["code"]
        assert "a WebSocket has no end of an answer" in error["message"]
    assert before == len(road.truth())


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "no documents": (RERANK, {"model": "tiny", "query": "q", "documents": []}, "documents"),
    "no query": (RERANK, {"model": "tiny", "documents": ["a"]}, "query"),
    "too many documents": (RERANK, {"model": "tiny", "query": "q", "documents": ["a"] * 2049}, "documents"),
    "streamed images": (IMAGES, PAINT | {"stream": True}, "stream"),
    "too many images": (IMAGES, PAINT | {"n": 129}, "n"),
    "nothing to say": (SPEECH, {"model": "tiny", "input": ""}, "input"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_metered_is_refused_and_changes_nothing(road: Installation, tenant: Tenant, name: str) -> None:
    """400 with the member at fault, and no row; the next request is served."""
    path, body, param = REFUSED[name]

    answer = road.post(tenant, path, json=body)
    road.post(tenant, json=chat())

    assert (400, param) == (answer.status_code, answer.json()["error"]["param"]), answer.text
    assert ["openai.chat"] == [row["dialect"] for row in road.rows(tenant, 1)]


def test_who_leaves_before_the_first_image_pays_for_none(road: Installation, tenant: Tenant) -> None:
    """The row is there all the same."""
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{road.url}{IMAGES}", json=PAINT, timeout=0.5,
            headers={"authorization": f"Bearer {tenant.key}", "x-fake-engine": json.dumps({"first_ms": 60_000})},
        )

    [row] = road.rows(tenant, 1)
    assert (0, 0, None, 0, "none", "client_closed") == billed(row)
