# SPDX-License-Identifier: Apache-2.0
"""
Draw a dashboard of what its own questions answer, as SVG: where no Grafana is, and for the docs.

Only draws. Who asks gives each panel its lines (by legend, of moments and values) or its rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final
from xml.sax.saxutils import escape

from control.monitoring.dashboards import Dashboard, Panel

#: Pixels. Three panels of lines stand side by side, two of rows, as Grafana is told too.
_WIDTH, _GAP = 1440, 12
_PANEL_HEIGHT, _STAT_HEIGHT, _HEADING_HEIGHT = 216, 96, 34
_TITLE, _LEGEND_LINE = 26, 15
_LEFT = 58
_LEGENDS_MAX, _ROWS_MAX, _COLUMNS_MAX = 6, 8, 7
_FONT_WIDTH: Final = 6.1
_COLOURS: Final = ("#1f6fb4", "#d9730d", "#2f9e44", "#c92a2a", "#7048e8", "#0c8599", "#a61e4d", "#5c940d", "#495057", "#e67700")

Line = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a panel's questions answered."""

    #: By legend; of a number the last value counts.
    lines: Mapping[str, Line]
    #: Of SQL: names of columns, then rows.
    rows: Sequence[Sequence[str]] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Box:
    x: float
    y: float
    width: float
    height: float


def draw(dashboard: Dashboard, answers: Mapping[str, Answer], *, start: float, end: float, about: str) -> str:
    """The picture of *dashboard* from *start* to *end* (seconds since 1970); *answers* are by the panels' titles."""
    parts: list[str] = []
    y = 44.0
    for heading, panels in dashboard.rows:
        parts.append(_text(_GAP, y + 22, heading, size=15, weight=600))
        y += _HEADING_HEIGHT
        for row in _lines_of(panels):
            height = _STAT_HEIGHT if all(panel.is_stat for panel in row) else _PANEL_HEIGHT
            width = (_WIDTH - _GAP * (len(row) + 1)) / len(row) if len(row) > 3 or row[0].is_sql else (_WIDTH - _GAP * 4) / 3
            for place, panel in enumerate(row):
                box = _Box(x=_GAP + place * (width + _GAP), y=y, width=width, height=height)
                parts += _panel(box, panel, answers[panel.title], start=start, end=end)
            y += height + _GAP
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {y:.0f}" font-family="DejaVu Sans, sans-serif" '
        f'font-size="11" role="img" aria-label="{escape(dashboard.title)}">'
    )
    back = f'<rect width="{_WIDTH}" height="{y:.0f}" fill="#f4f5f7"/>'
    return "\n".join([head, back, _text(_GAP, 28, dashboard.title, size=18, weight=600), _text(_WIDTH - _GAP, 28, about, anchor="end"), *parts, "</svg>", ""])


def shown(value: float, unit: str) -> str:
    """
    A value as people read it.

    >>> [shown(0.0042, "s"), shown(0.25, "percentunit"), shown(1_234_567, "short"), shown(0.04, "reqps"), shown(61.8, "percent")]
    ['4.2 ms', '25 %', '1.23 M', '0.04/s', '61.8 %']
    """
    if math.isnan(value):
        return "-"
    match unit:
        case "s":
            for factor, name in ((1, "s"), (1e3, "ms"), (1e6, "µs")):
                if abs(value) * factor >= 1 or name == "µs":
                    return f"{_short(value * factor)} {name}" if value else "0 s"
        case "percentunit":
            return f"{_short(value * 100)} %"
        case "percent":
            return f"{_short(value)} %"
        case "reqps":
            return f"{_short(value)}/s"
    for factor, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= factor:
            return f"{_short(value / factor)}{name}"
    return _short(value)


def _short(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _lines_of(panels: Sequence[Panel]) -> Iterator[list[Panel]]:
    """Panels side by side: numbers with numbers, tables by two, else three."""
    line: list[Panel] = []
    for panel in panels:
        room = 6 if panel.is_stat else 2 if panel.is_sql else 3
        if line and (len(line) >= room or (line[0].is_stat, line[0].is_sql) != (panel.is_stat, panel.is_sql)):
            yield line
            line = []
        line.append(panel)
    if line:
        yield line


def _panel(box: _Box, panel: Panel, answer: Answer, *, start: float, end: float) -> Iterator[str]:
    yield f'<rect x="{box.x:.1f}" y="{box.y:.1f}" width="{box.width:.1f}" height="{box.height:.1f}" rx="3" fill="#fff" stroke="#d5d8dd"/>'
    yield _text(box.x + 10, box.y + 18, _cut(panel.title, box.width - 20, 12), size=12, weight=600)
    if panel.is_sql:
        yield from _table(box, answer.rows)
    elif not any(answer.lines.values()):
        yield _text(box.x + box.width / 2, box.y + box.height / 2 + 10, "no data", anchor="middle", colour="#868e96")
    elif panel.is_stat:
        yield from _numbers(box, panel, answer.lines)
    else:
        yield from _chart(box, panel, {legend: line for legend, line in answer.lines.items() if line}, start=start, end=end)


def _numbers(box: _Box, panel: Panel, lines: Mapping[str, Line]) -> Iterator[str]:
    step = (box.width - 20) / len(lines)
    for place, (legend, line) in enumerate(lines.items()):
        middle = box.x + 10 + step * (place + 0.5)
        yield _text(middle, box.y + 58, shown(line[-1][1], panel.unit), size=24, weight=600, anchor="middle", colour="#1f6fb4")
        yield _text(middle, box.y + 78, _cut(legend, step, 11), anchor="middle", colour="#868e96")


def _chart(box: _Box, panel: Panel, lines: Mapping[str, Line], *, start: float, end: float) -> Iterator[str]:
    values = [value for line in lines.values() for _, value in line if not math.isnan(value)] or [0.0]
    low, high, step = _scale(min(0.0, *values), max(values))
    legends = math.ceil(min(len(lines), _LEGENDS_MAX) / 2)
    plot = _Box(
        x=box.x + _LEFT, y=box.y + _TITLE + 4, width=box.width - _LEFT - 14,
        height=box.height - _TITLE - 26 - legends * _LEGEND_LINE,
    )  # fmt: skip

    def down(value: float) -> float:
        return plot.y + plot.height * (1 - (value - low) / (high - low))

    for number in range(round((high - low) / step) + 1):
        value = low + number * step
        yield f'<path d="M{plot.x:.1f} {down(value):.1f}h{plot.width:.1f}" stroke="#e9ecef"/>'
        yield _text(plot.x - 6, down(value) + 4, shown(value, panel.unit), anchor="end", colour="#868e96")
    for share in (0.0, 0.5, 1.0):
        at = datetime.fromtimestamp(start + (end - start) * share, UTC)
        anchor = {0.0: "start", 0.5: "middle", 1.0: "end"}[share]
        yield _text(plot.x + plot.width * share, plot.y + plot.height + 15, f"{at:%H:%M:%S}", anchor=anchor, colour="#868e96")
    for place, (legend, line) in enumerate(lines.items()):
        colour = _COLOURS[place % len(_COLOURS)]
        for run in _runs(line):
            points = " ".join(f"{plot.x + plot.width * (at - start) / (end - start):.1f},{down(value):.1f}" for at, value in run)
            yield f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.6" stroke-linejoin="round"/>'
        if place < _LEGENDS_MAX:
            x = plot.x - _LEFT + 12 + (place % 2) * (box.width - 20) / 2
            y = plot.y + plot.height + 30 + (place // 2) * _LEGEND_LINE
            more = f" and {len(lines) - _LEGENDS_MAX} more" if place == _LEGENDS_MAX - 1 and len(lines) > _LEGENDS_MAX else ""
            yield f'<rect x="{x:.1f}" y="{y - 5:.1f}" width="12" height="3" fill="{colour}"/>'
            yield _text(x + 17, y, _cut(legend + more, box.width / 2 - 40, 11), colour="#495057")


def _runs(line: Line) -> Iterator[Line]:
    """Pieces without a gap: what is no number is not drawn."""
    run: list[tuple[float, float]] = []
    for at, value in line:
        if math.isnan(value):
            if run:
                yield run
            run = []
        else:
            run.append((at, value))
    if run:
        # One moment alone would have no length.
        yield run if len(run) > 1 else [run[0], (run[0][0] + 1, run[0][1])]


def _scale(low: float, high: float) -> tuple[float, float, float]:
    """Round bounds and the step between marks."""
    if high <= low:
        high = low + 1
    raw = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw)
    return math.floor(low / step) * step, math.ceil(high / step) * step, step


def _table(box: _Box, rows: Sequence[Sequence[str]]) -> Iterator[str]:
    if len(rows) < 2:
        yield _text(box.x + box.width / 2, box.y + box.height / 2 + 10, "no rows", anchor="middle", colour="#868e96")
        return
    step = (box.width - 20) / min(len(rows[0]), _COLUMNS_MAX)
    for number, row in enumerate(rows[: _ROWS_MAX + 1]):
        y = box.y + 44 + number * 19
        for place, cell in enumerate(row[:_COLUMNS_MAX]):
            weight, colour = (600, "#495057") if number == 0 else (400, "#212529")
            yield _text(box.x + 10 + place * step, y, _cut(cell, step - 8, 11), weight=weight, colour=colour)
    more = len(rows) - 1 - _ROWS_MAX
    if more > 0:
        yield _text(box.x + box.width - 10, box.y + 18, f"and {more} more", anchor="end", colour="#868e96")


def _text(x: float, y: float, text: str, *, size: int = 11, weight: int = 400, anchor: str = "start", colour: str = "#212529") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" fill="{colour}">{escape(text)}</text>'


def _cut(text: str, width: float, size: int) -> str:
    """As much of *text* as fits."""
    most = max(4, int(width / (_FONT_WIDTH * size / 11)))
    return text if len(text) <= most else text[: most - 1] + "…"
