# SPDX-License-Identifier: Apache-2.0
"""Random rules and requests, few keys and values so that they meet."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from chassis.wire import ratelimit_pb2 as wire
from tests.ratelimit_rules import OVER
from tests.ratelimit_rules.model import Asked

_VALUES = ("x", "xy", "y", "x*", "*y", "x*y", "*")
_KEYS = ("a", "b")


@st.composite
def levels(draw: st.DrawFn, units: tuple[str, ...], depth: int = 0) -> list[dict[str, Any]]:
    """A list of descriptors in which no key and value is there twice."""
    pairs = draw(st.lists(st.tuples(st.sampled_from(_KEYS), st.sampled_from(("", *_VALUES))), unique=True, min_size=1, max_size=4))
    found = []
    for key, value in pairs:
        node: dict[str, Any] = {"key": key, "value": value} if value else {"key": key}
        if "*" in value and draw(st.booleans()):
            node["share_threshold"] = True
        if draw(st.integers(0, 3)):
            limit: dict[str, Any] = {"unit": draw(st.sampled_from(units)), "requests_per_unit": draw(st.integers(0, 5))}
            if draw(st.integers(0, 7)) == 0:
                limit = {"unlimited": True}
            elif draw(st.booleans()):
                limit["name"] = draw(st.sampled_from(("n1", "n2")))
            if draw(st.integers(0, 3)) == 0:
                limit["replaces"] = [{"name": name} for name in ("n1", "n2", "n3") if name != limit.get("name")][:1]
            node |= {"rate_limit": limit, "shadow_mode": draw(st.integers(0, 4)) == 0, "quota_mode": draw(st.integers(0, 4)) == 0}
        if depth < 2 and draw(st.booleans()):
            node["descriptors"] = draw(levels(units, depth=depth + 1))
        found.append(node)
    return found


ENTRIES = st.lists(st.tuples(st.sampled_from((*_KEYS, "c")), st.sampled_from(("", "x", "xy", "y", "zy", "x*"))), min_size=1, max_size=3)
REQUESTS = st.lists(
    st.tuples(st.integers(0, 40), st.lists(st.tuples(ENTRIES, st.integers(-2, 3)), min_size=1, max_size=3)), min_size=1, max_size=12
)


def as_asked(domain: str, descriptors: list[Asked]) -> wire.RateLimitRequest:
    """As Envoy writes it, each descriptor with hits of its own."""
    made = wire.RateLimitRequest(domain=domain)
    for entries, hits in descriptors:
        descriptor = made.descriptors.add(is_negative_hits=hits < 0)
        descriptor.hits_addend.value = abs(hits)
        for key, value in entries:
            descriptor.entries.add(key=key, value=value)
    return made


def said(answer: wire.RateLimitResponse) -> tuple[bool, list[tuple[bool, int | None]]]:
    """As the model says it."""
    return answer.overall_code == OVER, [
        (status.code == OVER, status.limit_remaining if status.HasField("current_limit") else None) for status in answer.statuses
    ]
