# SPDX-License-Identifier: Apache-2.0
"""
What the collector counts, each name once.

It alone has tenants for labels, because it alone sees each exchange once: up to a bound, and then no more.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from datetime import datetime
from functools import lru_cache
from typing import Final

from prometheus_client import Counter, Gauge, Histogram

from chassis import contract as c
from metering.core.journal import Entry, Refused, UsageEvent
from metering.core.timings import Timings, timings

#: Seconds that a stream's first token, and the one after another, may take; tokens a second.
_FIRST_TOKEN_BUCKETS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_BETWEEN_TOKENS_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)
_RATE_BUCKETS: Final = (1, 5, 10, 20, 30, 50, 75, 100, 150, 200, 400, 1000)
#: Seconds, around the promise of 50 ms.
_ADDED_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
#: What a tenant's requests usually come to: shown with its first one of any kind.
_OUTCOMES: Final = ("ok", "client_closed", "upstream_error", "refused")
#: Stands for every tenant beyond those that have a label of their own; no tenant's id looks like it.
OTHER_TENANTS: Final = "(other)"

#: Journals have operators' own names, of which a collector has a bounded number.
LAG_BYTES: Final = Gauge("peaje_collector_lag_bytes", "Bytes of a journal that are not read yet.", ["journal"])
LAG_SECONDS: Final = Gauge(
    "peaje_collector_lag_seconds", "Since a journal was last read to its end; under a second if all is well.", ["journal"]
)
DISK_USED_PERCENT: Final = Gauge("peaje_collector_disk_used_percent", "Of the disk that holds a journal.", ["journal"])
ROAD_CLOSED: Final = Gauge("peaje_collector_road_closed", "1 while new requests are refused because the disk is full.", ["journal"])
ROWS: Final = Counter("peaje_collector_rows_total", "New rows of the ledger.", ["basis", "outcome"])
DUPLICATES_ABSORBED: Final = Counter("peaje_collector_duplicates_absorbed_total", "Records of exchanges that had their row.")
DEFECTS: Final = Counter("peaje_collector_defects_total", "Runs of bytes in a journal that are no record.", ["journal"])
ORPHANS_CLOSED: Final = Counter(
    "peaje_collector_orphans_closed_total", "Exchanges that were closed without an end record.", ["journal"]
)
#: Buckets around the promise of five seconds.
ROW_DELAY_SECONDS: Final = Histogram(
    "peaje_collector_row_delay_seconds", "From the end of an exchange to its row; closed orphans left out.",
    buckets=(0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 60, 600, 3600),
)
EXCEPTIONS_OPEN: Final = Gauge("peaje_reconciliation_exceptions_open", "Disagreements that nobody has explained or signed for.")
#: Models are the operator's own names.
DRIFT_TOKENS: Final = Gauge(
    "peaje_conservation_drift_tokens",
    "Ledger less engine in the newest interval, but for what requests that were cut explain; nothing where it could not be compared.",
    ["model", "kind"],
)

ADDED_SECONDS: Final = Histogram(
    "peaje_gateway_added_seconds",
    "From a request's last byte to the first one that its model server is sent, by Envoy's clock: what the gateway adds.",
    buckets=_ADDED_BUCKETS,
)
FIRST_TOKEN_SECONDS: Final = Histogram(
    "peaje_model_first_token_seconds", "From a request's last byte to the first one of its streamed answer.", ["model"],
    buckets=_FIRST_TOKEN_BUCKETS,
)  # fmt: skip
BETWEEN_TOKENS_SECONDS: Final = Histogram(
    "peaje_model_between_tokens_seconds", "Mean time between two tokens of a stream.", ["model"], buckets=_BETWEEN_TOKENS_BUCKETS
)
TOKENS_PER_SECOND: Final = Histogram(
    "peaje_model_tokens_per_second", "Output tokens of a stream by the time from its first byte to its last.", ["model"],
    buckets=_RATE_BUCKETS,
)  # fmt: skip
LANES: Final = Counter(
    "peaje_gateway_lanes_total",
    "Admitted requests by who was asked: nobody (express: the worker had a lease), ratelimit alone (recognised: the worker "
    "remembered the caller), both (asked).",
    ["lane"],
)  # fmt: skip
REFUSALS: Final = Counter("peaje_gateway_refusals_total", "Refused requests of callers who are known.", ["status"])
TENANT_REQUESTS: Final = Counter(
    "peaje_tenant_requests_total", "Requests of a tenant by what became of them; `refused` were not admitted.", ["tenant", "outcome"]
)
TENANT_TOKENS: Final = Counter("peaje_tenant_tokens_total", "Tokens of a tenant, as the ledger has them.", ["tenant", "kind"])

# Shown from the start: a counter that appears with its first count has never grown, as Prometheus sees it.
for _lane in ("express", "recognised", "asked"):
    LANES.labels(_lane)
for _status in ("402", "403", "429", "503"):
    REFUSALS.labels(_status)


class Exchanges:
    """Counts what each exchange was; one per process, which may read several journals."""

    def __init__(self, *, tenants_max: int) -> None:
        self._tenants_max = tenants_max
        self._tenants: set[str] = set()

    def recorded(self, rows: Iterable[tuple[UsageEvent, Entry]], now: datetime) -> None:
        """
        Count rows that are new in the ledger at *now*, each with the end record that it was made from.

        A batch at a time: to count costs a lock, to add up a batch first costs next to nothing.
        """
        kinds: defaultdict[tuple[str, str, str, str], list[int]] = defaultdict(lambda: [0, 0, 0, 0])
        for event, entry in rows:
            ROW_DELAY_SECONDS.observe(max(0.0, (now - event.ended_at).total_seconds()))
            request = entry.fields[c.J_REQUEST]
            lane = "express" if request.get(c.REQ_EXPRESS) else "recognised" if request.get(c.REQ_RECOGNISED) else "asked"
            sums = kinds[event.basis, event.outcome, lane, self._label(event.tenant_id)]
            sums[0] += 1
            sums[1] += event.input_tokens
            sums[2] += event.output_tokens
            sums[3] += event.cached_tokens
            _observe(event.model, timings(entry, event))
        for (basis, outcome, lane, tenant), (count, *tokens) in kinds.items():
            ROWS.labels(basis, outcome).inc(count)
            LANES.labels(lane).inc(count)
            TENANT_REQUESTS.labels(tenant, outcome).inc(count)
            for kind, sum_ in zip(("input", "output", "cached"), tokens, strict=True):
                TENANT_TOKENS.labels(tenant, kind).inc(sum_)

    def refused(self, refusal: Refused) -> None:
        """Count a request of a known caller that was not admitted, unless the gateway answered it by itself."""
        if refusal.was_answered:
            return
        REFUSALS.labels(str(refusal.status)).inc()
        TENANT_REQUESTS.labels(self._label(refusal.tenant_id), "refused").inc()

    def _label(self, tenant_id: str) -> str:
        # Whoever comes first after a start: a series that begins late is one that nobody can draw.
        if tenant_id in self._tenants:
            return tenant_id
        if len(self._tenants) >= self._tenants_max:
            return OTHER_TENANTS
        self._tenants.add(tenant_id)
        for outcome in _OUTCOMES:
            TENANT_REQUESTS.labels(tenant_id, outcome)
        return tenant_id


def _observe(model: str, took: Timings) -> None:
    if took.added is not None:
        ADDED_SECONDS.observe(took.added)
    if took.first_token is None and took.between_tokens is None:
        return
    first, between, rate = _of_model(model)
    if took.first_token is not None:
        first.observe(took.first_token)
    if took.between_tokens is not None:
        between.observe(took.between_tokens)
    if took.tokens_per_second is not None:
        rate.observe(took.tokens_per_second)


# Finding a labelled child costs more than counting.
@lru_cache(maxsize=1024)
def _of_model(model: str) -> tuple[Histogram, Histogram, Histogram]:
    return FIRST_TOKEN_SECONDS.labels(model), BETWEEN_TOKENS_SECONDS.labels(model), TOKENS_PER_SECOND.labels(model)
