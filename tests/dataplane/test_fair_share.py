# SPDX-License-Identifier: Apache-2.0
"""One batch user does not take every slot of a model's servers; whose request it is, the servers are told."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.dataplane.installation import Installation, Tenant, chat

pytestmark = pytest.mark.express("on", "off")

FAIRNESS_ID = "x-gateway-inference-fairness-id"
_SLOTS = 8


@pytest.fixture
def shared(road: Installation) -> Iterator[None]:
    """The model has eight slots while the test runs."""
    road.cli("limits", "capacity", "set", "--model", "tiny", "--slots", str(_SLOTS))
    time.sleep(1.0)  # the promise is one second
    yield
    road.cli("limits", "capacity", "delete", "--model", "tiny")
    time.sleep(1.0)


def test_a_batch_user_does_not_take_every_slot(road: Installation, shared: None) -> None:
    """Alone it has all of them; who comes then is served all the same, and the batch is told why it is not."""
    batch, interactive = road.new_tenant("batch"), road.new_tenant("interactive")
    road.cli("limits", "weight", "--tenant", interactive.tenant_id, "--set", "2")
    explained = road.cli("limits", "explain", "--tenant", batch.tenant_id, "--model", "tiny")
    stop = threading.Event()
    statuses: Counter[tuple[int, str]] = Counter()

    def worker(_: int) -> None:
        while not stop.is_set():
            answer = road.post(batch, json=chat(max_tokens=12, stream=True), fault={"chunk_ms": 50})
            code = "" if answer.status_code == 200 else answer.json()["error"]["code"]
            statuses[answer.status_code, code] += 1
            if code:
                time.sleep(0.1)

    with ThreadPoolExecutor(3 * _SLOTS) as pool:
        workers = [pool.submit(worker, number) for number in range(3 * _SLOTS)]
        while not statuses[429, "fair_share"]:
            time.sleep(0.05)
        try:
            answers = [road.post(interactive, json=chat()).status_code for _ in range(20)]
        finally:
            stop.set()
        for one in workers:
            one.result()

    assert ("pool_slots", _SLOTS) == (explained["limits"][0]["name"], explained["limits"][0]["amount"])
    assert [200] * 20 == answers
    assert {(200, ""), (429, "fair_share")} == set(statuses)


@pytest.mark.parametrize("lane", ["asked", "express"])
def test_the_model_server_is_told_the_tenant_and_no_client_can_say_another(road: Installation, tenant: Tenant, lane: str) -> None:
    """In the header that its scheduler knows; on both lanes, in any spelling, given once or twice."""
    if lane == "express":
        for _ in range(20):  # until every worker remembers
            road.post(tenant, json=chat())

    spoofs: list[dict[str, str]] = [{}, {FAIRNESS_ID: "victim"}, {FAIRNESS_ID.title(): "victim"}]
    answers = [road.post(tenant, json=chat(), headers=spoof) for spoof in spoofs]

    assert [200] * 3 == [answer.status_code for answer in answers]
    truth = road.truth()
    assert [tenant.tenant_id] * 3 == [truth[answer.headers["x-request-id"]]["fairness_id"] for answer in answers]
