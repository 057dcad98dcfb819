# SPDX-License-Identifier: Apache-2.0
"""Spans of a service: under its caller's, or none; a refusal in any case."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from chassis.errors import Unavailable
from chassis.telemetry import traces

_TRACE = "0af7651916cd43dd8448eb211c80319c"


def metadata(flags: str) -> Callable[[], list[tuple[str, str | bytes]]]:
    """What Envoy sends with a call."""
    return lambda: [("user-agent", b"x"), ("traceparent", f"00-{_TRACE}-b7ad6b7169203331-{flags}")]


@pytest.fixture
def sent() -> Iterator[InMemorySpanExporter]:
    """Where spans go."""
    exporter = InMemorySpanExporter()
    traces.configure("test", exporter=exporter)
    yield exporter
    traces.stop()


def names(sent: InMemorySpanExporter) -> list[str]:
    """What was sent, once all of it is."""
    traces.stop()
    return sorted(span.name for span in sent.get_finished_spans())


def test_a_traced_call_and_what_it_asks_are_spans_of_its_callers_trace(sent: InMemorySpanExporter) -> None:
    """One above the other."""
    with traces.serving("Check", metadata("01")), traces.asking("postgresql", "select"):
        pass

    assert ["Check", "select postgresql"] == names(sent)
    inner, outer = sent.get_finished_spans()
    assert (int(_TRACE, 16), int(_TRACE, 16)) == (inner.context.trace_id, outer.context.trace_id)
    assert inner.parent is not None
    assert outer.context.span_id == inner.parent.span_id


def test_a_call_that_is_not_traced_leaves_nothing_unless_it_is_refused_or_fails(sent: InMemorySpanExporter) -> None:
    """And then itself alone."""
    with traces.serving("Fine", metadata("00")), traces.asking("redis", "take"):
        pass
    with traces.serving("Refused", metadata("00")), traces.asking("redis", "take"):
        traces.refused("rate_limit_exceeded")
    with pytest.raises(Unavailable), traces.serving("Failed", metadata("00")):
        raise Unavailable("secret words")

    assert ["Failed", "Refused"] == names(sent)
    failed, refused = sorted(sent.get_finished_spans(), key=lambda span: span.name)
    assert {"peaje.refused": "rate_limit_exceeded"} == dict(refused.attributes or {})
    assert {"error.type": "Unavailable"} == dict(failed.attributes or {})
    assert "secret words" not in failed.to_json()


@pytest.mark.parametrize("sent_along", [[], [("traceparent", "nonsense")], [("traceparent", "00-0-0-01")]])
def test_what_is_no_trace_is_served_all_the_same(sent: InMemorySpanExporter, sent_along: list[tuple[str, str | bytes]]) -> None:
    """A caller's odd header never fails a decision, and makes no trace that joins another."""
    with traces.serving("Check", lambda: sent_along):
        pass

    assert [] == names(sent)


NOON = datetime(2026, 11, 12, 12, tzinfo=UTC)


def parent(flags: str, number: int = 0) -> str:
    """What a record has of a request's trace."""
    return f"00-{int(_TRACE, 16) + number:032x}-b7ad6b7169203331-{flags}"


def test_a_failed_exchange_is_told_of_in_its_own_trace_and_time_unless_envoy_has(sent: InMemorySpanExporter) -> None:
    """Of what is sampled, and of what is no trace, nothing."""
    for sent_along in (parent("00"), parent("01"), "nonsense", ""):
        traces.failed("chat m", sent_along, began=NOON, ended=NOON + timedelta(seconds=2), attributes={"error.type": "upstream_error"})

    assert ["chat m"] == names(sent)
    [span] = sent.get_finished_spans()
    assert int(_TRACE, 16) == span.context.trace_id
    assert span.parent is not None
    assert 0xB7AD6B7169203331 == span.parent.span_id
    assert (int(NOON.timestamp()) * 10**9, 2 * 10**9) == (span.start_time, span.end_time - span.start_time)


@pytest.mark.parametrize(("sampled", "links"), [(0, None), (1, 1), (traces.LINKS_MAX, traces.LINKS_MAX), (traces.LINKS_MAX + 1, traces.LINKS_MAX)])
def test_work_for_several_requests_names_those_that_are_sampled_up_to_a_bound(
    sent: InMemorySpanExporter, sampled: int, links: int | None
) -> None:
    """In a trace of its own; none at all for nobody."""
    those = [parent("01", number) for number in range(sampled)]

    traces.worked("collect", [*those, parent("00", 10**6), "nonsense"], began=NOON, ended=NOON, attributes={})

    assert ([] if links is None else ["collect"]) == names(sent)
    for span in sent.get_finished_spans():
        assert (links, None) == (len(span.links), span.parent)
        assert int(_TRACE, 16) != span.context.trace_id


def test_without_a_collector_nothing_is_made() -> None:
    """Off is off."""
    traces.configure("test")

    with traces.serving("Check", metadata("01")), traces.asking("redis", "take"):
        traces.refused("x")
