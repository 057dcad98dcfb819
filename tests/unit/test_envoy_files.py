# SPDX-License-Identifier: Apache-2.0
"""Edits of Envoy's files that it has not read."""

from __future__ import annotations

from pathlib import Path

import pytest

from control.laptop.envoy_files import edited, rendered, started
from control.laptop.places import Places


@pytest.fixture
def places(tmp_path: Path) -> Places:
    """An installation that was rendered from a directory beside it, and has started."""
    for directory in (tmp_path / "source", tmp_path / "home/envoy"):
        (directory / "lua").mkdir(parents=True)
        for name in ("envoy.yaml", "gate.lua", "lua/json.lua", "models.yaml"):
            (directory / name).write_text(name)
    (tmp_path / "home/run").mkdir()
    made = Places(tmp_path / "home")
    rendered(made, tmp_path / "source")
    started(made)
    return made


def test_nothing_was_edited(places: Places) -> None:
    """Nor is a document that is read while Envoy runs."""
    (places.envoy / "models.yaml").write_text("models: []")
    (places.envoy / "gate.lua").write_text("gate.lua")

    assert [] == edited(places)


def test_what_was_changed_added_or_removed_is_named(places: Places) -> None:
    """In the directory that `up` reads, and in the copy."""
    source = places.home.parent / "source"
    (source / "envoy.yaml").write_text("node: {}")
    (source / "new.lua").write_text("")
    (places.envoy / "lua/json.lua").unlink()

    assert [source / "envoy.yaml", source / "new.lua", places.envoy / "lua/json.lua"] == edited(places)


def test_an_installation_that_noted_nothing_has_no_edits(tmp_path: Path) -> None:
    """A pod, for one: its files change with it."""
    assert [] == edited(Places(tmp_path))
