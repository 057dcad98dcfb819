# SPDX-License-Identifier: Apache-2.0
"""
Remember which of Envoy's files it was started with, so that an edit it has not read can be told.

Two places are edited: the directory that `up` renders from, and the rendered copy, which a restarted Envoy reads.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Final

from chassis.secrets import write_private
from control.laptop.places import Places

#: What `up` rendered from, and what the running Envoy was started with.
RENDERED_FROM: Final = "envoy-rendered-from.json"
_STARTED_WITH: Final = "envoy-started-with.json"


def rendered(places: Places, source: Path) -> None:
    """Note that the installation's files were made of *source*."""
    _note(places.run / RENDERED_FROM, source)


def started(places: Places) -> None:
    """Note that Envoy starts with the files as they are."""
    _note(places.run / _STARTED_WITH, places.envoy)


def edited(places: Places) -> list[Path]:
    """Files that were changed, added or removed since then; nothing where nothing was noted."""
    found: list[Path] = []
    for name in (RENDERED_FROM, _STARTED_WITH):
        note = places.run / name
        if not note.exists():
            continue
        noted = json.loads(note.read_text())
        directory, then = Path(noted["directory"]), noted["files"]
        now = _fingerprints(directory)
        found += [directory / file for file in sorted(now.keys() | then.keys()) if now.get(file) != then.get(file)]
    return found


def _note(path: Path, directory: Path) -> None:
    write_private(path, json.dumps({"directory": str(directory.absolute()), "files": _fingerprints(directory)}))


def _fingerprints(directory: Path) -> dict[str, str]:
    """What is in each file that only a start reads: the bootstrap and the scripts."""
    files = [directory / "envoy.yaml", *directory.rglob("*.lua")]
    return {
        str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()
    }
