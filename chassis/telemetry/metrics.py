# SPDX-License-Identifier: Apache-2.0
"""
What the services count, each name once, with labels from closed lists only.

A label is never a tenant, a key, a path or anything else that a caller chooses.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

from prometheus_client import Counter, Gauge, Histogram, start_http_server

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
KEY_WRITES_LOST: Final = Counter(
    "peaje_extauth_key_uses_lost_total", "Uses of keys that were not written down: Postgres was away too long."
)

#: The descriptor is as the operators' files have it; with callers' values in it only where a file asks for
#: that, and then only the first of them (ratelimit/adapters/rule_metrics.py).
RULE_HITS: Final = Counter(
    "peaje_ratelimit_rule_hits_total", "Hits of generic rules; the stats are envoyproxy/ratelimit's.",
    ["domain", "descriptor", "stat"],
)  # fmt: skip
RULE_RELOADS: Final = Counter(
    "peaje_ratelimit_rule_reloads_total", "New generic rules, by whether they were taken.", ["outcome"]
)
MODELS_REFUSED: Final = Gauge("peaje_models_refused", "1 while the models document is faulty and the last good one is in force, else 0.")
RULES_CURRENT: Final = Gauge("peaje_ratelimit_rules_current", "1 if the generic rules in force are those of the files, else 0.")
RULE_DOMAIN_UNKNOWN: Final = Counter(
    "peaje_ratelimit_rule_domain_unknown_total", "Requests of a domain that no file has: all of them pass."
)
RULE_SHADOWED: Final = Counter(
    "peaje_ratelimit_rule_global_shadow_total", "Requests that passed because all rules are in shadow mode."
)
RULE_STORE_ERRORS: Final = Counter(
    "peaje_ratelimit_rule_store_errors_total", "Requests that were answered without the counter store.", ["answer"]
)

SIGHTINGS: Final = Counter("peaje_metering_sightings_total", "Exchanges that the second witness has told of.")
SIGHTINGS_DROPPED: Final = Counter(
    "peaje_metering_sightings_dropped_total", "Exchanges that could not be kept to be compared: Postgres is away too long."
)

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
    "peaje_conservation_drift_tokens", "Ledger less engine, in the newest interval that could be compared.", ["model", "kind"]
)


@lru_cache(maxsize=512)
def denial(code: str, phase: str, rule: str) -> tuple[Counter, Counter]:
    """The two counters of a denial; looked up once, because finding a labelled child costs more than counting."""
    return DECISIONS.labels(code), DENIALS.labels(phase, rule)


def cache_hit(*, known: bool) -> None:
    """Count a lookup that was answered from memory."""
    (_KNOWN if known else _UNKNOWN).inc()


def serve(port: int) -> None:
    """Show the metrics on loopback; Envoy's listener never leads there."""
    start_http_server(port, addr="127.0.0.1")
