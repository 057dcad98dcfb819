# SPDX-License-Identifier: Apache-2.0
"""A real Envoy with the chart's own clusters, and services behind the door that they have in a cluster."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import grpc
import httpx
import pytest
import yaml
from grpc_health.v1 import health, health_pb2_grpc

from chassis.certificates import server_credentials
from chassis.serving import door
from control import pod
from control.laptop.binaries import find_envoy
from tests.certificates import Authority
from tests.chart.rendering import NAMESPACE, find, rendered

_SERVICES: Final = ("extauth", "ratelimit", "metering")
_PATIENCE_SECONDS: Final = 30


def _mount(directory: Path, authority: Authority, *names: str) -> Path:
    """Certificates as the kubelet mounts and replaces them: one rename for all three."""
    moment = f"..{time.monotonic_ns()}"
    authority.fill(directory / moment, *names)
    (directory / "..data_tmp").symlink_to(moment)
    os.replace(directory / "..data_tmp", directory / "..data")
    for name in ("tls.crt", "tls.key", "ca.crt"):
        if not (directory / name).is_symlink():
            (directory / name).symlink_to(Path("..data") / name)
    return directory


def _host(service: str) -> str:
    return f"peaje-{service}.{NAMESPACE}.svc.cluster.local"


@contextmanager
def _serving(directory: Path, port: int) -> Iterator[None]:
    """What Envoy's health checks ask of a service, behind the door of one."""
    server = grpc.server(ThreadPoolExecutor(2))
    health_pb2_grpc.add_HealthServicer_to_server(health.HealthServicer(), server)
    at = door("unused", listen=f"127.0.0.1:{port}", tls_directory=directory)
    assert at.certificates is not None
    server.add_secure_port(at.address, server_credentials(at.certificates))
    server.start()
    try:
        yield
    finally:
        server.stop(0).wait()


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@contextmanager
def _envoy(tmp_path: Path, authority: Authority, ports: dict[str, int], *, tenants: int, admin: int) -> Iterator[Path]:
    """The default preset's Envoy; only addresses are changed, because no name of a cluster is known here."""
    home, mounts = tmp_path / "home", tmp_path / "mounts"
    config = find(rendered("default"), "ConfigMap", "peaje-envoy")["data"]
    bootstrap = yaml.safe_load(config["envoy.yaml"])
    bootstrap["admin"]["address"]["socket_address"]["port_value"] = admin
    bootstrap["static_resources"]["listeners"][0]["address"]["socket_address"] = {"address": "127.0.0.1", "port_value": tenants}
    for cluster in bootstrap["static_resources"]["clusters"]:
        address = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]["address"]["socket_address"]
        assert _host(cluster["name"]) == address["address"]
        address.update(address="127.0.0.1", port_value=ports[cluster["name"]])
    files = {name.replace("lua.", "lua/", 1) if name.startswith("lua.") else name: text for name, text in config.items()}
    for name, text in {**files, "envoy.yaml": yaml.safe_dump(bootstrap)}.items():
        (mounts / "envoy" / name).parent.mkdir(parents=True, exist_ok=True)
        (mounts / "envoy" / name).write_text(text)
    (mounts / "models").mkdir()
    (mounts / "models/models.yaml").write_text(find(rendered("default"), "ConfigMap", "peaje-documents")["data"]["models.yaml"])
    _mount(home / "tls", authority, "gateway")
    pod.prepare(home, mounts)
    with (tmp_path / "envoy.log").open("w") as log:
        command = pod.envoy_command(["--concurrency", "1"], find_envoy(os.environ))
        process = subprocess.Popen(command, cwd=home, env={"PEAJE_ENVOY_EPOCH": "x"}, stdout=log, stderr=log)
        try:
            yield home
        finally:
            process.terminate()
            process.wait(20)


def _wait(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < deadline:
        try:
            if condition():
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.05)
    pytest.fail(f"not within {_PATIENCE_SECONDS} s: {what}")


@pytest.mark.xdist_group("mutual-tls")
def test_envoy_and_services_know_each_other_and_go_on_through_a_renewal(tmp_path: Path) -> None:
    """A service with another's certificate is not asked; a whole new authority is taken over by both sides while they run."""
    old, new = Authority.make("old"), Authority.make("new")
    tenants, admin, *free = _free_ports(5)
    ports = dict(zip(_SERVICES, free, strict=True))
    directories = {service: tmp_path / service for service in _SERVICES}

    def healthy() -> bool:
        return httpx.get(f"http://127.0.0.1:{tenants}/health").status_code == 200

    def stat(name: str) -> int:
        answer = httpx.get(f"http://127.0.0.1:{admin}/stats", params={"filter": f"^{name}$", "format": "json"})
        return sum(int(one["value"]) for one in answer.json()["stats"] if "value" in one)

    with ExitStack() as stack:
        home = stack.enter_context(_envoy(tmp_path, old, ports, tenants=tenants, admin=admin))
        # Somebody else's certificate, of the same authority: extauth shows ratelimit's.
        for service, name in zip(_SERVICES, ("ratelimit", "ratelimit", "metering"), strict=True):
            _mount(directories[service], old, _host(name))
        servers = {service: stack.enter_context(ExitStack()) for service in _SERVICES}
        for service in _SERVICES:
            servers[service].enter_context(_serving(directories[service], ports[service]))

        _wait(lambda: stat("cluster.extauth.ssl.fail_verify_san") > 0, "extauth's name is refused")
        # Envoy listens only after the first answers of every cluster's health checks.
        _wait(lambda: not healthy(), "Envoy listens, and says that extauth is not there")

        _mount(directories["extauth"], old, _host("extauth"))
        _wait(healthy, "the right certificate is taken up while the service runs")

        updates = stat("cluster.extauth.client_ssl_socket_factory.ssl_context_update_by_sds")
        _mount(home / "tls", new, "gateway")
        _wait(lambda: stat("cluster.extauth.client_ssl_socket_factory.ssl_context_update_by_sds") > updates, "Envoy reads its new ones")
        for service in _SERVICES:
            _mount(directories[service], new, _host(service))
            servers[service].close()  # every connection of the old authority ends
            servers[service].enter_context(_serving(directories[service], ports[service]))
        _wait(lambda: healthy() and stat("cluster.extauth.health_check.success") > 0, "both sides are with the new authority")
        handshakes = stat("cluster.extauth.ssl.handshake")
        servers["extauth"].close()
        _wait(lambda: not healthy(), "a service that is gone is missed")
        servers["extauth"].enter_context(_serving(directories["extauth"], ports["extauth"]))
        _wait(healthy, "and asked again when it is back")
        assert stat("cluster.extauth.ssl.handshake") > handshakes
