# SPDX-License-Identifier: Apache-2.0
"""What generic rules count, under a bounded number of names whatever callers send."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from prometheus_client import Counter, Gauge

from ratelimit.core.rls.rules import Match
from ratelimit.core.rls.verdict import Stat

#: The descriptor is as the operators' files have it; with callers' values in it only where a file asks for
#: that, and then only the first of them.
RULE_HITS: Final = Counter(
    "peaje_ratelimit_rule_hits_total", "Hits of generic rules; the stats are envoyproxy/ratelimit's.",
    ["domain", "descriptor", "stat"],
)  # fmt: skip
RULE_RELOADS: Final = Counter(
    "peaje_ratelimit_rule_reloads_total", "New generic rules, by whether they were taken.", ["outcome"]
)
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

#: Names with callers' values in them (detailed_metric, value_to_metric); later values count for their rule alone.
DETAILED_MAX: Final = 1_000
#: Rules that were ever counted, those of files that are gone too.
RULES_MAX: Final = 10_000
#: Characters; a longer value counts for its rule alone.
NAME_LENGTH_MAX: Final = 200
#: What counts when even the rules are too many.
OTHER: Final = "(other)"


class RuleMetrics:
    """The names that are in use; one per process."""

    def __init__(self) -> None:
        self._detailed: set[str] = set()
        self._rules: set[str] = set()

    def add(self, domain: str, match: Match, stats: Mapping[Stat, int]) -> None:
        """Count what one descriptor was."""
        label = self._label(match)
        for stat, count in stats.items():
            RULE_HITS.labels(OTHER if label == OTHER else domain, label, stat.value).inc(count)

    def _label(self, match: Match) -> str:
        path = match.rule.path
        if match.metric != path and len(match.metric) <= NAME_LENGTH_MAX and _has_room(self._detailed, match.metric, DETAILED_MAX):
            return match.metric
        return path if _has_room(self._rules, path, RULES_MAX) else OTHER


def _has_room(known: set[str], name: str, most: int) -> bool:
    if name in known:
        return True
    if len(known) >= most:
        return False
    known.add(name)
    return True
