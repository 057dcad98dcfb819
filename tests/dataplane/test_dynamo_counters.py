# SPDX-License-Identifier: Apache-2.0
"""The ledger against NVIDIA Dynamo's own counters: what is whole is equal, and what an aborted request compares to."""

from __future__ import annotations

import json
import random
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from chassis.models import ModelCatalogue
from chassis.served import Model
from metering.adapters.engines import fetch
from metering.core.conservation import Counters
from tests.dataplane.installation import Installation, Tenant

pytestmark = [pytest.mark.soak, pytest.mark.timeout(600)]

_WHOLE, _ABORTED = 700, 300
#: Far above what a whole answer has, so that an aborted one is cut in its middle.
_LONG = 400
_QUIET_SECONDS = 60.0


@pytest.fixture
def model(dynamo: Installation) -> Model:
    """The model that Dynamo serves."""
    [served] = ModelCatalogue.load(dynamo.home / "envoy/models.yaml").models
    return served


def ask(dynamo: Installation, tenant: Tenant, model: Model, number: int) -> None:
    """One whole request of some kind."""
    chance = random.Random(number)
    words, tokens = "toll " * chance.randint(1, 60), chance.randint(1, 24)
    chat = {"model": model.name, "messages": [{"role": "user", "content": words}], "max_tokens": tokens}
    kinds = (
        ("/v1/chat/completions", chat), ("/v1/chat/completions", chat | {"stream": True}),
        ("/v1/completions", {"model": model.name, "prompt": words, "max_tokens": tokens}),
        ("/v1/chat/completions", chat | {"stream": True, "stream_options": {"include_usage": True}}),
    )
    path, body = kinds[number % len(kinds)]
    assert 200 == dynamo.post(tenant, path, json=body).status_code


def abort(dynamo: Installation, tenant: Tenant, model: Model, number: int) -> None:
    """A stream whose caller goes away after a few events."""
    after = 1 + number % 12
    body = {
        "model": model.name, "messages": [{"role": "user", "content": f"toll {number}"}], "max_tokens": _LONG, "stream": True,
        "ignore_eos": True,
    }
    with httpx.stream(
        "POST", f"{dynamo.url}/v1/chat/completions", json=body, headers={"authorization": f"Bearer {tenant.key}"}, timeout=60
    ) as answer:
        for seen, _ in enumerate(line for line in answer.iter_lines() if line.startswith("data: ")):
            if seen >= after:
                return


def quiet(model: Model) -> Counters:
    """The engine's counters once nothing runs and they stand still."""
    deadline = time.monotonic() + _QUIET_SECONDS
    last = fetch(model)
    while time.monotonic() < deadline:
        time.sleep(1.0)
        now = fetch(model)
        if now is not None and now.running == 0 and now == last:
            return now
        last = now
    raise AssertionError(f"the engine is never quiet: {last}")


def billed(dynamo: Installation, tenant: Tenant, count: int) -> tuple[int, int, set[str]]:
    rows = dynamo.rows(tenant, count)
    assert count == len(rows)
    return sum(row["input_tokens"] for row in rows), sum(row["output_tokens"] for row in rows), {row["basis"] for row in rows}


def test_the_ledger_of_a_thousand_requests_is_what_dynamo_counted(dynamo: Installation, model: Model) -> None:
    """Whole ones to the token; of aborted ones the ledger has what was delivered, which the engine exceeds."""
    whole, aborted = dynamo.new_tenant("whole"), dynamo.new_tenant("aborted")
    before = quiet(model)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: ask(dynamo, whole, model, number), range(_WHOLE)))
    between = quiet(model)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: abort(dynamo, aborted, model, number), range(_ABORTED)))
    after = quiet(model)

    whole_input, whole_output, whole_bases = billed(dynamo, whole, _WHOLE)
    cut_input, cut_output, cut_bases = billed(dynamo, aborted, _ABORTED)
    found = {
        "whole": {"engine": (between.input_tokens - before.input_tokens, between.output_tokens - before.output_tokens),
                  "ledger": (whole_input, whole_output), "bases": sorted(whole_bases)},
        "aborted": {"engine": (after.input_tokens - between.input_tokens, after.output_tokens - between.output_tokens),
                    "ledger": (cut_input, cut_output), "bases": sorted(cut_bases)},
    }  # fmt: skip
    print(f"\n{json.dumps(found)}")
    assert found["whole"]["engine"] == found["whole"]["ledger"]
    assert ({"reported"}, {"running"}) == (whole_bases, cut_bases - {"reported"})
    engine_input, engine_output = found["aborted"]["engine"]
    assert cut_input == engine_input
    # Each delivered at least one; the engine went on until it noticed that its caller was gone.
    assert _ABORTED <= cut_output <= engine_output


def test_a_frame_of_dynamo_with_text_is_a_token(dynamo: Installation, model: Model) -> None:
    """Asked past Envoy, without running usage: what the basis `counted` rests on."""
    [endpoint] = model.pools[0].endpoints
    body = {
        "model": model.name, "messages": [{"role": "user", "content": "toll"}], "max_tokens": 200, "stream": True,
        "stream_options": {"include_usage": True}, "ignore_eos": True,
    }
    with httpx.stream("POST", f"http://{endpoint.host}:{endpoint.port}/v1/chat/completions", json=body, timeout=60) as answer:
        frames = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]

    with_text = sum(bool(choice["delta"].get("content")) for frame in frames for choice in frame["choices"])
    assert 200 == frames[-1]["usage"]["completion_tokens"]
    assert with_text == 200
