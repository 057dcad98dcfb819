# SPDX-License-Identifier: Apache-2.0
"""An operator's own Envoy beside the road, with rules of its own in the same ratelimit process."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from control.laptop.binaries import find_envoy
from tests.dataplane.installation import VISIBLE_SECONDS, Installation, Tenant, chat, free_ports

_HTTP = "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
_ROUTER = {
    "name": "envoy.filters.http.router",
    "typed_config": {"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"},
}
_RULES = """
domain: shop
descriptors:
- key: path
  value: /orders*
  rate_limit: {unit: year, requests_per_unit: 2}
- key: path
  value: /imports
  rate_limit: {unit: year, requests_per_unit: 10}
- key: path
  value: /closed
  rate_limit: {unit: year, requests_per_unit: 0}
"""


def _listener(name: str, port: int, filters: list[Any], routes: list[Any]) -> dict[str, Any]:
    manager = {
        "@type": _HTTP, "stat_prefix": name, "http_filters": [*filters, _ROUTER],
        "route_config": {"virtual_hosts": [{"name": name, "domains": ["*"], "routes": routes}]},
    }  # fmt: skip
    chain = {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
    return {"name": name, "address": _address("127.0.0.1", port), "filter_chains": [chain]}


def _address(host: str, port: int) -> dict[str, Any]:
    return {"socket_address": {"address": host, "port_value": port}}


def _cluster(name: str, address: dict[str, Any], **more: Any) -> dict[str, Any]:
    endpoints = [{"lb_endpoints": [{"endpoint": {"address": address}}]}]
    return {"name": name, "type": "STATIC", "load_assignment": {"cluster_name": name, "endpoints": endpoints}, **more}


def _bootstrap(port: int, upstream: int) -> dict[str, Any]:
    """Routes to a shop that always answers, limited by path; an import costs four hits."""
    ratelimit = {
        "name": "envoy.filters.http.ratelimit",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.http.ratelimit.v3.RateLimit",
            "domain": "shop", "failure_mode_deny": True, "timeout": "5s", "enable_x_ratelimit_headers": "DRAFT_VERSION_03",
            "rate_limit_service": {
                "transport_api_version": "V3", "grpc_service": {"envoy_grpc": {"cluster_name": "ratelimit"}, "timeout": "5s"},
            },
        },
    }  # fmt: skip
    by_path = {"actions": [{"request_headers": {"header_name": ":path", "descriptor_key": "path"}}]}
    # Where a route has its own hits, Envoy reads its actions from the filter's configuration for it.
    per_route = {
        "@type": "type.googleapis.com/envoy.extensions.filters.http.ratelimit.v3.RateLimitPerRoute",
        "rate_limits": [by_path | {"hits_addend": {"number": 4}}],
    }
    routes = [
        {
            "match": {"prefix": "/imports"}, "route": {"cluster": "shop"},
            "typed_per_filter_config": {"envoy.filters.http.ratelimit": per_route},
        },
        {"match": {"prefix": "/"}, "route": {"cluster": "shop", "rate_limits": [by_path]}},
    ]  # fmt: skip
    http2 = {
        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
            "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
            "explicit_http_config": {"http2_protocol_options": {}},
        }
    }
    answers = [{"match": {"prefix": "/"}, "direct_response": {"status": 200, "body": {"inline_string": "shop"}}}]
    return {
        "static_resources": {
            "listeners": [_listener("front", port, [ratelimit], routes), _listener("shop", upstream, [], answers)],
            "clusters": [
                _cluster("shop", _address("127.0.0.1", upstream)),
                _cluster("ratelimit", {"pipe": {"path": "run/ratelimit.sock"}}, typed_extension_protocol_options=http2),
            ],
        }
    }


@pytest.fixture
def shop(road: Installation, tmp_path: Path) -> Iterator[str]:
    """An Envoy of the operator's own that asks the road's ratelimit; its URL."""
    port, upstream = free_ports(2)
    config = tmp_path / "shop.yaml"
    config.write_text(yaml.safe_dump(_bootstrap(port, upstream)))
    with (tmp_path / "shop.log").open("wb") as log:
        process = subprocess.Popen(
            [find_envoy(os.environ), "-c", config, "--use-dynamic-base-id", "--concurrency", "1", "--log-level", "warn"],
            cwd=road.home, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=20)
        for path in (road.home / "ratelimit.d").glob("*"):
            path.unlink()


def _wait(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + VISIBLE_SECONDS
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def _status(url: str) -> int:
    try:
        return httpx.get(url, timeout=10).status_code
    except httpx.HTTPError:
        return 0


def test_an_operators_own_route_is_limited_by_its_own_file(road: Installation, shop: str, tenant: Tenant) -> None:
    """Taken while it runs; a bad file changes nothing and is found by `check`; Peaje's own road goes on."""
    rules = road.home / "ratelimit.d"
    rules.mkdir(exist_ok=True)
    (rules / "shop.yaml").write_text(_RULES)
    _wait(lambda: _status(f"{shop}/closed") == 429, "the rules were not taken")

    orders = [httpx.get(f"{shop}/orders/7", timeout=10) for _ in range(3)]
    assert [200, 200, 429] == [answer.status_code for answer in orders]
    assert ["1", "0", "0"] == [answer.headers["x-ratelimit-remaining"] for answer in orders]
    assert all(answer.headers["x-ratelimit-limit"].startswith("2, 2;w=31536000") for answer in orders)
    # Another value of the pattern, hits that a route sets, and a path without a rule.
    assert [200, 200, 200, 429] == [_status(f"{shop}{path}") for path in ("/orders/8", "/imports", "/imports", "/imports")]
    assert [200] * 5 == [_status(f"{shop}/elsewhere") for _ in range(5)]

    (rules / "bad.yaml").write_text("domain: other\ndescriptors:\n- key: a\n  rate_limits: {}\n")
    log = road.home / "log/ratelimit.log"
    _wait(lambda: "rules_refused" in log.read_text(), "the bad file was not noticed")
    assert [429, 429] == [_status(f"{shop}{path}") for path in ("/closed", "/orders/7")]
    checked = road.run("check")
    assert (1, True) == (checked.returncode, f"{rules}/bad.yaml:4: rate_limits is not known. Write rate_limit." in checked.stdout)
    assert 200 == road.post(tenant, json=chat()).status_code
