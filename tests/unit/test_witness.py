# SPDX-License-Identifier: Apache-2.0
"""The second witness without Envoy and Postgres: what is read of it, how it compares, how much is kept."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest
from opentelemetry.proto.collector.logs.v1 import logs_service_pb2 as wire

from metering.adapters import witness
from metering.adapters.witness import Heard
from metering.core.journal import Malformed
from metering.core.witness import Kind, Row, Sighting, compare, sighting
from metering.servicer import Witness
from tests.journals import NOON, request_id, stamp

SEEN = Sighting(
    request_id=request_id(1), started_at=NOON, tenant_id="acme", input_tokens=3, output_tokens=5, quantity=None, heard_at=NOON
)


def line(
    number: int = 1, *, started_at: str = stamp(NOON), usage: str = "final 3 5", meter: str = "- openai.chat -", tenant: str = "acme"
) -> str:
    """What Envoy says of an exchange."""
    return f"{request_id(number)} {started_at} {usage} {meter} {tenant}"


def said(text: str) -> Sighting:
    return sighting(text, heard_at=NOON)


@pytest.mark.parametrize("usage", ["final 3 5", "running 3 5", "final 3.0 5e0"])
def test_a_line_is_read_with_the_numbers_of_its_metadata(usage: str) -> None:
    """Metadata has doubles only, which Envoy writes as it writes JSON."""
    assert said(line(usage=usage)) == SEEN


def test_usage_that_names_one_count_only_says_zero_of_the_other() -> None:
    """As the journal reads it: an embedding has no output."""
    assert (3, 0) == (said(line(usage="final 3 -")).input_tokens, said(line(usage="final 3 -")).output_tokens)


@pytest.mark.parametrize(
    "usage",
    ["- - -", "none - -", "none 3 5", "final -1 1.5", "running x 1e+12", "final nan inf"],
)
def test_usage_that_is_none_says_nothing(usage: str) -> None:
    """The ledger may have clamped or estimated it: that is no disagreement."""
    assert (None, None) == (said(line(usage=usage)).input_tokens, said(line(usage=usage)).output_tokens)


@pytest.mark.parametrize(
    "text",
    [
        "", "mine 1.0 final 3 5 - openai.chat - acme", line(tenant="-"), line(started_at="-"), line(started_at="soon"), line(started_at="9" * 20 + ".0"),
        line(started_at="1e5"), line().rpartition(" ")[0], line(meter="2 openai.images many"),
    ],
)
def test_a_line_that_is_no_exchange_of_ours_is_malformed(text: str) -> None:
    """Never another exception: the other lines count."""
    with pytest.raises(Malformed):
        said(text)


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
    seen = said(line(usage="none - -", meter="2 openai.images 2"))

    assert 2 == seen.quantity
    assert expected == compare(seen, booked(input_tokens=0, output_tokens=0, quantity=quantity, outcome=outcome))


@pytest.mark.parametrize(
    ("dialect", "asked", "delivered", "expected"),
    [
        ("openai.images", "2", "3", 2), ("openai.speech", "12", "12", 12), ("rerank", "", "4", 4), ("rerank", "-", "0", 0),
        ("openai.images", "2", "-1", None), ("openai.images", "2", "1.5", None), ("openai.images", "2", "-", None), ("openai.chat", "", "7", 0),
    ],
)
def test_what_was_metered_is_read_as_the_ledger_does(dialect: str, asked: str, delivered: str, expected: int | None) -> None:
    """No more than was asked for; a count that cannot be says nothing."""
    assert expected == said(line(usage="none - -", meter=f"{delivered} {dialect} {asked}")).quantity


@pytest.mark.parametrize("beyond", [-1, 0, 1])
def test_what_waits_is_bounded_and_what_has_no_room_is_left_out(monkeypatch: pytest.MonkeyPatch, beyond: int) -> None:
    """Postgres may be away for hours; a witness may not fill the memory."""
    monkeypatch.setattr(witness, "HEARD_MAX", 10)
    heard = Heard()
    heard.add([SEEN] * 4)
    heard.add([SEEN] * (6 + beyond))

    assert min(10, 10 + beyond) == len(heard.before(NOON + timedelta(seconds=1)))


def test_a_batch_is_bounded_and_stays_until_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what was heard long enough ago; what must be asked for again goes behind the others."""
    monkeypatch.setattr(witness, "BATCH_MAX", 2)
    heard = Heard()
    heard.add([said(line(number)) for number in range(3)])
    later = NOON + timedelta(seconds=1)

    assert [] == heard.before(NOON)
    first = heard.before(later)
    assert first == heard.before(later)
    heard.done(2, [first[0]])

    assert [request_id(2), request_id(0)] == [one.request_id for one in heard.before(later)]


def test_the_servicer_keeps_each_line_and_goes_on_after_one_that_it_cannot_read() -> None:
    """As Envoy sends them: several in a message."""
    message, heard = wire.ExportLogsServiceRequest(), Heard()
    scope = message.resource_logs.add().scope_logs.add()
    for text in (line(0), line(1, tenant="-"), line(2)):
        scope.log_records.add().body.string_value = text

    asyncio.run(Witness(heard, lambda: NOON).hear(message, None))

    kept = heard.before(NOON + timedelta(seconds=1))
    assert [request_id(0), request_id(2)] == [one.request_id for one in kept]
    assert ("acme", 3, 5) == (kept[0].tenant_id, kept[0].input_tokens, kept[0].output_tokens)
