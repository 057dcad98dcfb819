# SPDX-License-Identifier: Apache-2.0
"""The table of bad inputs is whole: each row of bodies and usage fraud runs through Envoy, here or as a test of its own."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tests.hostile.rows import elsewhere, load

_TESTS = Path(__file__).parents[1]
#: Of bodies and usage fraud.
_NUMBERS = [f"B{number:02}" for number in range(1, 16)]


def test_each_row_of_bodies_and_fraud_runs_through_envoy() -> None:
    """As data, or as a test that is named beside it."""
    as_data = {re.match(r"[A-Z]\d+", row.id)[0] for row in load("envoy")}  # type: ignore[index]

    assert [] == [number for number in _NUMBERS if number not in as_data | elsewhere().keys()]


def test_the_tests_that_the_table_names_exist() -> None:
    """A test that is renamed takes its row along."""
    missing = []
    for name in (name for names in elsewhere().values() for name in names):
        path, _, function = name.partition("::")
        defined = {node.name for node in ast.parse((_TESTS / path).read_text()).body if isinstance(node, ast.FunctionDef)}
        missing += [name] if function not in defined else []

    assert [] == missing
