# SPDX-License-Identifier: Apache-2.0
"""The report on sizes: shown with `-s`, no gate; what it counts is tested."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.house import sizes
from tests.house.conftest import Planter


def test_sizes_are_reported(repository: Path) -> None:
    """`./peaje test tests/house -s` prints them."""
    text = sizes.report(repository)

    sys.stdout.write(f"\n{text}\n")
    assert " files, " in text
    assert " functions, " in text


def test_lines_are_counted_with_decorators_and_longest_first(plant: Planter) -> None:
    """Nested functions count for themselves too; tests and generated modules do not count."""
    tree = plant(
        {
            "a.py": "def short():\n    pass\n\n\n@decorated\nclass C:\n    @property\n    def long(self):\n        def inner():\n            pass\n        return inner\n",
            "b.lua": "local M = {}\nreturn M\n",
            "c_pb2.py": "x\n" * 1000,
            "tests/t.py": "x\n" * 1000,
        }
    )

    assert [("a.py", 11), ("b.lua", 2)] == [(size.where, size.lines) for size in sizes.file_sizes(tree)]
    assert [("a.py:8 long", 5), ("a.py:1 short", 2), ("a.py:9 inner", 2)] == [
        (size.where, size.lines) for size in sizes.function_sizes(tree)
    ]


def test_what_is_longer_than_the_style_asks_for_is_marked(plant: Planter) -> None:
    """At the bound it is not."""
    body = "    pass\n"
    tree = plant(
        {
            "a.py": "def at():\n" + body * (sizes.FUNCTION_LINES - 1),
            "b.py": "def above():\n" + body * sizes.FUNCTION_LINES,
        }
    )

    text = sizes.report(tree)

    assert f"{sizes.FUNCTION_LINES:6}  a.py:1 at" in text
    assert f"{sizes.FUNCTION_LINES + 1:6}! b.py:1 above" in text
    assert f"1 above {sizes.FUNCTION_LINES}" in text
