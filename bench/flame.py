# SPDX-License-Identifier: Apache-2.0
"""
`python -m bench.flame STACKS --below FRAME --title TEXT > flame.svg`: a flame graph small enough for a page.

STACKS is what `py-spy record --format raw` writes: frames by semicolons, and how often they were seen. Only what is *below*
a frame is drawn, and nothing thinner than `_SHARE_MIN`. Names of frames are the tooltips; there is no script in it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Final

_WIDTH, _ROW, _TITLE = 1000, 16, 24
#: Of the whole: thinner ones are neither seen nor read.
_SHARE_MIN: Final = 0.003
#: Pixels of a letter, as this size of a fixed font has them.
_LETTER: Final = 6.2
_COLOURS: Final = ("#e69f00", "#f0b840", "#d99020", "#eeaa33")


@dataclass(slots=True)
class Frame:
    """How often a function was seen where it was called from, and what it called."""

    count: int = 0
    calls: dict[str, Frame] = field(default_factory=dict)


def read(lines: Iterable[str], *, below: str) -> Frame:
    """
    Add up *lines*; those without a frame that begins with *below* are left out.

    >>> read(["main;step (a.py);parse 3", "main;step (a.py) 2", "main;idle 9"], below="step").count
    5
    """
    whole = Frame()
    for line in lines:
        stack, _, seen = line.rpartition(" ")
        frames = stack.split(";")
        first = next((number for number, name in enumerate(frames) if name.startswith(below)), None)
        if first is None:
            continue
        at, count = whole, int(seen)
        at.count += count
        for name in frames[first + 1 :]:
            at = at.calls.setdefault(name, Frame())
            at.count += count
    return whole


def draw(whole: Frame, *, title: str) -> str:
    """The graph as SVG, callers above what they call."""
    shapes: list[str] = []
    depth = _draw(whole, "all", shapes, left=0.0, level=0, of=max(whole.count, 1))
    height = _TITLE + (depth + 1) * _ROW
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" font-family="monospace" font-size="10">'
        f'<text x="4" y="15" font-size="13">{escape(title)}</text>{"".join(shapes)}</svg>\n'
    )


def _draw(frame: Frame, name: str, shapes: list[str], *, left: float, level: int, of: int) -> int:
    width, top = _WIDTH * frame.count / of, _TITLE + level * _ROW
    short = escape(name.split(" (", maxsplit=1)[0][: int(width / _LETTER)])
    shapes.append(
        f'<g><title>{escape(name)}: {frame.count / of:.1%}</title><rect x="{left:.1f}" y="{top}" width="{width:.1f}" height="{_ROW - 1}" '
        f'fill="{_COLOURS[level % len(_COLOURS)]}"/><text x="{left + 2:.1f}" y="{top + 11}">{short}</text></g>'
    )
    deepest = level
    for called, inner in sorted(frame.calls.items()):
        if inner.count / of >= _SHARE_MIN:
            deepest = max(deepest, _draw(inner, called, shapes, left=left, level=level + 1, of=of))
        left += _WIDTH * inner.count / of
    return deepest


def main() -> None:
    """Read, draw, print."""
    parser = argparse.ArgumentParser(prog="python -m bench.flame", description=__doc__)
    parser.add_argument("stacks", type=Path)
    parser.add_argument("--below", required=True)
    parser.add_argument("--title", required=True)
    asked = parser.parse_args()
    with asked.stacks.open() as lines:
        sys.stdout.write(draw(read(lines, below=asked.below), title=asked.title))


if __name__ == "__main__":
    main()
