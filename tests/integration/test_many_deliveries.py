# SPDX-License-Identifier: Apache-2.0
"""A million exchanges in batches that each come one to five times, in any order: minutes, only with --chaos."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from metering.adapters.reading import read
from metering.adapters.tail import Piece, Place, next_piece
from tests.journals import NOON, collecting, end, exchanges, rows, write

#: Exchanges of one batch: two records each, and nearly as many bytes as the collector takes at once.
_BATCH = 5_000
_DELIVERIES_MAX = 5


def batches(count: int) -> Iterator[bytes]:
    """The lines of *count* exchanges in batches; the same whenever they are made."""
    for first in range(0, count, _BATCH):
        yield b"".join(exchanges(min(_BATCH, count - first), first=first, seed=first))


def truth(count: int) -> dict[tuple[str, str], tuple[int, int, int]]:
    """Requests, input and output tokens of each tenant and model, as the records have them."""
    found: Counter[tuple[str, str, str]] = Counter()
    for data in batches(count):
        for record in map(json.loads, data.splitlines()):
            if record["type"] == "DownstreamEnd":
                whose = record["identity"]["tenant"], record["request"]["model"]
                found.update({(*whose, "requests"): 1, (*whose, "input"): record["usage"]["input"], (*whose, "output"): record["usage"]["output"]})
    return {
        whose: (found[*whose, "requests"], found[*whose, "input"], found[*whose, "output"])
        for whose in {(tenant, model) for tenant, model, _ in found}
    }


@pytest.mark.chaos
@pytest.mark.timeout(0)
def test_a_million_exchanges_delivered_again_and_again_in_any_order_are_themselves(
    ledger_url: str, tmp_path: Path, pytestconfig: pytest.Config, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows, sums and bills are those of one delivery. `--delivered-exchanges` makes it shorter, `--storm-seed` the same again."""
    count, seed = pytestconfig.getoption("delivered_exchanges"), pytestconfig.getoption("storm_seed")
    chance = random.Random(seed)
    order = [first for first in range(0, count, _BATCH) for _ in range(chance.randint(1, _DELIVERIES_MAX))]
    chance.shuffle(order)
    live = write(tmp_path / "journal/journal.jsonl", [end(0)])
    whole = next_piece(live, {})
    assert whole is not None
    began, written = time.monotonic(), 0

    with collecting(ledger_url, live) as collector:
        for first in order:
            data = b"".join(exchanges(min(_BATCH, count - first), first=first, seed=first))
            piece = Piece(start=0, data=data[:-1], place=Place(whole.place.file_id, whole.place.name, len(data)))
            collector.ledger.write(read(piece), [piece], NOON)
            written += data.count(b"\n")

    seconds = time.monotonic() - began
    with capsys.disabled():
        print(f"\n{count} exchanges, {len(order)} deliveries of {-(-count // _BATCH)} batches, {written} records, {seconds:.0f} s, seed {seed}")
    expected = truth(count)
    for table, requests in (("usage_event", "count(*)"), ("usage_hour", "sum(request_count)")):
        summed = rows(ledger_url, f"select tenant_id, model, {requests}, sum(input_tokens), sum(output_tokens) from {table} group by 1, 2")
        assert expected == {(tenant, model): (int(n), int(i), int(o)) for tenant, model, n, i, o in summed}
    assert [(0,)] == rows(ledger_url, "select count(*) from usage_conflict")
    assert [(0,)] == rows(ledger_url, "select count(*) from open_exchange")
