# SPDX-License-Identifier: Apache-2.0
"""Spans of a service: under its caller's, or none; a refusal in any case."""

from __future__ import annotations

from collections.abc import Callable, Iterator

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


def test_without_a_collector_nothing_is_made() -> None:
    """Off is off."""
    traces.configure("test")

    with traces.serving("Check", metadata("01")), traces.asking("redis", "take"):
        traces.refused("x")
