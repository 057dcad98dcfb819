# SPDX-License-Identifier: Apache-2.0
"""
What Envoy makes of framing that it does not refuse, to the byte that a model server gets.

Envoy 1.40 has no switch for these: its only HTTP/1 parser unfolds lines and drops bare carriage returns, and
merges an empty `authorization` into the next, before any filter runs (docs/identity.md). So what must be shown
is that nothing follows from it: one header stays one header, and everybody reads the same.
"""

from __future__ import annotations

import copy
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from control.laptop.binaries import find_envoy
from tests.dataplane.installation import REPOSITORY, free_ports

WAIT_SECONDS_MAX = 30.0
_HEAD = b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n"


@dataclass(slots=True)
class Upstream:
    """A model server that keeps the heads it is sent, as bytes."""

    listening: socket.socket
    heads: list[bytes] = field(default_factory=list)

    def run(self) -> None:
        """Answer until it is closed."""
        while True:
            try:
                peer, _ = self.listening.accept()
            except OSError:
                return
            with peer:
                head = b""
                while b"\r\n\r\n" not in head and (piece := peer.recv(65536)):
                    head += piece
                self.heads.append(head)
                peer.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")


@dataclass(frozen=True, slots=True)
class Road:
    """Envoy with our connection manager and nothing behind it but a model server."""

    port: int
    upstream: Upstream

    def lines(self, *headers: bytes) -> list[bytes]:
        """The header lines that the model server gets of a request with *headers*, each a raw line or several."""
        self.upstream.heads.clear()
        with socket.create_connection(("127.0.0.1", self.port), timeout=WAIT_SECONDS_MAX) as connection:
            connection.sendall(_HEAD + b"".join(header + b"\r\n" for header in headers) + b"\r\n")
            answer = connection.recv(65536)
        assert answer.startswith(b"HTTP/1.1 200"), answer
        [head] = self.upstream.heads
        return head.partition(b"\r\n\r\n")[0].split(b"\r\n")[1:]


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Road]:
    """Started once for all rows."""
    directory = tmp_path_factory.mktemp("framing")
    upstream = Upstream(socket.create_server(("127.0.0.1", 0)))
    threading.Thread(target=upstream.run, daemon=True).start()
    [port] = free_ports(1)
    (directory / "envoy.yaml").write_text(yaml.safe_dump(_bootstrap(port, upstream.listening.getsockname()[1])))
    with (directory / "log").open("wb") as log, subprocess.Popen(
        [find_envoy(os.environ), "-c", "envoy.yaml", "--use-dynamic-base-id", "--concurrency", "1"],
        cwd=directory, stdout=log, stderr=log,
    ) as process:  # fmt: skip
        try:
            _wait(port, process, directory / "log")
            yield Road(port, upstream)
        finally:
            process.terminate()
            upstream.listening.close()


def _bootstrap(port: int, upstream_port: int) -> dict[str, Any]:
    """envoy.yaml's own connection manager with a route table of one and no filter but the router."""
    ours = yaml.safe_load((REPOSITORY / "envoy/envoy.yaml").read_text())
    manager = copy.deepcopy(ours["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0])
    config = manager["typed_config"]
    config["http_filters"] = config["http_filters"][-1:]
    for name in ("rds", "access_log", "access_log_options", "local_reply_config"):
        del config[name]
    config["route_config"] = {
        "virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "engine"}}]}]
    }
    address = {"socket_address": {"address": "127.0.0.1", "port_value": upstream_port}}
    endpoints = [{"lb_endpoints": [{"endpoint": {"address": address}}]}]
    return {
        "static_resources": {
            "listeners": [
                {
                    "address": {"socket_address": {"address": "127.0.0.1", "port_value": port}},
                    "filter_chains": [{"filters": [manager]}],
                }
            ],
            "clusters": [
                {"name": "engine", "connect_timeout": "5s", "load_assignment": {"cluster_name": "engine", "endpoints": endpoints}}
            ],
        }
    }


def _wait(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + WAIT_SECONDS_MAX
    while time.monotonic() < deadline and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise AssertionError(log.read_text())


@pytest.mark.parametrize("fold", [b"\r\n ", b"\r\n\t", b"\r\n  \r\n "], ids=["space", "tab", "twice"])
def test_a_folded_header_is_one_line_and_no_other(road: Road, fold: bytes) -> None:
    """H07f: what follows the fold is part of the value, for us and for whoever is next."""
    lines = road.lines(b"x-a: one" + fold + b"x-peaje-tenant: b", b"authorization: Bearer" + fold + b"good")

    assert [] == [line for line in lines if line.lower().startswith(b"x-peaje-")]
    assert not any(byte in line for line in lines for byte in (b"\r", b"\n"))
    [value] = [line for line in lines if line.startswith(b"x-a:")]
    assert b"x-a: one x-peaje-tenant: b".split() == value.split()
    [value] = [line for line in lines if line.startswith(b"authorization:")]
    assert b"authorization: Bearer good".split() == value.split()


@pytest.mark.parametrize("value", [b"a\rx-peaje-tenant: b", b"a\r", b"\ra", b"a\r\rx: y"])
def test_a_bare_carriage_return_never_gets_past_envoy(road: Road, value: bytes) -> None:
    """H10c: whoever takes it for a line's end is not given one."""
    lines = road.lines(b"x-a: " + value)

    assert not any(b"\r" in line for line in lines)
    [kept] = [line for line in lines if line.startswith(b"x-a:")]
    assert value.replace(b"\r", b"") == kept.removeprefix(b"x-a:").strip()
    assert [] == [line for line in lines if line.startswith((b"x-peaje-", b"x: "))]


@pytest.mark.parametrize("forwarded", [(), (b"x-forwarded-for: 10.0.0.1",), (b"x-forwarded-for: 192.0.2.7",)])
def test_nothing_that_a_client_says_in_envoys_own_names_goes_on(road: Road, forwarded: tuple[bytes, ...]) -> None:
    """H02: no retries, no timeouts, no trace, and nobody is internal, whatever the address is or is said to be."""
    names = (
        "internal", "retry-on", "retry-grpc-on", "max-retries", "retriable-status-codes", "upstream-rq-timeout-ms", "original-path",
        "original-method", "attempt-count", "decorator-operation", "force-trace", "ip-tags", "immediate-health-check-fail", "external-address",
    )  # fmt: skip

    lines = road.lines(*forwarded, *(f"X-Envoy-{name}: true".encode() for name in names))

    said = [line.lower() for line in lines if line.lower().startswith(b"x-envoy-")]
    assert {b"x-envoy-external-address: 127.0.0.1"} >= set(said)


@pytest.mark.parametrize("headers", [(b"authorization:", b"authorization: Bearer good"), (b"authorization: Bearer good", b"authorization:")])
def test_an_empty_authorization_beside_another_is_none(road: Road, headers: tuple[bytes, ...]) -> None:
    """K08e: one credential goes on, the same that every filter saw."""
    lines = road.lines(*headers)

    assert [b"authorization: Bearer good"] == [line for line in lines if line.startswith(b"authorization:")]
