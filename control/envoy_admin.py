# SPDX-License-Identifier: Apache-2.0
"""Ask a running Envoy what it has taken, by its admin interface."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final

import httpx

from chassis.errors import Unavailable

#: Of one question; Envoy answers from its main thread, which a large update holds up.
_TIMEOUT_SECONDS: Final = 10.0
_STATS: Final = (
    "cluster_manager.cds.version_text",
    "cluster_manager.cds.update_rejected",
    "cluster_manager.warming_clusters",
    "http.tenants.rds.tenants.version_text",
    "http.tenants.rds.tenants.update_rejected",
)
_LINE: Final = re.compile(r'([^:]+): "?([^"\n]*)"?')


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """Which versions of its files Envoy runs, how many it has refused, and whether clusters are still being made."""

    clusters: str
    routes: str
    refused: int
    warming: int


class Admin:
    """The admin interface at one address."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def taken(self) -> Taken:
        """What it runs now."""
        pattern = "|".join(f"^{re.escape(name)}$" for name in _STATS)
        lines = self._get("/stats", filter=pattern).text.splitlines()
        found = {matched[1]: matched[2] for line in lines if (matched := _LINE.fullmatch(line))}
        return Taken(
            clusters=found.get(_STATS[0], ""),
            routes=found.get(_STATS[3], ""),
            refused=int(found.get(_STATS[1], 0)) + int(found.get(_STATS[4], 0)),
            warming=int(found.get(_STATS[2], 0)),
        )

    def resources(self) -> dict[str, list[dict[str, Any]]]:
        """The clusters and the route tables that it runs and was given while it ran."""
        dump = self._get("/config_dump").json()["configs"]
        sections = {str(section["@type"]).rpartition(".")[2]: section for section in dump}
        clusters = sections.get("ClustersConfigDump", {}).get("dynamic_active_clusters", [])
        routes = sections.get("RoutesConfigDump", {}).get("dynamic_route_configs", [])
        return {
            "clusters": [entry["cluster"] for entry in clusters],
            "routes": [entry["route_config"] for entry in routes],
        }

    def _get(self, path: str, **parameters: str) -> httpx.Response:
        try:
            return httpx.get(f"{self.url}{path}", params=parameters, timeout=_TIMEOUT_SECONDS, trust_env=False).raise_for_status()
        except httpx.HTTPError as exc:
            raise Unavailable(f"Envoy's admin interface at {self.url} does not answer: {type(exc).__name__}.") from exc
