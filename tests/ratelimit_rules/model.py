# SPDX-License-Identifier: Apache-2.0
"""What the rules mean, in as few lines as possible: parsed YAML in, verdicts out, one dictionary of counts."""

from __future__ import annotations

import re
from typing import Any

LENGTHS = {"second": 1, "minute": 60, "hour": 3600, "day": 86400, "week": 604800, "month": 2592000, "year": 31536000}
Asked = tuple[list[tuple[str, str]], int]


class Model:
    def __init__(self, descriptors: list[dict[str, Any]]) -> None:
        self.descriptors, self.counts = descriptors, {}  # type: ignore[var-annotated]

    def ask(self, asked: list[Asked], now: int) -> tuple[bool, list[tuple[bool, int | None]]]:
        """Whether the request is over; per descriptor whether it is, and what is left (None: nothing limits it)."""
        found = [self.find(entries) for entries, _ in asked]
        gone = {one["name"] for rule, _ in filter(None, found) for one in rule["rate_limit"].get("replaces", ())}
        said: list[tuple[bool, int | None]] = []
        refusals: dict[bool, list[bool]] = {True: [], False: []}
        for match, (_, hits) in zip(found, asked, strict=True):
            limit = match[0]["rate_limit"] if match else {}
            if match is None or limit.get("unlimited") or limit.get("name", "") in gone:
                said.append((False, None))
                continue
            key = (str(match[1]), limit["unit"], now // LENGTHS[limit["unit"]])
            self.counts[key] = max(0, self.counts.get(key, 0) + hits)
            over = self.counts[key] > limit["requests_per_unit"] and not match[0].get("shadow_mode")
            refusals[bool(match[0].get("quota_mode"))].append(over)
            said.append((over, max(0, limit["requests_per_unit"] - self.counts[key])))
        return any(refusals[False]) or (refusals[True] != [] and all(refusals[True])), said

    def find(self, entries: list[tuple[str, str]]) -> tuple[dict[str, Any], list[tuple[str, str]]] | None:
        level, node, counted = self.descriptors, {}, []
        for key, value in entries:
            same = [one for one in level if one["key"] == key]
            exact = [one for one in same if one.get("value", "") == value != ""]
            star = [one for one in same if "*" in one.get("value", "") and fits(one["value"], value)]
            node = next(iter([*exact, *star, *(one for one in same if not one.get("value"))]), {})
            shared = node.get("share_threshold") and node in star
            counted.append((key, node["value"] if shared else value))
            level = node.get("descriptors", [])
        return (node, counted) if "rate_limit" in node else None


def fits(pattern: str, value: str) -> bool:
    return re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), value, re.DOTALL) is not None
