# SPDX-License-Identifier: Apache-2.0
"""
How long files and functions are. A report, not a gate: `python -m tests.house.sizes`.

A number that grows is a question to ask in review, never a reason to split what belongs together.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.house.files import walk

#: What the style asks for; longer ones are marked.
FUNCTION_LINES: Final = 70
FILE_LINES: Final = 400
_SHOWN: Final = 10
_TESTS: Final = "tests"


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Something and how many lines it has."""

    where: str
    lines: int


def file_sizes(root: Path) -> list[Size]:
    """All Python and Lua files, longest first; generated ones and tests aside."""
    return _longest_first(
        Size(where=path.relative_to(root).as_posix(), lines=len(path.read_text().splitlines())) for path in _sources(root)
    )


def function_sizes(root: Path) -> list[Size]:
    """All Python functions and methods, longest first; decorators and docstring count."""
    return _longest_first(
        Size(where=f"{path.relative_to(root)}:{node.lineno} {node.name}", lines=(node.end_lineno or 0) - _first_line(node) + 1)
        for path in _sources(root)
        if path.suffix == ".py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )


def report(root: Path) -> str:
    """The longest files and functions, and how many are longer than the style asks for."""
    lines = []
    for what, sizes, bound in (
        ("files", file_sizes(root), FILE_LINES),
        ("functions", function_sizes(root), FUNCTION_LINES),
    ):
        longer = sum(size.lines > bound for size in sizes)
        middle = sizes[len(sizes) // 2].lines if sizes else 0
        lines.append(f"{len(sizes)} {what}, {sum(s.lines for s in sizes)} lines, half below {middle}; {longer} above {bound}")
        lines += [f"{size.lines:6}{'!' if size.lines > bound else ' '} {size.where}" for size in sizes[:_SHOWN]]
    return "\n".join(lines)


def _sources(root: Path) -> Iterator[Path]:
    for path in walk(root):
        if path.suffix in (".py", ".lua") and "_pb2" not in path.name and path.relative_to(root).parts[0] != _TESTS:
            yield path


def _first_line(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])


def _longest_first(sizes: Iterator[Size]) -> list[Size]:
    return sorted(sizes, key=lambda size: (-size.lines, size.where))


if __name__ == "__main__":
    sys.stdout.write(report(Path(__file__).resolve().parents[2]) + "\n")
