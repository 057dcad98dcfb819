# SPDX-License-Identifier: Apache-2.0
"""What a pod does that `up` does on one machine: lay out the state directory, follow the models, show metrics."""

from __future__ import annotations

import asyncio
import os
import stat
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
import yaml

from chassis.errors import Invalid
from chassis.secrets import load_peppers
from chassis.telemetry import traces
from control import pod

_PEPPER = "0f1e2d3c4b5a69788796a5b4c3d2e1f0" * 2
_MODELS = "models: [{name: MODEL, engine: openai, endpoints: ['127.0.0.1:1']}]\n"


@pytest.fixture
def mounts(tmp_path: Path) -> Path:
    """As the kubelet mounts a volume: names that lead through `..data` to a directory of that moment."""
    root = tmp_path / "mounts"
    _mount(root / "secrets", {"pepper-1": _PEPPER + "\n"}, mode=0o440)
    _mount(root / "models", {"models.yaml": _MODELS.replace("MODEL", "one")})
    _mount(root / "envoy", {"envoy.yaml": "node: {}\n", "gate.lua": "-- gate\n", "lua/lane.lua": "-- lane\n"})
    return root


@pytest.fixture
def shipped(tmp_path: Path) -> Path:
    """The repository's own files of Envoy, where a pod mounts them."""
    (tmp_path / "mounts").mkdir()
    (tmp_path / "mounts/envoy").symlink_to(Path(__file__).resolve().parents[2] / "envoy")
    _mount(tmp_path / "mounts/models", {"models.yaml": _MODELS.replace("MODEL", "one")})
    return tmp_path / "mounts"


def _mount(directory: Path, files: dict[str, str], *, mode: int = 0o644, moment: str = "..1") -> None:
    for name, text in files.items():
        path = directory / moment / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(mode)
    (directory / "..data_tmp").symlink_to(moment)
    os.replace(directory / "..data_tmp", directory / "..data")
    for name in {Path(name).parts[0] for name in files}:
        if not (directory / name).is_symlink():
            (directory / name).symlink_to(Path("..data") / name)


def _pools(home: Path) -> set[str]:
    return {resource["name"] for resource in yaml.safe_load((home / "envoy/clusters.yaml").read_text())["resources"]}


def test_a_pod_gets_what_up_would_have_made(tmp_path: Path, mounts: Path) -> None:
    """Envoy's files with their directories, pools of the models, an identity document, places to write."""
    home = tmp_path / "home"

    pod.prepare(home, mounts)

    assert {"envoy.yaml", "gate.lua", "lua", "models.yaml", "clusters.yaml", "routes.yaml"} == {p.name for p in (home / "envoy").iterdir()}
    assert "-- lane\n" == (home / "envoy/lua/lane.lua").read_text()
    assert {"pool/main/one"} == _pools(home)
    assert "service_accounts" in (home / "identity.yaml").read_text()
    assert (home / "run").is_dir()
    assert (home / "journal").is_dir()


def test_a_secret_that_kubernetes_opens_to_the_group_is_closed_again(tmp_path: Path, mounts: Path) -> None:
    """Ours refuse to start on one that others can read."""
    pod.prepare(tmp_path / "home", mounts)

    assert {1: bytes.fromhex(_PEPPER)} == load_peppers(tmp_path / "home")


def test_a_pepper_that_is_withdrawn_is_gone_and_signing_keys_stay(tmp_path: Path, mounts: Path) -> None:
    """On a volume that outlives the pod, whose files may have been given to the group."""
    home = tmp_path / "home"
    pod.prepare(home, mounts)
    signing = home / "secrets/signing-key-20260101T000000000000Z.pem"
    signing.write_text("a key")
    signing.chmod(0o660)
    (mounts / "secrets/pepper-1").unlink()
    _mount(mounts / "secrets", {"pepper-2": _PEPPER}, mode=0o440, moment="..2")

    pod.prepare(home, mounts)

    assert {2} == load_peppers(home).keys()
    assert 0o600 == stat.S_IMODE(signing.stat().st_mode)


def test_preparing_again_changes_nothing(tmp_path: Path, mounts: Path) -> None:
    """A pod's init containers may run again."""

    def texts() -> dict[str, str]:
        return {str(path): path.read_text() for path in (tmp_path / "home").rglob("*") if path.is_file()}

    pod.prepare(tmp_path / "home", mounts)
    before = texts()
    pod.prepare(tmp_path / "home", mounts)

    assert before == texts()


def test_the_tenants_address_is_changed_where_it_is_asked_for_and_nothing_else(tmp_path: Path, shipped: Path) -> None:
    """A container's loopback is nobody's; the admin page stays there."""
    expected = yaml.safe_load((shipped / "envoy/envoy.yaml").read_text())
    expected["static_resources"]["listeners"][0]["address"]["socket_address"]["address"] = "0.0.0.0"

    pod.prepare(tmp_path / "home", shipped, bind_address="0.0.0.0")

    assert expected == yaml.safe_load((tmp_path / "home/envoy/envoy.yaml").read_text())


def test_a_pod_that_is_told_of_a_collector_of_traces_sends_envoys_spans_there(tmp_path: Path, shipped: Path) -> None:
    """As on a laptop; prepared again, there is still one tracer."""
    bootstrap = tmp_path / "home/envoy/envoy.yaml"
    spans = traces.Settings(url="http://collector.observability:4318", percent=0.5)

    pod.prepare(tmp_path / "home", shipped, spans=spans)
    once = bootstrap.read_text()
    pod.prepare(tmp_path / "home", shipped, spans=spans)

    assert once == bootstrap.read_text()
    resources = yaml.safe_load(once)["static_resources"]
    tracer = resources["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]["tracing"]["provider"]["typed_config"]
    [cluster] = [one for one in resources["clusters"] if one["name"] == "traces"]
    [endpoint] = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]
    assert "http://collector.observability:4318/v1/traces" == tracer["http_service"]["http_uri"]["uri"]
    assert 5_000 == tracer["sampler"]["typed_config"]["sampling_percentage"]["numerator"]
    assert {"address": "collector.observability", "port_value": 4318} == endpoint["endpoint"]["address"]["socket_address"]


def test_a_pod_without_a_collector_of_traces_has_envoys_files_as_they_are(tmp_path: Path, shipped: Path) -> None:
    """Off is no tracer at all."""
    pod.prepare(tmp_path / "home", shipped, spans=traces.Settings(url=""))

    assert (shipped / "envoy/envoy.yaml").read_text() == (tmp_path / "home/envoy/envoy.yaml").read_text()


def test_spans_that_nothing_mounted_could_send_are_refused(tmp_path: Path, mounts: Path) -> None:
    """Rather than a gateway that says nothing of them."""
    with pytest.raises(Invalid, match=r"tracing\.yaml is not mounted"):
        pod.prepare(tmp_path / "home", mounts, spans=traces.Settings(url="http://collector:4318"))


def test_without_models_nothing_starts(tmp_path: Path, mounts: Path) -> None:
    """One line that names what is not mounted."""
    (mounts / "models/models.yaml").unlink()

    with pytest.raises(Invalid, match=r"models\.yaml is not mounted"):
        pod.prepare(tmp_path / "home", mounts)


def test_pools_follow_the_models_and_a_faulty_document_keeps_the_last_good_ones(tmp_path: Path, mounts: Path) -> None:
    """As the kubelet replaces a volume's content: one rename for all of it."""
    home = tmp_path / "home"
    pod.prepare(home, mounts)
    pools = pod.Pools(home)

    assert (True, False) == (pools.step(), pools.step())

    _mount(mounts / "models", {"models.yaml": _MODELS.replace("MODEL", "two")}, moment="..2")
    assert (True, False) == (pools.step(), pools.step())
    assert {"pool/main/two"} == _pools(home)

    _mount(mounts / "models", {"models.yaml": "models: []\n"}, moment="..3")
    assert not pools.step()
    assert {"pool/main/two"} == _pools(home)


def test_each_start_of_envoy_is_told_apart_and_gets_what_is_its_pods_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A container that is started again is another life: the journal must not take one for the other."""
    epochs: list[str] = []
    commands: list[list[str]] = []

    def become(program: str, command: list[str], environment: dict[str, str]) -> None:
        assert program == command[0]
        commands.append(command)
        epochs.append(environment["PEAJE_ENVOY_EPOCH"])

    monkeypatch.setattr(os, "execve", become)
    monkeypatch.setattr(os, "umask", lambda _mode: 0)
    monkeypatch.setenv("PEAJE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        pod.main(["envoy", "--concurrency", "3"])

    assert 2 == len(set(epochs))
    assert ["--concurrency", "3"] == commands[0][-2:]


@pytest.fixture
def admin() -> Iterator[int]:
    """Stands in for Envoy's admin page: says what it was asked."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(self.path.encode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


def test_metrics_leave_the_pod_and_nothing_else_of_the_admin_page(admin: int) -> None:
    """It could stop Envoy, and shows its configuration."""
    server = pod.show("127.0.0.1", 0, admin_port=admin)
    url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        assert "/stats/prometheus" == httpx.get(f"{url}/metrics").text
        assert {404} == {httpx.get(url + path).status_code for path in ("/", "/config_dump", "/stats", "/metrics?x", "/metrics/..", "/ready/")}
        assert {501} == {httpx.request(method, f"{url}/metrics").status_code for method in ("POST", "PUT", "DELETE")}
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("host", ["::1", "127.0.0.1"])
def test_metrics_are_shown_on_an_address_of_either_family(admin: int, host: str) -> None:
    """A cluster with IPv6 has the chart listen on `::`; a helper that cannot would hold up every gateway pod."""
    server = pod.show(host, 0, admin_port=admin)
    try:
        address = f"[{host}]" if ":" in host else host
        assert "/stats/prometheus" == httpx.get(f"http://{address}:{server.server_address[1]}/metrics").text
    finally:
        server.shutdown()
        server.server_close()


def test_an_envoy_that_is_away_is_said_to_be(admin: int) -> None:
    """503, for whoever looks at targets."""
    del admin
    server = pod.show("127.0.0.1", 0, admin_port=1)
    try:
        assert 503 == httpx.get(f"http://127.0.0.1:{server.server_address[1]}/metrics").status_code
    finally:
        server.shutdown()
        server.server_close()


def test_a_pod_that_is_to_go_drains_as_long_as_it_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And a little in any case: others have yet to hear of it."""
    asked: list[tuple[str, float]] = []
    slept: list[float] = []

    async def drain(admin: str, *, seconds: float) -> None:
        asked.append((admin, seconds))

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(pod, "drain", drain)
    monkeypatch.setattr(asyncio, "sleep", sleep)
    monkeypatch.setattr(os, "umask", lambda _mode: 0)
    monkeypatch.setenv("PEAJE_HOME", str(tmp_path))
    monkeypatch.setenv("PEAJE_POD_DRAIN_SECONDS", "3600")
    monkeypatch.setenv("PEAJE_ADMIN_PORT", "9999")
    monkeypatch.chdir(tmp_path)

    pod.main(["drain"])

    assert [("http://127.0.0.1:9999", 3600.0)] == asked
    assert [5.0] == slept


def test_an_unknown_word_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With those that are known."""
    monkeypatch.setattr(os, "umask", lambda _mode: 0)
    monkeypatch.setenv("PEAJE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)

    with pytest.raises(Invalid, match="prepare, pools, envoy, drain"):
        pod.main(["start"])
