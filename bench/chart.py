# SPDX-License-Identifier: Apache-2.0
"""A chart of stacked bars as SVG, by hand: what a page shows without a script or a font of its own. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

_WIDTH, _LEFT, _RIGHT = 900, 250, 130
_BAR, _GAP, _TITLE, _LEGEND = 16, 6, 30, 34
#: Told apart also by who cannot tell red from green (Okabe and Ito).
COLOURS: Final = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One line: its parts by name, and what is written behind it."""

    name: str
    parts: Mapping[str, float]
    said: str


def draw(groups: Mapping[str, Sequence[Bar]], parts: Sequence[str], *, title: str) -> str:
    """
    Draw a group of bars each, all groups to their own scale.

    >>> draw({"g": [Bar(name="a<b", parts={"x": 1.0}, said="1")]}, ["x"], title="t").count("<rect")
    3
    """
    height = _LEGEND + sum(_TITLE + len(bars) * (_BAR + _GAP) for bars in groups.values()) + 10
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" font-family="sans-serif" font-size="12" role="img">',
        "<!-- SPDX-License-Identifier: Apache-2.0 -->",
        f"<title>{escape(title)}</title>",
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
    ]
    x = 10.0
    for name, colour in zip(parts, COLOURS, strict=False):
        out.append(f'<rect x="{x:.0f}" y="10" width="12" height="12" fill="{colour}"/>')
        out.append(f'<text x="{x + 17:.0f}" y="20" fill="#222222">{escape(name)}</text>')
        x += 40 + 7 * len(name)
    y = float(_LEGEND)
    for group, bars in groups.items():
        out.append(f'<text x="10" y="{y + 20:.0f}" font-weight="bold" fill="#222222">{escape(group)}</text>')
        y += _TITLE
        most = max((sum(bar.parts.values()) for bar in bars), default=0.0) or 1.0
        for bar in bars:
            out += _bar(bar, parts, y, (_WIDTH - _LEFT - _RIGHT) / most)
            y += _BAR + _GAP
    return "\n".join([*out, "</svg>", ""])


def _bar(bar: Bar, parts: Sequence[str], y: float, scale: float) -> list[str]:
    middle = y + _BAR - 4
    out = [f'<text x="{_LEFT - 8}" y="{middle:.0f}" text-anchor="end" fill="#222222">{escape(bar.name)}</text>']
    x = float(_LEFT)
    for name, colour in zip(parts, COLOURS, strict=False):
        width = bar.parts.get(name, 0.0) * scale
        if width > 0:
            out.append(f'<rect x="{x:.1f}" y="{y:.0f}" width="{width:.1f}" height="{_BAR}" fill="{colour}"/>')
        x += width
    out.append(f'<text x="{x + 6:.0f}" y="{middle:.0f}" fill="#222222">{escape(bar.said)}</text>')
    return out
