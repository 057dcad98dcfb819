# SPDX-License-Identifier: Apache-2.0
"""
`python -m control.monitoring`: whether the files that are made of the code are as the code is; `--write` makes them.

For who changes Peaje, from the repository; a running installation needs none of it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from control.monitoring.catalogue import as_json, as_markdown, read_catalogue
from control.monitoring.dashboards import ALL, DIRECTORY
from control.monitoring.grafana import as_grafana
from control.monitoring.rules import RULES_PATH, as_rules

REPOSITORY: Final = Path(__file__).resolve().parents[2]


def made_files() -> Mapping[str, str]:
    """Each file's text, by its path in the repository."""
    metrics = read_catalogue()
    return {
        "docs/reference/metrics.md": as_markdown(metrics),
        "docs/reference/metrics.json": as_json(metrics),
        RULES_PATH: as_rules(),
        **{f"{DIRECTORY}/{one.uid}.json": as_grafana(one) for one in ALL},
    }


def stale(root: Path) -> list[str]:
    """Files below *root* that are not what the code makes."""
    return [
        name for name, text in made_files().items() if not (root / name).exists() or (root / name).read_text("utf-8") != text
    ]


def main(arguments: list[str]) -> int:
    """Write or judge; the exit status."""
    if "--write" in arguments:
        for name, text in made_files().items():
            (REPOSITORY / name).parent.mkdir(parents=True, exist_ok=True)
            (REPOSITORY / name).write_text(text, "utf-8")
    old = stale(REPOSITORY)
    sys.stdout.writelines(f"{name} is not what the code makes: run `python -m control.monitoring --write`\n" for name in old)
    return 1 if old else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
