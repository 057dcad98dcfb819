# SPDX-License-Identifier: Apache-2.0
"""What Envoy is told of who chooses a server: the pool's policy, whom a route asks, where that is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from chassis.models import ModelCatalogue
from control.envoy_resources import render_all

_SCRIPT = Path(__file__).resolve().parents[2] / "envoy/picker.lua"


def rendered(tmp_path: Path, *pools: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The clusters by name, and the routes that forward to them."""
    document = {"models": [{"name": "m", "pools": [{"engine": "vllm", **pool} for pool in pools]}]}
    files = render_all(ModelCatalogue.parse(document, source="x"), tmp_path)
    clusters = {one["name"]: one for one in yaml.safe_load(files.clusters)["resources"]}
    [table] = yaml.safe_load(files.routes)["resources"]
    return clusters, [one for one in table["virtual_hosts"][0]["routes"] if one["name"] == "openai.chat"]


def policy(cluster: dict[str, Any]) -> str:
    """What chooses within it."""
    [one] = cluster["load_balancing_policy"]["policies"]
    return str(one["typed_extension_config"]["name"].rpartition(".")[2])


def test_a_route_tells_the_script_all_that_it_reads(tmp_path: Path) -> None:
    """By the names that the script has for it, and no others; among the servers only where addresses are known."""
    picker = {"address": "epp.example:9002", "when_away": "close"}
    _, [known] = rendered(tmp_path, {"name": "a", "endpoints": ["10.0.0.1:1", "[::1]:2"], "endpoint_picker": picker})
    _, [unknown] = rendered(tmp_path, {"name": "a", "endpoints": ["engines.example:1"], "endpoint_picker": picker})

    said = known["typed_per_filter_config"]["picker"]
    assert set(re.findall(r"context:get\('(\w+)'\)", _SCRIPT.read_text())) == said["filter_context"].keys()
    assert {
        "cluster": "picker/a/m", "host": "epp.example:9002", "when_away": "close", "among": ["10.0.0.1:1", "[::1]:2"],
    } == said["filter_context"]  # fmt: skip
    assert "among" not in unknown["typed_per_filter_config"]["picker"]["filter_context"]
    assert "ask" == said["name"]


def test_each_pool_by_weight_asks_its_own_picker_and_others_ask_nobody(tmp_path: Path) -> None:
    """On the part of the route that leads there."""
    clusters, [route] = rendered(
        tmp_path,
        {"name": "a", "endpoints": ["10.0.0.1:1"], "endpoint_picker": {"address": "10.0.1.1:9002"}},
        {"name": "b", "endpoints": ["10.0.0.2:1"], "balance": "orca"},
        {"name": "c", "endpoints": ["10.0.0.3:1"], "fallback": True},
    )

    first, second = route["route"]["weighted_clusters"]["clusters"]
    assert "picker/a/m" == first["typed_per_filter_config"]["picker"]["filter_context"]["cluster"]
    assert "typed_per_filter_config" not in second
    assert "typed_per_filter_config" not in route
    assert ["picker/a/m"] == [name for name in clusters if name.startswith("picker/")]
    assert ("override_host", "client_side_weighted_round_robin") == (policy(clusters["pool/a/m"]), policy(clusters["pool/b/m"]))
    assert "LEAST_REQUEST" == clusters["pool/c/m"]["lb_policy"]


def test_a_picker_that_is_away_is_left_out_and_one_with_a_certificate_has_to_prove_its_name(tmp_path: Path) -> None:
    """Also the only one; over HTTP/2 either way."""
    clusters, _ = rendered(tmp_path, {"name": "a", "endpoints": ["10.0.0.1:1"], "endpoint_picker": {"address": "https://epp.example:9002"}})

    picker = clusters["picker/a/m"]
    context = picker["transport_socket"]["typed_config"]
    assert 100 == picker["outlier_detection"]["max_ejection_percent"]
    assert (True, ["h2"]) == (context["auto_sni_san_validation"], context["common_tls_context"]["alpn_protocols"])
    [options] = picker["typed_extension_protocol_options"].values()
    assert "http2_protocol_options" in options["explicit_http_config"]


def test_callers_do_not_read_what_servers_report(tmp_path: Path) -> None:
    """Where reports are asked for they end at Envoy; where they are not, nothing is changed."""
    _, [by_load] = rendered(tmp_path, {"name": "a", "endpoints": ["10.0.0.1:1"], "balance": "orca"})
    _, [by_itself] = rendered(tmp_path, {"name": "a", "endpoints": ["10.0.0.1:1"]})

    assert ["endpoint-load-metrics"] == by_load["response_headers_to_remove"]
    assert "response_headers_to_remove" not in by_itself
