# SPDX-License-Identifier: Apache-2.0
"""Each panel of each dashboard asks for what exists."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from control.monitoring.catalogue import read_catalogue
from control.monitoring.dashboards import ALL, DIRECTORY, concrete, panels
from control.monitoring.rules import SLOS
from tests.promql import names

#: Model servers have their own names; these pages were recorded from them.
_ENGINES = ("dynamo", "vllm")


def read_series() -> set[str]:
    """Every series that a panel reads."""
    return {name for panel in panels() if not panel.is_sql for query, _ in panel.queries for name in names(concrete(query))}


def test_every_panel_reads_our_metrics_or_an_engines_or_envoys(repository: Path) -> None:
    """Ours by the catalogue, recorded ones by the rules, engines' by their recorded pages; Envoy's on the running road."""
    ours = {name for metric in read_catalogue() for name in metric.series}
    recorded = {slo.recorded("1h") for slo in SLOS}
    pages = "\n".join((repository / f"tests/fixtures/engine_metrics/{engine}.txt").read_text() for engine in _ENGINES)
    engines = set(re.findall(r"^([\w:]+)[ {]", pages, re.MULTILINE))

    assert set() == {name for name in read_series() - ours - recorded - engines if not name.startswith("envoy_")}


def test_labels_that_panels_group_by_exist() -> None:
    """A group by a label that no series has is one line where many were meant."""
    labels = {name: {*metric.labels, "le"} for metric in read_catalogue() for name in metric.series}
    grouped = re.compile(r"by \(([^)]*)\) \((?:rate\(|increase\(|abs\()?(peaje_\w+)")

    found = [(panel.title, name, group) for panel in panels() if not panel.is_sql for query, _ in panel.queries for group, name in grouped.findall(query)]
    assert len(found) > 20
    for title, name, group in found:
        assert {label.strip() for label in group.split(",")} <= labels[name], f"{title}: {name}"


@pytest.mark.parametrize("dashboard", ALL, ids=lambda dashboard: str(dashboard.uid))
def test_the_file_has_every_question_once_and_no_panel_lies_on_another(repository: Path, dashboard: object) -> None:
    """What Grafana reads is what the code says."""
    uid = dashboard.uid  # type: ignore[attr-defined]
    document = json.loads((repository / DIRECTORY / f"{uid}.json").read_text("utf-8"))
    asked = [target.get("expr") or target["rawSql"] for panel in document["panels"] for target in panel.get("targets", [])]
    squares = [
        (x, y)
        for panel in document["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]

    assert [query for _, row in dashboard.rows for panel in row for query, _ in panel.queries] == asked  # type: ignore[attr-defined]
    assert len(squares) == len(set(squares))
    assert max(x for x, _ in squares) < 24
    assert len({panel["id"] for panel in document["panels"]}) == len(document["panels"])
