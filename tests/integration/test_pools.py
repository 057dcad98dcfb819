# SPDX-License-Identifier: Apache-2.0
"""What a server of a pool is sent, and which server: the real gate and a real Envoy, in front of servers that remember."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
import yaml

from chassis.errors import Invalid, PeajeError
from chassis.models import ModelCatalogue
from control.apply import Desk, apply, judge
from control.envoy_admin import Admin
from control.envoy_resources import publish, render_all
from control.laptop.binaries import find_envoy
from control.laptop.envoy import find_source
from control.laptop.places import Places
from tests.dataplane.installation import free_ports
from tests.waiting import until

BOOTSTRAP = """
node: {id: test, cluster: test}
admin: {address: {socket_address: {address: 127.0.0.1, port_value: %d}}}
dynamic_resources:
  cds_config: {resource_api_version: V3, path_config_source: {path: envoy/clusters.yaml, watched_directory: {path: envoy}}}
static_resources:
  clusters: []
  listeners:
  - name: tenants
    address: {socket_address: {address: 127.0.0.1, port_value: %d}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: tenants
          early_header_mutation_extensions:
          - name: strip
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.http.early_header_mutation.header_mutation.v3.HeaderMutation
              mutations: [{remove_on_match: {key_matcher: {prefix: x-peaje-, ignore_case: true}}}]
          rds:
            route_config_name: tenants
            config_source: {resource_api_version: V3, path_config_source: {path: envoy/routes.yaml, watched_directory: {path: envoy}}}
          http_filters:
          - name: gate
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.lua.v3.Lua
              default_source_code: {filename: envoy/gate.lua}
          - {name: router, typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
"""
SECRET = "upstream-0123456789-abcdefghijklmnopq"


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
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                outer.seen.append(({name.lower(): value for name, value in self.headers.items()}, body))
                outer.goes_on.wait(timeout=30)
                self._answer(outer.name.encode())

            def _answer(self, body: bytes) -> None:
                self.send_response(200)
                self.send_header("content-length", str(len(body)))
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

    def pool(self, name: str, *servers: int, **more: Any) -> dict[str, Any]:
        """A pool of these servers, whose `/health` is well while they listen."""
        return {"name": name, "engine": "vllm", "endpoints": [f"127.0.0.1:{self.servers[one].port}" for one in servers], **more}


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Road]:
    """Envoy with the gate and the router, nobody who is asked."""
    try:
        envoy = find_envoy(os.environ)
    except PeajeError as exc:
        pytest.skip(str(exc))
    home = tmp_path_factory.mktemp("pools")
    for name in ("run", "secrets", "journal"):
        (home / name).mkdir()
    for path in (source := find_source(os.environ)).rglob("*.lua"):
        target = home / "envoy" / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(path.read_text())
    port, admin_port, *ports = free_ports(5)
    servers = (Server("first", ports[0]), Server("second", ports[1]), Server("third", ports[2]))
    for server in servers:
        server.start()
    (home / "envoy/envoy.yaml").write_text(BOOTSTRAP % (admin_port, port))
    (home / "envoy/models.yaml").write_text(f'models: [{{name: none, engine: vllm, endpoints: ["127.0.0.1:{ports[0]}"]}}]\n')
    publish(home / "envoy/models.yaml", home / "envoy")
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(
            [envoy, "-c", "envoy/envoy.yaml", "--concurrency", "1", "--use-dynamic-base-id", "-l", "warning"],
            cwd=home, stdout=log, stderr=log,
        )  # fmt: skip
    road = Road(f"http://127.0.0.1:{port}", Desk(places=Places(home), envoy=envoy, admin=Admin(f"http://127.0.0.1:{admin_port}")), servers)
    try:
        until(lambda: _is_up(road.url), (home / "log").read_text)
        yield road
    finally:
        process.terminate()
        process.wait(timeout=20)
        for server in servers:
            server.stop()


def _is_up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/nothing", timeout=2).status_code == 404
    except httpx.HTTPError:
        return False


def test_an_alias_is_its_model_and_each_server_has_its_own_name_for_it(road: Road) -> None:
    """Only the name differs; who asks for another model is not served by the alias' pools."""
    road.serve({"name": "org/m", "aliases": ["default"], "pools": [road.pool("main", 0, model='m"2"')]})

    answers = [road.ask(name, stream=False) for name in ("default", "org/m")]

    assert ["first", "first"] == [answer.text for answer in answers]
    assert [{"model": 'm"2"', "prompt": "hi", "stream": False}] * 2 == [body for _, body in road.servers[0].seen]
    assert 404 == road.ask('m"2"').status_code
    assert 404 == road.ask("Default").status_code


def test_a_large_body_is_named_as_well(road: Road) -> None:
    """Larger than what one connection may buffer."""
    road.serve({"name": "m", "aliases": ["a"], "pools": [road.pool("main", 0)]})

    assert 200 == road.ask("a", "x" * 5_000_000).status_code

    [(headers, body)] = road.servers[0].seen
    assert ("m", 5_000_000) == (body["model"], len(body["prompt"]))
    assert int(headers["content-length"]) == len(json.dumps(body, separators=(",", ":")))


def test_a_credential_goes_to_its_own_pool_and_is_shown_nowhere(road: Road) -> None:
    """Also where both are one chain; a new one is taken when it is applied."""
    file = road.desk.places.home / "secrets/rented"
    file.write_text(SECRET)
    file.chmod(0o600)
    model = {
        "name": "m",
        "pools": [road.pool("main", 0), road.pool("rented", 1, fallback=True, credential_file="secrets/rented", model="theirs")],
    }
    road.serve(model)
    own, rented, _ = road.servers

    assert "first" == road.ask("m").text
    own.stop()
    until(lambda: road.ask("m").text == "second")
    file.write_text(f"{SECRET[::-1]}\n")  # as an editor leaves it
    road.serve(model)
    assert "second" == road.ask("m").text

    assert "Bearer " + SECRET[::-1] == rented.seen[-1][0]["authorization"]
    assert {"theirs"} == {body["model"] for _, body in rented.seen}
    own.start()
    until(lambda: road.ask("m").text == "first")
    assert own.seen
    assert [] == [headers for headers, _ in own.seen if "authorization" in headers]
    assert [] == [name for headers, _ in own.seen + rented.seen for name in headers if name.startswith("x-peaje-")]
    shown = [httpx.get(f"{road.desk.admin.url}/{page}").text for page in ("config_dump?include_eds", "stats", "clusters")]  # type: ignore[union-attr]
    shown += [path.read_text() for path in (road.desk.places.home / "envoy").rglob("*.yaml")]
    assert [] == [text for text in shown if SECRET in text or SECRET[::-1] in text]


@pytest.mark.parametrize("affinity", [{"header": "x-session-id"}, {"prefix_bytes": 64}], ids=["session", "prompt"])
def test_what_belongs_together_stays_at_one_server(road: Road, affinity: dict[str, Any]) -> None:
    """Also over the weights of pools; what does not is spread over all. No server sees how that is decided."""
    road.serve({"name": "m", "affinity": affinity, "pools": [road.pool("main", 0, 1, weight=2), road.pool("canary", 2)]})

    def ask(number: int, turn: int) -> str:
        prompt = (f"conversation {number} " + "." * 100)[:80] + f" turn {turn}"
        return road.ask("m", prompt, headers={"x-session-id": f"s{number}"} if "header" in affinity else {}).text

    answers = {number: {ask(number, turn) for turn in range(3)} for number in range(30)}

    assert {1} == {len(names) for names in answers.values()}
    assert {"first", "second", "third"} == set().union(*answers.values())
    assert [] == [name for server in road.servers for headers, _ in server.seen for name in headers if name.startswith("x-peaje-")]


def test_a_full_pool_refuses_at_once_and_the_next_pool_is_not_its_overflow(road: Road) -> None:
    """`requests_max` under way, and the next one hears it; when they are answered there is room."""
    road.serve({"name": "m", "pools": [road.pool("main", 0, requests_max=2), road.pool("rented", 1, fallback=True)]})
    first = road.servers[0]
    first.goes_on.clear()

    with ThreadPoolExecutor(2) as callers:
        under_way = [callers.submit(road.ask, "m") for _ in range(2)]
        until(lambda: len(first.seen) == 2)
        refused = road.ask("m")
        first.goes_on.set()

    assert 503 == refused.status_code
    assert ["first", "first"] == [one.result().text for one in under_way]
    assert Counter({"first": 5}) == Counter(road.ask("m").text for _ in range(5))


def test_more_output_than_the_engines_generate_is_refused_before_anybody_is_asked(road: Road) -> None:
    """At the bound, and one above."""
    road.serve({"name": "m", "output_tokens_max": 100, "aliases": ["a"], "pools": [road.pool("main", 0)]})

    assert (200, 200, 400) == tuple(road.ask("a", max_tokens=most).status_code for most in (1, 100, 101))
    error = road.ask("m", max_tokens=101).json()["error"]
    assert ("invalid_request", "This model generates at most 100 tokens.") == (error["code"], error["message"])
    assert 2 == len(road.servers[0].seen)


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [("clusters", "consecutive_gateway_failure:", "consecutive_gateway_failures:"), ("routes", "pool/main/m", "pool/main/n")],
    ids=["a field that Envoy would ignore", "a route to no pool"],
)
def test_envoy_judges_what_its_own_check_never_opens(road: Road, file: str, old: str, new: str) -> None:
    """The files that it watches, as strictly as its bootstrap."""
    models = ModelCatalogue.parse({"models": [{"name": "m", "engine": "vllm", "endpoints": ["127.0.0.1:1"]}]}, source="x")
    rendered = render_all(models, road.desk.places.home)

    judge(road.desk.envoy, road.desk.places, rendered)
    with pytest.raises(Invalid, match=r"^Envoy refuses what the models document means: "):
        judge(road.desk.envoy, road.desk.places, replace(rendered, **{file: getattr(rendered, file).replace(old, new)}))
