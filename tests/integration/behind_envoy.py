# SPDX-License-Identifier: Apache-2.0
"""A real Envoy on the clusters and routes that control writes, with few filters of the road and servers that remember."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
import yaml

from chassis.errors import PeajeError
from control.apply import Desk, apply
from control.envoy_admin import Admin
from control.envoy_resources import publish
from control.laptop.binaries import find_envoy
from control.laptop.envoy import find_source
from control.laptop.places import Places
from tests.dataplane.installation import free_ports
from tests.waiting import until

_EXTENSIONS: Final = "type.googleapis.com/envoy.extensions"
ROUTER: Final = {"name": "router", "typed_config": {"@type": f"{_EXTENSIONS}.filters.http.router.v3.Router"}}
GATE: Final = {
    "name": "gate",
    "typed_config": {"@type": f"{_EXTENSIONS}.filters.http.lua.v3.Lua", "default_source_code": {"filename": "envoy/gate.lua"}},
}


def road_filter(name: str) -> dict[str, Any]:
    """The filter of this name as the repository's own envoy.yaml has it."""
    bootstrap = yaml.safe_load((find_source(os.environ) / "envoy.yaml").read_text())
    manager = bootstrap["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    [found] = [one for one in manager["http_filters"] if one["name"] == name]
    return dict(found)


def bootstrap(port: int, admin_port: int, filters: Sequence[dict[str, Any]]) -> str:
    """Envoy's own configuration: what is watched is what control writes, the filters are *filters* and the router."""

    def watched(name: str) -> dict[str, Any]:
        return {"resource_api_version": "V3", "path_config_source": {"path": f"envoy/{name}.yaml", "watched_directory": {"path": "envoy"}}}

    def address(number: int) -> dict[str, Any]:
        return {"socket_address": {"address": "127.0.0.1", "port_value": number}}

    strip = {
        "name": "strip",
        "typed_config": {
            "@type": f"{_EXTENSIONS}.http.early_header_mutation.header_mutation.v3.HeaderMutation",
            "mutations": [{"remove_on_match": {"key_matcher": {"prefix": "x-peaje-", "ignore_case": True}}}],
        },
    }
    manager = {
        "@type": f"{_EXTENSIONS}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "tenants",
        "early_header_mutation_extensions": [strip],
        "rds": {"route_config_name": "tenants", "config_source": watched("routes")},
        "http_filters": [*filters, ROUTER],
    }
    chain = {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
    document = {
        "node": {"id": "test", "cluster": "test"},
        "admin": {"address": address(admin_port)},
        "dynamic_resources": {"cds_config": watched("clusters")},
        "static_resources": {"clusters": [], "listeners": [{"name": "tenants", "address": address(port), "filter_chains": [chain]}]},
    }
    return yaml.safe_dump(document, sort_keys=False)


@contextmanager
def running_envoy(home: Path, filters: Sequence[dict[str, Any]]) -> Iterator[tuple[str, Desk]]:
    """Envoy in *home*, where `envoy/clusters.yaml` and `routes.yaml` are already: its address, and who applies there."""
    try:
        envoy = find_envoy(os.environ)
    except PeajeError as exc:
        pytest.skip(str(exc))
    port, admin_port = free_ports(2)
    (home / "envoy/envoy.yaml").write_text(bootstrap(port, admin_port, filters))
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(
            [envoy, "-c", "envoy/envoy.yaml", "--concurrency", "1", "--use-dynamic-base-id", "-l", "warning"],
            cwd=home, stdout=log, stderr=log,
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        until(lambda: _is_up(url) or process.poll() is not None, (home / "log").read_text)
        assert process.poll() is None, (home / "log").read_text()[-3000:]
        yield url, Desk(places=Places(home), envoy=envoy, admin=Admin(f"http://127.0.0.1:{admin_port}"))
    finally:
        process.terminate()
        process.wait(timeout=20)


def _is_up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/nothing", timeout=2).status_code == 404
    except httpx.HTTPError:
        return False


class _Listening(ThreadingHTTPServer):
    daemon_threads = True
    #: Its port is taken again by the test that brings it back.
    allow_reuse_address = True


@dataclass
class Server:
    """A model server that says who it is, remembers what it was sent, and can be held up or switched off."""

    name: str
    port: int
    seen: list[tuple[dict[str, str], Any]] = field(default_factory=list)
    goes_on: threading.Event = field(default_factory=threading.Event)
    #: Sent with each answer.
    headers: dict[str, str] = field(default_factory=dict)
    _server: _Listening | None = None

    def start(self) -> None:
        """Listen."""
        outer = self
        self.goes_on.set()

        class Handler(BaseHTTPRequestHandler):
            # One request a connection: a server that is switched off has none left.
            def do_GET(self) -> None:
                self._answer(b"{}")

            def do_POST(self) -> None:
                body = json.loads(self._body())
                outer.seen.append(({name.lower(): value for name, value in self.headers.items()}, body))
                outer.goes_on.wait(timeout=30)
                self._answer(outer.name.encode())

            def _body(self) -> bytes:
                if self.headers.get("transfer-encoding") != "chunked":
                    return self.rfile.read(int(self.headers["content-length"]))
                pieces = []
                while length := int(self.rfile.readline(), 16):
                    pieces.append(self.rfile.read(length))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(pieces)

            def _answer(self, body: bytes) -> None:
                self.send_response(200)
                self.send_header("content-length", str(len(body)))
                for name, value in outer.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = _Listening(("127.0.0.1", self.port), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        """Listen no more."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None


@dataclass
class Road:
    """A running Envoy, and the servers behind it."""

    url: str
    desk: Desk
    servers: tuple[Server, Server, Server]

    def serve(self, *models: dict[str, Any]) -> None:
        """Put these models into force."""
        document = self.desk.places.home / "next.yaml"
        document.write_text(yaml.safe_dump({"models": list(models)}))
        apply(self.desk, document)
        for server in self.servers:
            server.seen.clear()

    def ask(self, model: str, prompt: str = "hi", **more: Any) -> httpx.Response:
        """One request of a caller with a key of ours."""
        headers = {"authorization": "Bearer callers-own"} | more.pop("headers", {})
        return httpx.post(f"{self.url}/v1/completions", headers=headers, json={"model": model, "prompt": prompt, **more}, timeout=30)

    def endpoint(self, number: int) -> str:
        """Where a server listens."""
        return f"127.0.0.1:{self.servers[number].port}"

    def pool(self, name: str, *servers: int, **more: Any) -> dict[str, Any]:
        """A pool of these servers, whose `/health` is well while they listen."""
        return {"name": name, "engine": "vllm", "endpoints": [self.endpoint(one) for one in servers], **more}


@contextmanager
def road_behind(home: Path, *filters: dict[str, Any]) -> Iterator[Road]:
    """Envoy in *home* with the gate and *filters* before the router, nobody else who is asked, and three servers."""
    for name in ("run", "secrets", "journal"):
        (home / name).mkdir()
    for path in (source := find_source(os.environ)).rglob("*.lua"):
        target = home / "envoy" / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(path.read_text())
    ports = free_ports(3)
    servers = (Server("first", ports[0]), Server("second", ports[1]), Server("third", ports[2]))
    for server in servers:
        server.start()
    (home / "envoy/models.yaml").write_text(f'models: [{{name: none, engine: vllm, endpoints: ["127.0.0.1:{ports[0]}"]}}]\n')
    publish(home / "envoy/models.yaml", home / "envoy")
    try:
        with running_envoy(home, (GATE, *filters)) as (url, desk):
            yield Road(url, desk, servers)
    finally:
        for server in servers:
            server.stop()
