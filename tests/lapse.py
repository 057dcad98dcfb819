# SPDX-License-Identifier: Apache-2.0
"""
A running installation as Prometheus would have seen it, in time lapse: each scrape counts as half a minute.

Shares, gauges and growth are as they were; only rates a second are smaller, and no rule looks at one alone. Where
nothing more is to happen, time goes on with the last values (`quiet`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

import httpx
from prometheus_client.parser import text_string_to_metric_families

from control.monitoring.rules import Alert, inlined
from tests.dataplane.installation import Installation
from tests.promql import Samples, Vector, evaluate, names

#: Seconds between two scrapes, of the time that is told.
STEP: Final = 30.0
#: Rules are judged between scrapes, so that no sample lies on the edge of a window.
_BETWEEN: Final = STEP / 2
#: Of real time: a process that does not answer within it is silent.
_SCRAPE_SECONDS_MAX: Final = 2.0

#: A line's series; nothing for a comment.
_NAME: Final = re.compile(r"\w*")

Page = Mapping[tuple[str, frozenset[tuple[str, str]]], float]


@dataclass(slots=True)
class Lapse:
    """What was scraped so far."""

    road: Installation
    #: Only these series are kept: Envoy has thousands.
    wanted: frozenset[str]
    samples: Samples = field(default_factory=Samples)
    count: int = 0
    _last: dict[str, Page] = field(default_factory=dict)

    @property
    def now(self) -> float:
        """The moment at which rules are judged."""
        return (self.count - 1) * STEP + _BETWEEN

    def scrape(self) -> None:
        """Ask every process once, as Prometheus does; one that is silent ends its series."""
        for part in (*self.road.metrics_ports, "envoy"):
            try:
                page = _read(self.road.scrape(part, timeout=_SCRAPE_SECONDS_MAX), self.wanted)
            except httpx.HTTPError:
                page = None
            self._add(part, page)
        self.count += 1

    def quiet(self, minutes: float) -> None:
        """Let time pass in which nothing happens."""
        for _ in range(round(minutes * 60 / STEP)):
            for part, page in self._last.items():
                self._add(part, page)
            self.count += 1

    def fires(self, alert: Alert) -> Vector:
        """The series for which *alert* fires now: its expression has held for its minutes."""
        expr = inlined(alert.expr)
        found = evaluate(expr, self.samples, self.now)
        for number in range(1, round(alert.minutes * 60 / STEP) + 1):
            earlier = evaluate(expr, self.samples, self.now - number * STEP)
            found = {labels: value for labels, value in found.items() if labels in earlier}
        return found

    def _add(self, part: str, page: Page | None) -> None:
        at, job = self.count * STEP, {"job": f"peaje-{part}"}
        self.samples.add(at, "up", job, 0.0 if page is None else 1.0)
        new = {} if page is None else page
        for name, labels in self._last.get(part, {}).keys() - new.keys():
            self.samples.add(at, name, dict(labels) | job, None)
        for (name, labels), value in new.items():
            self.samples.add(at, name, dict(labels) | job, value)
        self._last[part] = new


def wanted_by(alerts: list[Alert]) -> frozenset[str]:
    """The series that *alerts* read."""
    return frozenset(name for alert in alerts for name in names(inlined(alert.expr)))


def until(lapse: Lapse, condition: Callable[[], object], *, scrapes: int = 120, between: Callable[[], object] = lambda: None) -> None:
    """Scrape, with *between* before each, until *condition* holds."""
    for _ in range(scrapes):
        between()
        lapse.scrape()
        if condition():
            return
    raise AssertionError("it does not come true")


def _read(text: str, wanted: frozenset[str]) -> Page:
    kept = "".join(line + "\n" for line in text.splitlines() if _NAME.match(line)[0] in wanted)  # type: ignore[index]
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(kept) for sample in family.samples
    }
