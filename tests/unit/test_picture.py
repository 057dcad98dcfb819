# SPDX-License-Identifier: Apache-2.0
"""Dashboards as pictures: every panel is there, whatever its questions answer."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET

import pytest

from control.monitoring.dashboards import ALL, Dashboard, Panel
from control.monitoring.picture import Answer, draw, shown

NOON = 1_794_916_800.0
LINE = [(NOON + number, float(number)) for number in range(60)]


def texts(svg: str) -> list[str]:
    """What is written in a picture, which must be XML."""
    return [found.text or "" for found in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]  # noqa: S314 - drawn by ourselves


def drawn(panel: Panel, answer: Answer) -> str:
    """A picture of one panel."""
    dashboard = Dashboard(uid="d", title="D", rows=(("Row", (panel,)),))
    return draw(dashboard, {panel.title: answer}, start=NOON, end=NOON + 60, about="a minute")


@pytest.mark.parametrize("dashboard", ALL, ids=lambda dashboard: str(dashboard.uid))
@pytest.mark.parametrize("answer", [Answer(lines={"a": LINE}, rows=[["x"], ["1"]]), Answer(lines={})], ids=["something", "nothing"])
def test_every_panel_of_every_dashboard_is_drawn(dashboard: Dashboard, answer: Answer) -> None:
    """Also where nothing happened."""
    panels = [panel for _, row in dashboard.rows for panel in row]

    said = texts(draw(dashboard, {panel.title: answer for panel in panels}, start=NOON, end=NOON + 60, about="a minute"))

    for panel in panels:
        assert any(panel.title.startswith(text.rstrip("…")) and text for text in said), panel.title


def test_no_panel_lies_on_another() -> None:
    """Of the largest."""
    dashboard = max(ALL, key=lambda one: sum(len(row) for _, row in one.rows))
    answers = {panel.title: Answer(lines={}) for _, row in dashboard.rows for panel in row}
    root = ET.fromstring(draw(dashboard, answers, start=NOON, end=NOON + 60, about=""))  # noqa: S314 - as above

    boxes = [
        tuple(float(box.attrib[name]) for name in ("x", "y", "width", "height"))
        for box in root.iter("{http://www.w3.org/2000/svg}rect") if box.attrib.get("stroke")
    ]
    assert len(answers) == len(boxes)
    for number, (x, y, width, height) in enumerate(boxes):
        for a, b, c, d in boxes[number + 1 :]:
            assert x + width <= a or a + c <= x or y + height <= b or b + d <= y


def test_what_is_no_number_is_a_gap() -> None:
    """Two pieces of a line, none through the gap."""
    line = [(at, math.nan if 20 <= value < 30 else value) for at, value in LINE]

    assert 2 == drawn(Panel(title="T", unit="s", queries=()), Answer(lines={"a": line})).count("<polyline")
    assert "nan" not in drawn(Panel(title="T", unit="s", queries=()), Answer(lines={"a": [(NOON, math.nan)]}))


def test_a_number_is_the_last_one_and_a_legend_is_text() -> None:
    """Whatever a label says."""
    said = texts(drawn(Panel(title="<T>", unit="percentunit", queries=(), is_stat=True), Answer(lines={"<b>&": [(NOON, 0.1), (NOON, 0.25)]})))

    assert {"<T>", "25 %", "<b>&"} <= set(said)


def test_more_rows_than_there_is_room_for_are_counted() -> None:
    """Eight are shown."""
    said = texts(drawn(Panel(title="T", unit="short", queries=(), is_sql=True), Answer(lines={}, rows=[["n"], *([str(n)] for n in range(11))])))

    assert "7" in said
    assert "8" not in said
    assert "and 3 more" in said


@pytest.mark.parametrize(
    ("value", "unit", "expected"),
    [(0.0, "s", "0 s"), (2.5, "s", "2.5 s"), (0.00002, "s", "20 µs"), (1500.0, "reqps", "1500/s"), (999.0, "short", "999"), (math.nan, "s", "-")],
)
def test_values_read_well(value: float, unit: str, expected: str) -> None:
    """In the unit that fits."""
    assert expected == shown(value, unit)
