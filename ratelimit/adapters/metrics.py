# SPDX-License-Identifier: Apache-2.0
"""
What ratelimit counts, each name once, with labels from closed lists only.

A label is never a tenant, a key, a model or anything else that a caller chooses. Each process counts for
itself: a sum over all of them is the installation's.
"""

from __future__ import annotations

from typing import Final

from prometheus_client import Counter, Gauge, Histogram

from ratelimit.core.decide import Outcome, Verdict
from ratelimit.core.demand import Counter as Limit
from ratelimit.core.demand import Demand, Kind
from ratelimit.core.doubt import Judgement
from ratelimit.core.limits import OnStoreError, Unit
from ratelimit.core.reading import Reading

#: Seconds. From an answer out of memory to the timeout that Envoy has for one.
_BUCKETS: Final = (0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5)

_DECISIONS: Final = Counter(
    "peaje_ratelimit_decisions_total",
    "Admissions asked for, by what was answered: full, lean (the usual answer fits, the longest does not), unlimited "
    "(no limit applies), refused, unavailable (a limit says to deny while it cannot be counted).",
    ["outcome"],
)
_REFUSALS: Final = Counter(
    "peaje_ratelimit_refusals_total", "Refusals by the limit that has the longest wait.", ["kind", "unit"]
)
_JUDGED: Final = Counter(
    "peaje_ratelimit_refusals_judged_total",
    "Refusals by what the reservations in their way came to: false (what those did not use would have left room), just, unknown "
    "(too many at once, or under way for longer than a quarter of an hour).",
    ["judgement"],
)
_OVER: Final = Counter(
    "peaje_ratelimit_over_total", "Requests that passed a limit that only counts or is in shadow mode.", ["effect", "unit"]
)
DECISION_SECONDS: Final = Histogram(
    "peaje_ratelimit_decision_seconds", "From a request's arrival in ratelimit to its answer.", buckets=_BUCKETS
)
STORE_SECONDS: Final = Histogram(
    "peaje_ratelimit_store_seconds", "One call of the counter store, also one that failed.", ["call"], buckets=_BUCKETS
)
_STORE_FAILURES: Final = Counter(
    "peaje_ratelimit_store_failures_total",
    "Calls that failed: away (everybody's trouble, counts for the breaker) or refused (one damaged counter).",
    ["reason"],
)
STORE_AWAY: Final = Gauge("peaje_ratelimit_store_away", "1 while the breaker is open: the store is left alone.")
_WITHOUT_STORE: Final = Counter(
    "peaje_ratelimit_without_store_total", "Limits that were applied without the store, by their written mode.", ["mode"]
)
_RESERVED: Final = Counter("peaje_ratelimit_reservations_total", "Reservations made: they hold until they are settled.")
_SETTLED: Final = Counter(
    "peaje_ratelimit_settled_total", "Reservations settled, by who said what was used.", ["by"]
)
SETTLED_BY_ENVOY: Final = _SETTLED.labels("envoy")
SETTLED_BY_LEDGER: Final = _SETTLED.labels("ledger")
SETTLES_LOST: Final = Counter(
    "peaje_ratelimit_settles_lost_total", "Settles that the store did not take; the ledger settles them later."
)
HELD_LONG: Final = Gauge(
    "peaje_ratelimit_reservations_held_long", "Reservations older than thirty seconds at the last sweep: streams, or lost settles."
)
_EXCESS: Final = Counter(
    "peaje_ratelimit_excess_tokens_total", "Tokens used beyond what was held for them: a debt that delays the next."
)
_RETURNED: Final = Counter("peaje_ratelimit_returned_tokens_total", "Tokens held and not used.")

# Looked up once, because finding a labelled child costs more than counting; and so that each is shown from the start.
_BY_VERDICT: Final = {verdict: _DECISIONS.labels(verdict.name.lower()) for verdict in Verdict}
UNLIMITED: Final = _DECISIONS.labels("unlimited")
UNAVAILABLE: Final = _DECISIONS.labels("unavailable")
_BY_LIMIT: Final = {(kind, unit): _REFUSALS.labels(kind.value, unit.value) for kind in Kind for unit in Unit}
_BY_JUDGEMENT: Final = {judgement: _JUDGED.labels(judgement.value) for judgement in Judgement}
_BY_MODE: Final = {mode: _WITHOUT_STORE.labels(mode.value) for mode in OnStoreError}
STORE_TAKE: Final = STORE_SECONDS.labels("take")
STORE_SETTLE: Final = STORE_SECONDS.labels("settle")
STORE_FAILED: Final = _STORE_FAILURES.labels("away")
STORE_REFUSED: Final = _STORE_FAILURES.labels("refused")


def decided(demand: Demand, outcome: Outcome) -> None:
    """Count a decision, what it reserved, and limits that it passed without room."""
    _BY_VERDICT[outcome.verdict].inc()
    if outcome.admitted and demand.settles:
        _RESERVED.inc()
    if outcome.over:
        for counter in demand.counters:
            if counter.name in outcome.over:
                _OVER.labels(counter.effect.value, counter.unit.value).inc()


def refused(worst: Reading) -> None:
    """Count a refusal by the limit that the caller is told of."""
    _BY_LIMIT[worst.counter.kind, worst.counter.unit].inc()


def judged(judgement: Judgement) -> None:
    """Count what is known of a refusal in the end."""
    _BY_JUDGEMENT[judgement].inc()


def without_store(counters: tuple[Limit, ...]) -> None:
    """Count the mode of each limit that a decision without the store has met."""
    for counter in counters:
        _BY_MODE[counter.on_store_error].inc()


def settled(excess_tokens: int) -> None:
    """Count a settle from Envoy; less than 0 is what was held and not used."""
    SETTLED_BY_ENVOY.inc()
    (_EXCESS if excess_tokens > 0 else _RETURNED).inc(abs(excess_tokens))
