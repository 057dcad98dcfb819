# SPDX-License-Identifier: Apache-2.0
"""What `publish` writes, in a real Envoy: chosen by model, stripped, closed, and swapped while it runs."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from chassis.errors import Invalid
from control.envoy_resources import publish
from tests.integration.behind_envoy import running_envoy
from tests.waiting import until

#: Names the model by a header, in place of the gate, which reads it from the body.
NAMES_THE_MODEL = {
    "name": "gate",
    "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.filters.http.lua.v3.Lua",
        "default_source_code": {
            "inline_string": """
              function envoy_on_request(handle)
                handle:streamInfo():dynamicMetadata():set('peaje.request', 'model', handle:headers():get('x-test-model') or '')
                handle:clearRouteCache()
              end
            """
        },
    },
}


@dataclass
class Server:
    """A model server that answers with its own name and remembers what it was sent."""

    name: str
    port: int = 0
    seen: list[dict[str, str]] = field(default_factory=list)

    def start(self) -> ThreadingHTTPServer:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                # Its health, as each kind of engine shows it.
                self._answer(b'{"data": [{"id": "tiny"}]}')

            def do_POST(self) -> None:
                length = int(self.headers["content-length"])
                self.rfile.read(length)
                outer.seen.append({name.lower(): value for name, value in self.headers.items()})
                self._answer(outer.name.encode())

            def _answer(self, body: bytes) -> None:
                self.send_response(200)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = server.server_address[1]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server


@dataclass
class Road:
    """A running Envoy and the two servers behind it."""

    url: str
    models: Path
    directory: Path
    tiny: Server
    big: Server

    def ask(self, path: str, model: str | None, **options: object) -> httpx.Response:
        headers = {"x-test-model": model} if model is not None else {}
        headers |= {"authorization": "Bearer secret", "x-api-key": "secret", "accept-encoding": "gzip"}
        return httpx.post(self.url + path, headers=headers, content=options.get("content", b"{}"), timeout=10)  # type: ignore[arg-type]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Road]:
    home = tmp_path_factory.mktemp("road")
    (home / "envoy").mkdir()
    tiny, big = Server("tiny"), Server("big")
    servers = [tiny.start(), big.start()]
    models = home / "models.yaml"
    models.write_text(
        f"models:\n- {{name: tiny, engine: dynamo, endpoints: ['127.0.0.1:{tiny.port}']}}\n"
        f"- {{name: 'org/big:7b', engine: vllm, endpoints: ['http://localhost:{big.port}']}}\n"
    )
    publish(models, home / "envoy")
    try:
        with running_envoy(home, [NAMES_THE_MODEL]) as (url, _):
            yield Road(url=url, models=models, directory=home / "envoy", tiny=tiny, big=big)
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/messages"])
@pytest.mark.parametrize(("model", "pool"), [("tiny", "tiny"), ("org/big:7b", "big")])
def test_each_path_goes_to_the_pool_of_its_model(road: Road, path: str, model: str, pool: str) -> None:
    """The body's model, read by the gate, chooses the servers."""
    assert pool == road.ask(path + "?beta=1", model).text


def test_a_model_server_sees_no_credential_and_no_choice_of_encoding(road: Road) -> None:
    """A tenant's key is none of the engine's business; a compressed answer could not be metered."""
    road.ask("/v1/chat/completions", "tiny")

    seen = road.tiny.seen[-1]
    assert set() == {"authorization", "x-api-key", "accept-encoding"} & set(seen)
    assert "127.0.0.1" == seen["host"]


@pytest.mark.parametrize("model", ["Tiny", "tin", "org/big", "", None])
def test_another_model_is_a_404_and_reaches_no_server(road: Road, model: str | None) -> None:
    """Only exact names reach a server; the body is written by envoy.yaml's local replies, not by the table."""
    before = len(road.tiny.seen)

    openai = road.ask("/v1/chat/completions", model)
    anthropic = road.ask("/v1/messages", model)

    assert (404, 404) == (openai.status_code, anthropic.status_code)
    assert before == len(road.tiny.seen)


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/models/tiny", "/v1/chat/completions/", "/V1/chat/completions", "/metrics", "/v1/chat/completionsX"])
def test_any_other_path_does_not_exist(road: Road, path: str) -> None:
    """A route without a meter would give tokens away."""
    answer = road.ask(path, "tiny")

    error = answer.json()["error"]
    assert 404 == answer.status_code
    assert "application/json" == answer.headers["content-type"]
    assert ("Unknown path.", "invalid_request_error", None, "not_found") == tuple(error[k] for k in ("message", "type", "param", "code"))


def test_the_list_of_models_is_never_asked_of_a_server(road: Road) -> None:
    """The tap answers it before the router; without the tap it is a 404, not some server's own list."""
    assert 404 == road.ask("/v1/models", "tiny").status_code


def test_a_new_model_is_served_without_a_restart_and_a_bad_document_changes_nothing(road: Road) -> None:
    """Envoy notices the renamed files."""
    before = road.models.read_text()
    road.models.write_text(before + f"- {{name: fresh, engine: trtllm, endpoints: ['127.0.0.1:{road.big.port}']}}\n")
    publish(road.models, road.directory)

    until(lambda: road.ask("/v1/completions", "fresh").status_code == 200)
    assert "big" == road.ask("/v1/completions", "fresh").text

    files = {path.name: path.read_text() for path in road.directory.iterdir()}
    road.models.write_text("models: []\n")
    with pytest.raises(Invalid, match="at least one model"):
        publish(road.models, road.directory)
    assert files == {path.name: path.read_text() for path in road.directory.iterdir()}


def test_a_server_that_is_not_there_is_503_not_a_hang(road: Road) -> None:
    """Connect failures are retried once and then said."""
    road.models.write_text(f"models:\n- {{name: gone, engine: vllm, endpoints: ['127.0.0.1:{free_port()}']}}\n")
    publish(road.models, road.directory)
    until(lambda: road.ask("/v1/completions", "gone").status_code != 404)

    started = time.monotonic()
    assert 503 == road.ask("/v1/completions", "gone").status_code
    assert time.monotonic() - started < 3


def test_the_same_document_writes_the_same_files(road: Road, tmp_path: Path) -> None:
    """Two gateways with one document agree, and a republish is no new version."""
    models = tmp_path / "models.yaml"
    models.write_text("models:\n- {name: a, engine: vllm, endpoints: ['127.0.0.1:1']}\n")
    texts = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        publish(models, tmp_path / name)
        texts.append({path.name: path.read_text() for path in (tmp_path / name).iterdir()})

    assert texts[0] == texts[1]
    assert {"clusters.yaml", "routes.yaml"} == set(texts[0])
    assert json.dumps(texts[0])
