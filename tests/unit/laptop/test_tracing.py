# SPDX-License-Identifier: Apache-2.0
"""Traces in Envoy's configuration: none unless a collector is named, then on every door."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from control.laptop.envoy import render
from control.laptop.errors import Trouble
from control.laptop.places import Places, Ports
from control.laptop.scale import Scale

_PORTS = Ports(tenants=10000, control=10001, admin=9901)


def rendered(home: Path) -> dict[str, Any]:
    """What Envoy would run on."""
    place = Places(home)
    for directory in (place.envoy, place.run):
        directory.mkdir(exist_ok=True)
    render(place, _PORTS, Scale())
    document: dict[str, Any] = yaml.safe_load((place.envoy / "envoy.yaml").read_text())
    return document


def managers(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The connection manager of each tenants' listener."""
    listeners = document["static_resources"]["listeners"]
    return [chain["filters"][0]["typed_config"] for listener in listeners for chain in listener["filter_chains"]]


def test_without_a_collector_there_is_no_tracer(tmp_path: Path) -> None:
    """Off costs nothing."""
    document = rendered(tmp_path)

    assert [] == [manager for manager in managers(document) if "tracing" in manager]
    assert "traces" not in {cluster["name"] for cluster in document["static_resources"]["clusters"]}


def test_with_a_collector_each_door_is_traced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To its address, so many of a hundred; with TLS as without."""
    monkeypatch.setenv("PEAJE_TRACES_URL", "http://collector:4319/")
    monkeypatch.setenv("PEAJE_TRACES_PERCENT", "2.5")
    (tmp_path / "tls.yaml").write_text("{address: {socket_address: {address: 127.0.0.1, port_value: 1}}, transport_socket: {name: tls}}")

    document = rendered(tmp_path)

    configs = [manager["tracing"]["provider"]["typed_config"] for manager in managers(document)]
    assert 2 == len(configs)
    for config in configs:
        assert "http://collector:4319/v1/traces" == config["http_service"]["http_uri"]["uri"]
        assert 25_000 == config["sampler"]["typed_config"]["sampling_percentage"]["numerator"]
    [cluster] = [one for one in document["static_resources"]["clusters"] if one["name"] == "traces"]
    [endpoint] = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]
    assert {"address": "collector", "port_value": 4319} == endpoint["endpoint"]["address"]["socket_address"]


@pytest.mark.parametrize("url", ["collector:4318", "http://", "/v1/traces", "http://here:99999", "http://here:0", "http://[::1", "http://here?x=1", "http://here#x"])
def test_what_is_no_address_of_a_collector_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Before anything starts, by the name of the setting."""
    monkeypatch.setenv("PEAJE_TRACES_URL", url)

    with pytest.raises(Trouble, match="PEAJE_TRACES_URL"):
        rendered(tmp_path)


def test_a_password_in_the_address_is_refused_and_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would stand in Envoy's configuration, for everybody who may look at that."""
    monkeypatch.setenv("PEAJE_TRACES_URL", "http://me:s3cret@collector:4318")

    with pytest.raises(Trouble, match="without user") as raised:
        rendered(tmp_path)
    assert "s3cret" not in str(raised.value)


def test_an_address_by_tls_is_refused_with_what_to_do_instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither Envoy nor the services would check the certificate."""
    monkeypatch.setenv("PEAJE_TRACES_URL", "https://collector:4318")

    with pytest.raises(Trouble, match=r"plain HTTP.*Name a collector near by"):
        rendered(tmp_path)


@pytest.mark.parametrize("percent", ["many", "-1", "100.1"])
def test_what_is_no_share_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, percent: str) -> None:
    """As above."""
    monkeypatch.setenv("PEAJE_TRACES_PERCENT", percent)

    with pytest.raises(Trouble, match="PEAJE_TRACES_PERCENT"):
        rendered(tmp_path)
