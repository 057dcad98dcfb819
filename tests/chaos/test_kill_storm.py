# SPDX-License-Identifier: Apache-2.0
"""Parts die again and again under load, alone and together; the bill is the same. Minutes: only with --chaos."""

from __future__ import annotations

import random
import threading
import time

import pytest

from tests.dataplane.installation import Installation
from tests.dataplane.test_survival import hammer, settled_rows

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]

_STORM_SECONDS = 45.0
#: Longer than a part takes to be back, so that most deaths meet a part that works.
_BETWEEN_DEATHS_SECONDS = 4.0


@pytest.mark.parametrize(
    "parts",
    [("metering",), ("collector",), ("extauth",), ("ratelimit",), ("valkey",), ("postgres",), ("collector", "postgres"), ("extauth", "ratelimit", "metering", "valkey")],
    ids="+".join,
)  # fmt: skip
def test_a_storm_of_deaths_loses_no_row_and_doubles_none(road: Installation, parts: tuple[str, ...]) -> None:
    """Every answer of 200 has one row; what the engine reported is what the row says."""
    tenant = road.new_tenant("storm")
    found: list[list[tuple[str, int]]] = []
    load = threading.Thread(target=lambda: found.append(hammer(road, tenant, _STORM_SECONDS)))
    order = random.Random("+".join(parts))
    load.start()

    deaths = 0
    while load.is_alive():
        time.sleep(order.uniform(0.5, 1.5) * _BETWEEN_DEATHS_SECONDS)
        part = order.choice(parts)
        road.wait_restarted(part, road.kill(part))
        deaths += 1
    load.join()

    rows = settled_rows(road, tenant)
    ids = [row["request_id"] for row in rows]
    passed = {request_id for request_id, status in found[0] if status == 200}
    truth = road.truth()
    assert deaths >= 3
    assert len(passed) > 50
    assert sorted(set(ids)) == sorted(ids)
    assert set() == passed - set(ids)
    for row in rows:
        if row["basis"] == "reported":
            engine = truth[row["request_id"]]
            assert (engine["prompt_tokens"], engine["completion_tokens"]) == (row["input_tokens"], row["output_tokens"])
