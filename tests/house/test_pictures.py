# SPDX-License-Identifier: Apache-2.0
"""The dashboards' page shows each dashboard as it is now: a panel that is new or gone makes its picture old."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from control.monitoring.dashboards import ALL, Dashboard

#: A page that is slow to load is not looked at.
_BYTES_MAX = 250_000


@pytest.mark.parametrize("dashboard", ALL, ids=lambda dashboard: str(dashboard.uid))
def test_each_dashboard_has_its_picture_with_all_panels(repository: Path, dashboard: Dashboard) -> None:
    """`python -m bench.dashboards --write` draws them anew."""
    path = repository / f"docs/{dashboard.uid}.svg"
    said = [found.text or "" for found in ET.parse(path).iter("{http://www.w3.org/2000/svg}text")]  # noqa: S314 - drawn by ourselves

    assert f"({path.name})" in (repository / "docs/dashboards.md").read_text("utf-8")
    assert path.stat().st_size < _BYTES_MAX
    for _, row in dashboard.rows:
        for panel in row:
            assert any(text and panel.title.startswith(text.rstrip("…")) for text in said), panel.title
