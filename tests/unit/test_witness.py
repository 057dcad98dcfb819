# SPDX-License-Identifier: Apache-2.0
"""The second witness without Envoy and Postgres: what is read of it, how it compares, how much is kept."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest

from chassis.wire import access_log_pb2 as wire
from metering.adapters import witness
from metering.adapters.witness import Heard
from metering.core.journal import Malformed
from metering.core.witness import Kind, Row, Sighting, compare, sighting
from metering.servicer import Witness
from tests.journals import NOON, request_id, stamp

SEEN = Sighting(
    request_id=request_id(1), started_at=NOON, tenant_id="acme", input_tokens=3, output_tokens=5, heard_at=NOON
)


def said(**changes: Any) -> Sighting:
    facts: dict[str, Any] = {
        "request_id": request_id(1), "identity": {"tenant": "acme"}, "request": {"started_at": stamp(NOON)},
        "usage": {"seen": "final", "input": 3.0, "output": 5.0}, "heard_at": NOON,
    } | changes
    return sighting(facts.pop("request_id"), **facts)


def test_an_entry_is_read_with_the_numbers_of_its_metadata() -> None:
    """Metadata has doubles only."""
    assert said() == SEEN


@pytest.mark.parametrize(
    "usage",
    [{}, {"seen": "none", "frames": 4}, {"seen": "final", "input": -1, "output": 1.5}, {"seen": "running", "input": "x", "output": 1e12}],
)
def test_usage_that_is_none_says_nothing(usage: dict[str, Any]) -> None:
    """The ledger may have clamped or estimated it: that is no disagreement."""
    assert (None, None) == (said(usage=usage).input_tokens, said(usage=usage).output_tokens)


@pytest.mark.parametrize(
    "changes",
    [
        {"request_id": "mine"}, {"identity": {}}, {"request": {}}, {"request": {"started_at": "soon"}},
        {"request": {"started_at": 7.0}}, {"request": {"started_at": "9" * 20 + ".0"}},
    ],
)
def test_an_entry_that_is_no_exchange_of_ours_is_malformed(changes: dict[str, Any]) -> None:
    """Never another exception: the stream goes on."""
    with pytest.raises(Malformed):
        said(**changes)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (None, Kind.ROW_MISSING),
        (Row(tenant_id="acme", input_tokens=3, output_tokens=5), None),
        (Row(tenant_id="bolt", input_tokens=3, output_tokens=5), Kind.TENANT_DIFFERS),
        (Row(tenant_id="acme", input_tokens=4, output_tokens=5), Kind.USAGE_DIFFERS),
        (Row(tenant_id="acme", input_tokens=3, output_tokens=0), Kind.USAGE_DIFFERS),
    ],
)
def test_each_way_to_differ_has_a_name(row: Row | None, expected: Kind | None) -> None:
    """The tenant before the tokens: who pays matters more."""
    assert expected == compare(SEEN, row)


@pytest.mark.parametrize("beyond", [-1, 0, 1])
def test_what_waits_is_bounded_and_what_has_no_room_is_left_out(monkeypatch: pytest.MonkeyPatch, beyond: int) -> None:
    """Postgres may be away for hours; a witness may not fill the memory."""
    monkeypatch.setattr(witness, "HEARD_MAX", 10)
    heard = Heard()
    for _ in range(10 + beyond):
        heard.add(SEEN)

    assert min(10, 10 + beyond) == len(heard.before(NOON + timedelta(seconds=1)))


def test_a_batch_is_bounded_and_stays_until_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what was heard long enough ago; what must be asked for again goes behind the others."""
    monkeypatch.setattr(witness, "BATCH_MAX", 2)
    heard = Heard()
    for number in range(3):
        heard.add(said(request_id=request_id(number)))
    later = NOON + timedelta(seconds=1)

    assert [] == heard.before(NOON)
    first = heard.before(later)
    assert first == heard.before(later)
    heard.done(2, [first[0]])

    assert [request_id(2), request_id(0)] == [one.request_id for one in heard.before(later)]


async def _messages(*messages: wire.StreamAccessLogsMessage) -> AsyncIterator[wire.StreamAccessLogsMessage]:
    for message in messages:
        yield message


async def _hear(*messages: wire.StreamAccessLogsMessage) -> list[Sighting]:
    heard = Heard()
    async for _ in Witness(heard, lambda: NOON).hear(_messages(*messages), None):
        pass
    return heard.before(NOON + timedelta(seconds=1))


def test_the_servicer_keeps_ends_and_goes_on_after_what_it_cannot_read() -> None:
    """As Envoy sends them: several in a message, periodic ones among them."""
    message = wire.StreamAccessLogsMessage()
    for number, (is_intermediate, tenant) in enumerate([(False, "acme"), (True, "acme"), (False, ""), (False, "acme")]):
        common = message.http_logs.log_entry.add().common_properties
        common.stream_id, common.intermediate_log_entry = request_id(number), is_intermediate
        spaces = common.metadata.filter_metadata
        if tenant:
            spaces["envoy.filters.http.ext_authz"].update({"tenant": tenant, "nested": {"x": 1}})
        spaces["peaje.request"].update({"started_at": stamp(NOON)})
        spaces["peaje.usage"].update({"seen": "final", "input": 3, "output": 5})

    kept = asyncio.run(_hear(message, wire.StreamAccessLogsMessage()))

    assert [request_id(0), request_id(3)] == [one.request_id for one in kept]
    assert ("acme", 3, 5) == (kept[0].tenant_id, kept[0].input_tokens, kept[0].output_tokens)
