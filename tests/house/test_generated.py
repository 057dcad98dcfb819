# SPDX-License-Identifier: Apache-2.0
"""Files that are made of the code are as the code is, and leave nothing out."""

from __future__ import annotations

import ast
from pathlib import Path

from control.monitoring.__main__ import stale
from control.monitoring.catalogue import MODULES, read_catalogue

#: The packages that processes are made of.
_SHIPPED = ("chassis", "extauth", "ratelimit", "metering", "control")


def declares_metrics(path: Path) -> bool:
    """Whether a module makes metrics, whatever it calls the library's classes."""
    return any(
        isinstance(node, ast.ImportFrom) and node.module == "prometheus_client" and {"Counter", "Gauge", "Histogram"} & {name.name for name in node.names}
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
    )


def test_the_made_files_are_current(repository: Path) -> None:
    """`python -m control.monitoring --write` makes them."""
    assert [] == stale(repository)


def test_no_module_with_metrics_is_missing_in_the_catalogue(repository: Path) -> None:
    """By their imports: one that is added is found."""
    declaring = {
        ".".join(path.relative_to(repository).with_suffix("").parts)
        for package in _SHIPPED for path in (repository / package).rglob("*.py") if declares_metrics(path)
    }

    assert declaring == {module.__name__ for module in MODULES}


def test_every_metric_has_its_own_name_and_says_what_it_is() -> None:
    """As Prometheus' conventions have it: the unit or `total` last, one prefix, a sentence."""
    metrics = read_catalogue()

    assert len(metrics) == len({metric.name for metric in metrics})
    assert [] == [metric.name for metric in metrics if not metric.name.startswith("peaje_") or not metric.help.endswith(".")]
    assert [] == [metric.name for metric in metrics if (metric.kind == "counter") != metric.name.endswith("_total")]
