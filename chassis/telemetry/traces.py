# SPDX-License-Identifier: Apache-2.0
"""
Say what a service did for one request, as spans of the trace that Envoy has begun.

Off unless PEAJE_TRACES_URL names a collector (OTLP over HTTP). Envoy decides which requests are traced; a refusal or a
failure is told of in any case: a decision's by the service that made it, an exchange's by who reads of its end.
A span has names, codes and durations: never a credential, a prompt, a statement's values.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import (
    Link,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    Tracer,
    get_current_span,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

#: Spans that wait to be sent; what comes beyond is dropped. One has about a kilobyte.
QUEUE_MAX: Final = 2048
#: Requests that one span of work names; of a batch of thousands a hundredth is sampled.
LINKS_MAX: Final = 64
#: What OpenTelemetry's conventions call what a dialect does (gen_ai.operation.name); they have no name for a rerank.
OPERATIONS: Final = {
    "openai.chat": "chat",
    "openai.completions": "text_completion",
    "openai.embeddings": "embeddings",
    "openai.responses": "chat",
    "anthropic.messages": "chat",
    "rerank": "rerank",
    "openai.images": "generate_content",
    "openai.speech": "generate_content",
}
_PROPAGATOR: Final = TraceContextTextMapPropagator()
#: How the text of a sampled trace's context can end: the lowest bit of its flags, in hexadecimal (W3C Trace Context, 3.2.2.5).
_SAMPLED_ENDS: Final = frozenset("13579bdf")


class Settings(BaseSettings):
    """Where spans go."""

    model_config = SettingsConfigDict(env_prefix="PEAJE_TRACES_", frozen=True)

    #: Of a collector that takes OTLP over HTTP, such as http://127.0.0.1:4318; nothing: no traces.
    url: str = ""
    #: How many requests of a hundred Envoy traces.
    percent: float = Field(default=1.0, ge=0, le=100)


@dataclass(slots=True)
class Served:
    """A call that is being served."""

    #: Why the request was refused, a code of the closed list; empty while it is not.
    refused: str = ""


@dataclass(slots=True)
class _State:
    tracer: Tracer | None = None
    provider: TracerProvider | None = None


_state: Final = _State()
_serving: Final[ContextVar[Served | None]] = ContextVar("serving", default=None)
#: The span under which stores are asked; none where the request is not traced.
_parent: Final[ContextVar[Context | None]] = ContextVar("parent", default=None)


def configure(service: str, *, exporter: SpanExporter | None = None) -> None:
    """Send spans of *service*, if a collector is named; call once, after forking and before serving."""
    settings = Settings()
    if not settings.url and exporter is None:
        return
    if exporter is None:
        # Late: it brings an HTTP client that nobody needs without it.
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415

        exporter = OTLPSpanExporter(endpoint=f"{settings.url.rstrip('/')}/v1/traces", timeout=2)
    # The resource is ours alone: OTEL_* of whoever starts the process is none of its business.
    provider = TracerProvider(resource=Resource({"service.name": f"peaje-{service}"}), sampler=ALWAYS_ON, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter, max_queue_size=QUEUE_MAX, max_export_batch_size=QUEUE_MAX // 4))
    _state.tracer, _state.provider = provider.get_tracer("peaje"), provider


def stop() -> None:
    """Send what is left."""
    if _state.provider is not None:
        _state.provider.shutdown()
    _state.tracer = _state.provider = None


@contextlib.contextmanager
def serving(name: str, metadata: Callable[[], Iterable[tuple[str, str | bytes]] | None]) -> Iterator[None]:
    """
    Serve a gRPC call, under the span that its caller sent with it; *metadata* is only asked for where spans are sent.

    Traced if the caller's is. If not, and the request is refused or the call fails, one span says so all the same.
    """
    tracer = _state.tracer
    if tracer is None:
        yield
        return
    traceparent = next((str(value) for key, value in metadata() or () if key == "traceparent"), "")
    began, served = time.time_ns(), Served()
    above = _above(traceparent) if is_sampled(traceparent) else None
    span = None if above is None else tracer.start_span(name, above, SpanKind.SERVER)
    _serving.set(served)
    _parent.set(None if span is None else set_span_in_context(span, above))
    failed = ""
    try:
        yield
    except BaseException as exc:
        failed = type(exc).__name__
        raise
    finally:
        # Not by tokens: a stream that is given up may be ended in another context than it began in.
        _serving.set(None)
        _parent.set(None)
        if span is None and (failed or served.refused) and _sent(traceparent).is_valid:
            span = tracer.start_span(name, _above(traceparent), SpanKind.SERVER, start_time=began)
        if span is not None:
            if served.refused:
                span.set_attribute("peaje.refused", served.refused)
            if failed:
                span.set_attribute("error.type", failed)
                span.set_status(Status(StatusCode.ERROR))
            span.end()


def refused(code: str) -> None:
    """Say that the request of the call that is being served is refused; *code* is of the closed list."""
    served = _serving.get()
    if served is not None:
        served.refused = code


def is_on() -> bool:
    """Whether spans are sent at all."""
    return _state.tracer is not None


def is_sampled(traceparent: str) -> bool:
    """Whether Envoy sends spans of that trace."""
    # Nearly none is; reading one whole takes 14 µs, which is half of what a record takes the collector.
    if traceparent[-1:] not in _SAMPLED_ENDS:
        return False
    context = _sent(traceparent)
    return context.is_valid and context.trace_flags.sampled


def failed(name: str, traceparent: str, *, began: datetime, ended: datetime, attributes: Mapping[str, str | int]) -> None:
    """Tell of an exchange that has failed, in the trace that *traceparent* names, unless that is sampled: then Envoy has."""
    tracer, context = _state.tracer, _sent(traceparent)
    if tracer is None or not context.is_valid or context.trace_flags.sampled:
        return
    span = tracer.start_span(name, _above(traceparent), SpanKind.SERVER, dict(attributes), start_time=_nanoseconds(began))
    span.set_status(Status(StatusCode.ERROR))
    span.end(_nanoseconds(ended))


def worked(name: str, traceparents: Iterable[str], *, began: datetime, ended: datetime, attributes: Mapping[str, str | int]) -> None:
    """Tell of work for several requests at once: a trace of its own, with links to those that are sampled; nothing for none."""
    tracer = _state.tracer
    if tracer is None:
        return
    sampled = filter(is_sampled, traceparents)
    links = [Link(_sent(traceparent)) for traceparent in itertools.islice(sampled, LINKS_MAX)]
    if links:
        tracer.start_span(
            name, Context(), SpanKind.CONSUMER, dict(attributes), links, start_time=_nanoseconds(began)
        ).end(_nanoseconds(ended))  # fmt: skip


def _above(traceparent: str) -> Context:
    return _PROPAGATOR.extract({"traceparent": traceparent})


def _sent(traceparent: str) -> SpanContext:
    return get_current_span(_above(traceparent)).get_span_context()


def _nanoseconds(moment: datetime) -> int:
    return int(moment.timestamp() * 1_000_000) * 1000


@contextlib.contextmanager
def asking(system: str, operation: str) -> Iterator[None]:
    """Ask a store for the call that is being served; *system* is a database system of OpenTelemetry's conventions."""
    above, tracer = _parent.get(), _state.tracer
    if above is None or tracer is None:
        yield
        return
    span = tracer.start_span(f"{operation} {system}", above, SpanKind.CLIENT, {"db.system.name": system, "db.operation.name": operation})
    try:
        yield
    except BaseException as exc:
        span.set_attribute("error.type", type(exc).__name__)
        span.set_status(Status(StatusCode.ERROR))
        raise
    finally:
        span.end()
