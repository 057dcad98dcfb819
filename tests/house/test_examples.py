# SPDX-License-Identifier: Apache-2.0
"""Examples in docstrings are true."""

from __future__ import annotations

import doctest
from importlib import import_module
from pathlib import Path

import pytest

from tests.house.arrows import ALLOWED

_REPOSITORY = Path(__file__).resolve().parents[2]
_MODULES = sorted(
    ".".join(path.relative_to(_REPOSITORY).with_suffix("").parts)
    for package in ALLOWED
    for path in (_REPOSITORY / package).rglob("*.py")
    if ">>> " in path.read_text()
)


def test_there_are_examples() -> None:
    """A test over no module would hold for ever."""
    assert "chassis.errors" in _MODULES


@pytest.mark.parametrize("module", _MODULES)
def test_the_examples_of_a_module_are_true(module: str) -> None:
    """Run as they are written."""
    result = doctest.testmod(import_module(module))

    assert result.attempted > 0
    assert 0 == result.failed
