# SPDX-License-Identifier: Apache-2.0
"""
All metrics of Peaje's own, read from the code that counts them.

Knows which process shows what. What Envoy, the stores and the model servers show is theirs to say.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any, Final

from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.utils import floatToGoString

from chassis import beacon
from chassis.telemetry import metrics as shared_metrics
from extauth.adapters import metrics as extauth_metrics
from metering.adapters import events_metrics, witness_metrics
from metering.adapters import metrics as collector_metrics
from ratelimit.adapters import metrics as ratelimit_metrics
from ratelimit.adapters import rule_metrics

#: Module that declares metrics → processes that show them.
MODULES: Final[Mapping[ModuleType, tuple[str, ...]]] = {
    shared_metrics: ("extauth", "ratelimit", "metering", "collector", "beacon", "events"),
    beacon: ("beacon",),
    extauth_metrics: ("extauth",),
    ratelimit_metrics: ("ratelimit",),
    rule_metrics: ("ratelimit",),
    collector_metrics: ("collector",),
    witness_metrics: ("metering",),
    events_metrics: ("events",),
}
_HEAD: Final = """\
# Metrics

<!-- Made by `python -m control.monitoring --write`; metrics.json beside it says the same to programs. -->

Each process shows its own on loopback, on the port that `PEAJE_<PROCESS>_METRICS_PORT` names
([operations](../operations.md#metrics)): a sum over processes is the installation's. A label is never something that
a caller chooses. A histogram has `_bucket`, `_sum` and `_count`.

| metric | type | labels | shown by | is |
|---|---|---|---|---|
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One metric, by the name that rules and panels write."""

    name: str
    kind: str
    labels: tuple[str, ...]
    shown_by: tuple[str, ...]
    help: str
    #: Upper bounds of a histogram, as `le` has them.
    buckets: tuple[str, ...] = ()

    @property
    def series(self) -> tuple[str, ...]:
        """Names of its samples."""
        if self.kind == "histogram":
            return tuple(f"{self.name}_{part}" for part in ("bucket", "sum", "count"))
        return (self.name,)


def read_catalogue() -> list[Metric]:
    """Every metric, by name."""
    found = [metric for module, processes in MODULES.items() for metric in _declared(module, processes)]
    return sorted(found, key=lambda metric: metric.name)


def as_markdown(metrics: list[Metric]) -> str:
    """The catalogue for people."""
    rows = (
        f"| `{metric.name}` | {metric.kind} | {', '.join(metric.labels)} | {', '.join(metric.shown_by)} | {metric.help} |\n"
        for metric in metrics
    )
    return _HEAD + "".join(rows)


def as_json(metrics: list[Metric]) -> str:
    """The catalogue for programs."""
    return json.dumps([asdict(metric) for metric in metrics], indent=1) + "\n"


def _declared(module: ModuleType, processes: tuple[str, ...]) -> Iterator[Metric]:
    seen: set[int] = set()
    for value in vars(module).values():
        if isinstance(value, MetricWrapperBase) and id(value) not in seen and not _is_child(value):
            seen.add(id(value))
            [described] = value.describe()
            yield Metric(
                # A counter is described without the suffix that its samples have.
                name=described.name + ("_total" if described.type == "counter" else ""),
                kind=described.type, labels=_label_names(value), shown_by=processes, help=described.documentation,
                buckets=tuple(map(floatToGoString, getattr(value, "_upper_bounds", ()))),
            )  # fmt: skip


def _is_child(metric: Any) -> bool:
    """Whether it is one labelled series of a metric, which the library tells by its values only."""
    return bool(metric._labelvalues)  # noqa: SLF001 - the library has no other word for it


def _label_names(metric: Any) -> tuple[str, ...]:
    return tuple(metric._labelnames)  # noqa: SLF001 - as above
