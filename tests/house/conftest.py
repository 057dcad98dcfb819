# SPDX-License-Identifier: Apache-2.0
"""Source trees to try the rules on: this one, and small ones that break them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

Planter = Callable[[Mapping[str, str]], Path]


@pytest.fixture
def plant(tmp_path: Path) -> Planter:
    """Write a tree of files and return its root."""

    def write(files: Mapping[str, str]) -> Path:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return write


@pytest.fixture(scope="session")
def repository() -> Path:
    """The tree that these tests are part of."""
    return Path(__file__).resolve().parents[2]
