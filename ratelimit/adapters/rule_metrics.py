# SPDX-License-Identifier: Apache-2.0
"""Count what generic rules do, under a bounded number of names whatever callers send."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from chassis.telemetry import metrics
from ratelimit.core.rls.rules import Match
from ratelimit.core.rls.verdict import Stat

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
            metrics.RULE_HITS.labels(OTHER if label == OTHER else domain, label, stat.value).inc(count)

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
