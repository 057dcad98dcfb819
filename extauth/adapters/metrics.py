# SPDX-License-Identifier: Apache-2.0
"""
What extauth counts, each name once, with labels from closed lists only.

A label is never a tenant, a key, a path or anything else that a caller chooses.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

from prometheus_client import Counter, Gauge, Histogram

#: Seconds. From an answer out of memory to the timeout that Envoy has for one.
_DECISION_BUCKETS: Final = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.1, 0.5)

DECISIONS: Final = Counter(
    "peaje_extauth_decisions_total", "Decisions by the code that the caller reads; allowed is `ok`.", ["code"]
)
DENIALS: Final = Counter(
    "peaje_extauth_denials_total", "Denials by the phase and the rule that said no.", ["phase", "rule"]
)
DECISION_SECONDS: Final = Histogram(
    "peaje_extauth_decision_seconds", "From a request's arrival in extauth to its answer.", buckets=_DECISION_BUCKETS
)
_CACHE: Final = Counter("peaje_extauth_directory_lookups_total", "Lookups by where the answer came from.", ["source"])
CACHE_MISS: Final = _CACHE.labels("postgres")
CACHE_GRACE: Final = _CACHE.labels("grace")
_KNOWN: Final = _CACHE.labels("known")
_UNKNOWN: Final = _CACHE.labels("unknown")

IDENTITY_RELOADS: Final = Counter(
    "peaje_extauth_identity_reloads_total", "New identity documents, by whether they were taken.", ["outcome"]
)
#: Labelled by the operator's own issuer names, of which a document has a bounded number.
JWKS_AGE_SECONDS: Final = Gauge("peaje_extauth_jwks_age_seconds", "Age of an issuer's key set.", ["issuer"])
JWKS_FETCHES: Final = Counter("peaje_extauth_jwks_fetches_total", "Fetches of key sets.", ["issuer", "outcome"])
# A counter that appears with its first count has never grown, as Prometheus sees it; alerts look at these.
DECISIONS.labels("service_unavailable")
for _outcome in ("taken", "refused"):
    IDENTITY_RELOADS.labels(_outcome)
KEY_WRITES_LOST: Final = Counter(
    "peaje_extauth_key_uses_lost_total", "Uses of keys that were not written down: Postgres was away too long."
)


@lru_cache(maxsize=512)
def denial(code: str, phase: str, rule: str) -> tuple[Counter, Counter]:
    """The two counters of a denial; looked up once, because finding a labelled child costs more than counting."""
    return DECISIONS.labels(code), DENIALS.labels(phase, rule)


def cache_hit(*, known: bool) -> None:
    """Count a lookup that was answered from memory."""
    (_KNOWN if known else _UNKNOWN).inc()
