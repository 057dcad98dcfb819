# SPDX-License-Identifier: Apache-2.0
"""What `diff` calls a difference, and what it does not."""

from __future__ import annotations

from typing import Any

import pytest

from control.envoy_diff import differences

NOTHING: dict[str, list[dict[str, Any]]] = {"clusters": [], "routes": []}


def clusters(*resources: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Only clusters."""
    return {"clusters": list(resources), "routes": []}


def table(*routes: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """One table with these routes."""
    return {"clusters": [], "routes": [{"name": "t", "virtual_hosts": [{"name": "v", "domains": ["*"], "routes": list(routes)}]}]}


def route(model: str, cluster: str) -> dict[str, Any]:
    """A route of one model."""
    wanted = {"filter": "peaje.request", "path": [{"key": "model"}], "value": {"string_match": {"exact": model}}}
    return {"match": {"path": "/v1/completions", "dynamic_metadata": [wanted]}, "route": {"cluster": cluster}}


@pytest.mark.parametrize(
    ("running", "files", "shown"),
    [
        (NOTHING, NOTHING, []),
        (NOTHING, clusters({"name": "a"}), ["+ cluster a"]),
        (clusters({"name": "a"}), NOTHING, ["- cluster a"]),
        (clusters({"name": "a", "x": {"y": [1, 2]}}), clusters({"name": "a", "x": {"y": [1, 3]}}), ["~ cluster a: x.y[1]: 2 -> 3"]),
        (clusters({"name": "a"}), clusters({"name": "a", "x": "1s"}), ["~ cluster a: x: nothing -> 1s"]),
        (clusters({"name": "a", "x": {}}), clusters({"name": "a"}), ["~ cluster a: x: {} -> nothing"]),
        (clusters({"name": "a", "x": 20}), clusters({"x": 20.0, "name": "a"}), []),
        (clusters({"name": "a", "x": "20.0"}), clusters({"name": "a", "x": 20.0}), []),
        (clusters({"name": "a", "x": "20.5", "y": "v1.0"}), clusters({"name": "a", "x": 20.5, "y": "v1"}), ["~ cluster a: y: v1.0 -> v1"]),
        (clusters({"name": "a", "x": "16777216"}), clusters({"name": "a", "x": 16777216}), []),
        (clusters({"name": "a", "x": True}), clusters({"name": "a", "x": 1}), ["~ cluster a: x: True -> 1"]),
        (clusters({"name": "a"}, {"name": "b"}), clusters({"name": "b"}, {"name": "a"}), []),
        (table(route("m", "a"), route("n", "a")), table(route("n", "a"), route("m", "a")), []),
        (table(route("m", "a")), table(route("m", "b")), ["~ route /v1/completions m: route.cluster: a -> b"]),
        (table(route("m", "a")), table(route("n", "a")), ["+ route /v1/completions n", "- route /v1/completions m"]),
    ],
)
def test_differences_are_of_meaning(running: Any, files: Any, shown: list[str]) -> None:
    """By name and leaf; neither order nor the spelling of a number is one."""
    assert shown == sorted(map(str, differences(running, files)))
