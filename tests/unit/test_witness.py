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
    request_id=request_id(1), started_at=NOON, tenant_id="acme", input_tokens=3, output_tokens=5, quantity=None, heard_at=NOON
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


def booked(tenant: str = "acme", input_tokens: int = 3, output_tokens: int = 5, quantity: int = 0, outcome: str = "ok") -> Row:
    return Row(tenant_id=tenant, input_tokens=input_tokens, output_tokens=output_tokens, quantity=quantity, outcome=outcome)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (None, Kind.ROW_MISSING),
        (booked(), None),
        (booked(tenant="bolt"), Kind.TENANT_DIFFERS),
        (booked(input_tokens=4), Kind.USAGE_DIFFERS),
        (booked(output_tokens=0), Kind.USAGE_DIFFERS),
        # It said nothing of what else the dialect is metered by: the ledger may have put what was asked for.
        (booked(quantity=2), None),
    ],
)
def test_each_way_to_differ_has_a_name(row: Row | None, expected: Kind | None) -> None:
    """The tenant before the tokens: who pays matters more."""
    assert expected == compare(SEEN, row)


@pytest.mark.parametrize(
    ("quantity", "outcome", "expected"),
    [
        (2, "ok", None), (1, "ok", Kind.USAGE_DIFFERS), (3, "ok", Kind.USAGE_DIFFERS), (0, "ok", Kind.USAGE_DIFFERS),
        (2, "client_closed", None), (0, "client_closed", Kind.USAGE_DIFFERS), (0, "lost", Kind.USAGE_DIFFERS),
        # Nothing of an answer that somebody broke off is charged by its meter.
        (0, "upstream_error", None), (0, "gateway_error", None), (0, "refused_by_engine", None), (1, "upstream_error", Kind.USAGE_DIFFERS),
    ],
)
def test_what_else_was_metered_is_compared_as_tokens_are(quantity: int, outcome: str, expected: Kind | None) -> None:
    """Two images that the witness saw are two images on the bill."""
    seen = said(
        request={"started_at": stamp(NOON), "dialect": "openai.images", "quantity": "2"},
        usage={"seen": "none", "quantity": 2.0},
    )

    assert 2 == seen.quantity
    assert expected == compare(seen, booked(input_tokens=0, output_tokens=0, quantity=quantity, outcome=outcome))


@pytest.mark.parametrize(
    ("dialect", "asked", "delivered", "expected"),
    [
        ("openai.images", "2", 3.0, 2), ("openai.speech", "12", 12.0, 12), ("rerank", "", 4.0, 4), ("rerank", "", 0.0, 0),
        ("openai.images", "2", -1.0, None), ("openai.images", "2", 1.5, None), ("openai.images", "2", None, None), ("openai.chat", "", 7.0, 0),
    ],
)
def test_what_was_metered_is_read_as_the_ledger_does(dialect: str, asked: str, delivered: float | None, expected: int | None) -> None:
    """No more than was asked for; a count that cannot be says nothing."""
    request = {"started_at": stamp(NOON), "dialect": dialect, "quantity": asked}

    assert expected == said(request=request, usage={"seen": "none", "quantity": delivered}).quantity


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
        spaces["peaje.request"].update({"started_at": stamp(NOON), "dialect": "openai.images", "quantity": "2"})
        spaces["peaje.usage"].update({"seen": "final", "input": 3, "output": 5, "quantity": 2})

    kept = asyncio.run(_hear(message, wire.StreamAccessLogsMessage()))

    assert [request_id(0), request_id(3)] == [one.request_id for one in kept]
    assert ("acme", 3, 5, 2) == (kept[0].tenant_id, kept[0].input_tokens, kept[0].output_tokens, kept[0].quantity)
