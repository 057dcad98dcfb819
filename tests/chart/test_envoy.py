# SPDX-License-Identifier: Apache-2.0
"""The cluster's Envoy is the laptop's: the same files, but for what only a cluster knows; and Envoy takes them."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from helm_python.chart import package

from chassis.contract import CLUSTER_EXTAUTH, CLUSTER_METERING, CLUSTER_RATELIMIT
from control import pod
from control.envoy_lint import lint
from control.laptop.binaries import find_envoy
from control.located_yaml import load
from tests.certificates import Authority
from tests.chart.rendering import (
    CHART,
    NAMESPACE,
    PRESETS,
    REPOSITORY,
    envoy_files,
    find,
    mount_documents,
    preset,
    render,
    rendered,
)

_SERVICES: Final = (CLUSTER_EXTAUTH, CLUSTER_RATELIMIT, CLUSTER_METERING)


def _files(name: str) -> dict[str, str]:
    return envoy_files(rendered(name))


def _laptops() -> Any:
    return yaml.safe_load((REPOSITORY / "envoy/envoy.yaml").read_text())


def test_a_packaged_chart_has_the_files_that_are_edited(tmp_path: Path) -> None:
    """In the repository they are a link, so that there is one of each; a package has them for good."""
    archive = package(CHART, destination=tmp_path)
    with tarfile.open(archive) as packed:
        got = {
            entry.name.removeprefix("peaje/files/envoy/"): packed.extractfile(entry).read()  # type: ignore[union-attr]
            for entry in packed if entry.name.startswith("peaje/files/envoy/") and entry.isreg()
        }  # fmt: skip

    assert got == {
        path.relative_to(REPOSITORY / "envoy").as_posix(): path.read_bytes() for path in (REPOSITORY / "envoy").rglob("*") if path.is_file()
    }


@pytest.mark.parametrize("name", PRESETS)
def test_scripts_are_the_laptops_byte_for_byte(name: str) -> None:
    """At the paths that `require` looks at."""
    scripts = {path.relative_to(REPOSITORY / "envoy").as_posix(): path.read_text() for path in (REPOSITORY / "envoy").rglob("*.lua")}

    assert scripts == {path: text for path, text in _files(name).items() if path.endswith(".lua")}


def _with_what_a_cluster_knows(bootstrap: Any, *, heap: int, separate: bool, hosts: str) -> Any:
    """The laptop's bootstrap with the documented differences, and nothing else."""
    changed = copy.deepcopy(bootstrap)
    (listener,) = changed["static_resources"]["listeners"]
    listener["address"]["socket_address"]["address"] = "0.0.0.0"
    changed["overload_manager"]["resource_monitors"][0]["typed_config"]["max_heap_size_bytes"] = heap
    for cluster, port in zip(changed["static_resources"]["clusters"], (9001, 9002, 9003), strict=True):
        if separate:
            address = {"socket_address": {"address": hosts.format(cluster["name"]), "port_value": port}}
            cluster["load_assignment"]["endpoints"] = [{"lb_endpoints": [{"endpoint": {"address": address}}]}]
            cluster["type"], cluster["dns_lookup_family"] = "STRICT_DNS", "V4_PREFERRED"
    return changed


@pytest.mark.parametrize(("name", "heap_mib"), [("default", 768), ("small", 384), ("large", 6144), ("external-stores", 768)])
def test_the_bootstrap_differs_by_what_only_a_cluster_knows(name: str, heap_mib: int) -> None:
    """Address, memory, and where services have pods of their own their names and certificates. Nothing else, anywhere."""
    got = yaml.safe_load(_files(name)["envoy.yaml"])
    sockets = [cluster.pop("transport_socket", None) for cluster in got["static_resources"]["clusters"]]
    separate = name != "small"

    expected = _with_what_a_cluster_knows(
        _laptops(), heap=heap_mib << 20, separate=separate, hosts=f"peaje-{{}}.{NAMESPACE}.svc.cluster.local"
    )
    assert expected == got
    assert separate == all(sockets)
    if separate:
        wanted = [f"peaje-{service}.{NAMESPACE}.svc.cluster.local" for service in _SERVICES]
        assert wanted == [socket["typed_config"]["sni"] for socket in sockets]


def test_a_proxy_in_front_is_believed_where_the_values_say_so() -> None:
    """No more hops than that: an address grants nothing that a client could write."""
    bootstrap = yaml.safe_load(find(render({"gateway": {"trustedHops": 2}}), "ConfigMap", "peaje-envoy")["data"]["envoy.yaml"])
    manager = bootstrap["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]

    assert 2 == manager["xff_num_trusted_hops"]
    assert manager["use_remote_address"] is True


@pytest.mark.parametrize("name", ["default", "small"])
def test_envoy_takes_what_a_pod_gives_it(name: str, tmp_path: Path) -> None:
    """Envoy's own validation, in the directory that the init container lays out, with certificates where they are mounted."""
    home = tmp_path / "home"
    home.mkdir()
    mount_documents(rendered(name), tmp_path / "mounts")
    pod.prepare(home, tmp_path / "mounts")
    if name == "default":
        Authority.make().fill(home / "tls", "gateway")

    answer = subprocess.run(
        [find_envoy(os.environ), "--mode", "validate", "-c", "envoy/envoy.yaml", "--log-level", "error"],
        cwd=home, capture_output=True, text=True, timeout=60, check=False, env={"PEAJE_ENVOY_EPOCH": "x"},
    )  # fmt: skip

    assert 0 == answer.returncode, answer.stderr[-2000:]
    shutil.rmtree(home)


@pytest.mark.parametrize("name", PRESETS)
def test_our_own_lint_has_nothing_against_it(name: str, tmp_path: Path) -> None:
    """What Envoy would take in silence and an operator would regret."""
    path = tmp_path / "envoy.yaml"
    path.write_text(_files(name)["envoy.yaml"])

    assert [] == lint(load(path), "envoy.yaml")


@pytest.mark.parametrize("name", PRESETS)
def test_envoy_refuses_requests_before_kubernetes_ends_it(name: str) -> None:
    """Its heap's bound is below the container's memory; killed, it would take every stream with it."""
    values = {"Mi": 1 << 20, "Gi": 1 << 30}
    envoy = find(list(rendered(name)), "StatefulSet", "peaje-gateway")["spec"]["template"]["spec"]["containers"][0]
    limit = envoy["resources"]["limits"]["memory"]
    monitors = yaml.safe_load(_files(name)["envoy.yaml"])["overload_manager"]["resource_monitors"]

    assert monitors[0]["typed_config"]["max_heap_size_bytes"] < int(limit[:-2]) * values[limit[-2:]]


def test_only_a_change_that_envoy_reads_once_restarts_it() -> None:
    """Its bootstrap does; models, identity and the chart's own version do not."""

    def template(values: dict[str, Any]) -> Any:
        return find(render(values), "StatefulSet", "peaje-gateway")["spec"]["template"]

    models = {"models": [{"name": "other", "engine": "vllm", "endpoints": ["http://other:8000"]}]}
    assert template({}) == template({"modelsDocument": models})
    assert template({}) != template({"gateway": {"trustedHops": 1}})
    assert preset("default") == {}
