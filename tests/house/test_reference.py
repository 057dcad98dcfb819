# SPDX-License-Identifier: Apache-2.0
"""docs/reference/ is what the code says, and leaves nothing out."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from control import reference

_SHIPPED = ("chassis", "extauth", "ratelimit", "metering", "control")
#: Reads control's own settings, under their names, to find it.
_ANOTHERS = {"extauth.server.ControlSettings"}


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    """As the command writes them."""
    return reference.documents()


def test_the_reference_is_current(pages: dict[str, str]) -> None:
    """`python -m control.reference` makes it so."""
    assert [] == reference.stale(pages, reference.DIRECTORY)


def test_a_page_that_is_not_current_is_found(tmp_path: Path) -> None:
    """Missing or different."""
    (tmp_path / "api.md").write_text("old\n")
    (tmp_path / "cli.md").write_text("same\n")

    assert ["api.md", "settings.md"] == reference.stale({"api.md": "new\n", "cli.md": "same\n", "settings.md": "x\n"}, tmp_path)


def test_every_class_of_settings_is_in_it(repository: Path) -> None:
    """By its bases: one that is added is found."""
    found = {
        f"{'.'.join(path.relative_to(repository).with_suffix('').parts)}.{node.name}"
        for package in _SHIPPED for path in (repository / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base) in ("BaseSettings", "StoreSettings") for base in node.bases)
    }  # fmt: skip

    assert found - _ANOTHERS == {f"{kind.__module__}.{kind.__name__}" for _, kind in reference.SETTINGS}


def test_every_setting_says_what_it_is(pages: dict[str, str]) -> None:
    """A name and a default alone help nobody."""
    rows = re.findall(r"^\| `(PEAJE_\w+)` \|[^|]*\|(.*)\|$", pages["settings.md"], re.MULTILINE)

    assert len(rows) > 40
    assert [] == [name for name, said in rows if not said.strip()]


def test_commands_routes_and_names_are_in_it(pages: dict[str, str]) -> None:
    """One of each kind: a page over nothing would be current for ever."""
    assert "## peaje keys create" in pages["cli.md"]
    assert "`POST /v1/tenants` | `tenants:write`" in pages["api.md"]
    assert "`NS_USAGE` | `peaje.usage`" in pages["contract.md"]
    assert "`PEAJE_COLLECTOR_ROTATE_BYTES` | `268435456`" in pages["settings.md"]
