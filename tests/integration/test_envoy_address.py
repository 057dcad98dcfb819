# SPDX-License-Identifier: Apache-2.0
"""Whose address extauth is told: the client's, however many proxies of the operator's are before Envoy, and never a claimed one."""

from __future__ import annotations

import copy
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
import yaml

from chassis import contract
from chassis.wire import ext_authz_pb2 as wire
from control.laptop.binaries import find_envoy
from extauth.servicer import METHOD
from tests.dataplane.installation import REPOSITORY, free_ports

WAIT_SECONDS_MAX = 30.0
_PROXY_PROTOCOL = {
    "name": "envoy.filters.listener.proxy_protocol",
    "typed_config": {"@type": "type.googleapis.com/envoy.extensions.filters.listener.proxy_protocol.v3.ProxyProtocol"},
}


@dataclass(slots=True)
class Extauth:
    """Lets everybody in, and keeps what address it was told."""

    addresses: list[str] = field(default_factory=list)

    def check(self, request: wire.CheckRequest, context: grpc.ServicerContext) -> wire.CheckResponse:
        """As the real one reads it."""
        del request
        self.addresses += [str(value) for name, value in context.invocation_metadata() if name == contract.ADDRESS_CALL_METADATA]
        answer = wire.CheckResponse()
        answer.ok_response.SetInParent()
        return answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Doors:
    """Listeners with envoy.yaml's own connection manager and ext_authz filter, told apart by what is before them."""

    extauth: Extauth
    nothing: int
    one_proxy: int
    balancer: int

    def address(self, port: int, *headers: str, preface: str = "") -> str:
        """What extauth is told of a request to *port*."""
        self.extauth.addresses.clear()
        head = "".join(f"{line}\r\n" for line in ("GET / HTTP/1.1", "host: a", "connection: close", *headers, ""))
        with socket.create_connection(("127.0.0.1", port), timeout=WAIT_SECONDS_MAX) as connection:
            connection.sendall((preface + head).encode())
            answer = connection.recv(65536)
        assert answer.startswith(b"HTTP/1.1 200"), answer
        [told] = self.extauth.addresses
        return told


@pytest.fixture(scope="module")
def doors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Doors]:
    """One Envoy for all."""
    directory = tmp_path_factory.mktemp("address")
    ports, extauth = free_ports(4), Extauth()
    server = grpc.server(ThreadPoolExecutor(1))
    _, service, method = METHOD.split("/")
    handler = grpc.unary_unary_rpc_method_handler(
        extauth.check, request_deserializer=wire.CheckRequest.FromString, response_serializer=wire.CheckResponse.SerializeToString,
    )  # fmt: skip
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
    server.add_insecure_port(f"127.0.0.1:{ports[3]}")
    server.start()
    (directory / "envoy.yaml").write_text(yaml.safe_dump(_bootstrap(ports)))
    with (directory / "log").open("wb") as log, subprocess.Popen(
        [find_envoy(os.environ), "-c", "envoy.yaml", "--use-dynamic-base-id", "--concurrency", "1"],
        cwd=directory, stdout=log, stderr=log,
    ) as process:  # fmt: skip
        try:
            _wait(ports[0], process)
            yield Doors(extauth=extauth, nothing=ports[0], one_proxy=ports[1], balancer=ports[2])
        finally:
            process.terminate()
            server.stop(None).wait()


def _bootstrap(ports: list[int]) -> dict[str, Any]:
    ours = yaml.safe_load((REPOSITORY / "envoy/envoy.yaml").read_text())
    manager = ours["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]
    config = manager["typed_config"]
    config["http_filters"] = [one for one in config["http_filters"] if one["name"].endswith((".ext_authz", ".router"))]
    for name in ("rds", "access_log", "access_log_options", "local_reply_config"):
        del config[name]
    everything = {"match": {"prefix": "/"}, "direct_response": {"status": 200}}
    config["route_config"] = {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [everything]}]}

    def listener(port: int, *, hops: int = 0, **more: Any) -> dict[str, Any]:
        mine = copy.deepcopy(manager)
        mine["typed_config"]["xff_num_trusted_hops"] = hops
        return {"address": _address(port), "filter_chains": [{"filters": [mine]}], **more}

    [extauth] = [cluster for cluster in ours["static_resources"]["clusters"] if cluster["name"] == "extauth"]
    del extauth["health_checks"]
    extauth["load_assignment"]["endpoints"] = [{"lb_endpoints": [{"endpoint": {"address": _address(ports[3])}}]}]
    listeners = [listener(ports[0]), listener(ports[1], hops=1), listener(ports[2], listener_filters=[_PROXY_PROTOCOL])]
    return {"static_resources": {"listeners": listeners, "clusters": [extauth]}}


def _address(port: int) -> dict[str, Any]:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


def _wait(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS_MAX
    while time.monotonic() < deadline and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise AssertionError("Envoy did not start")


CLAIMS = ("x-forwarded-for: 198.51.100.1", "x-envoy-external-address: 198.51.100.2", "x-peaje-address: 198.51.100.3", "forwarded: for=198.51.100.4")


def test_without_a_proxy_it_is_the_connections_whatever_the_client_claims(doors: Doors) -> None:
    """As envoy.yaml comes."""
    assert "127.0.0.1" == doors.address(doors.nothing)
    assert "127.0.0.1" == doors.address(doors.nothing, *CLAIMS)


def test_behind_one_proxy_it_is_what_that_proxy_wrote(doors: Doors) -> None:
    """The last address of x-forwarded-for; those before it are the client's own words."""
    assert "192.0.2.7" == doors.address(doors.one_proxy, "x-forwarded-for: 198.51.100.1, 192.0.2.7")
    assert "2001:db8::7" == doors.address(doors.one_proxy, "x-forwarded-for: 2001:db8::7")
    assert "127.0.0.1" == doors.address(doors.one_proxy)


def test_behind_a_balancer_that_speaks_the_proxy_protocol_it_is_what_that_says(doors: Doors) -> None:
    """Before the request's first byte; a header changes nothing."""
    preface = f"PROXY TCP4 192.0.2.7 127.0.0.1 40000 {doors.balancer}\r\n"

    assert "192.0.2.7" == doors.address(doors.balancer, *CLAIMS, preface=preface)
