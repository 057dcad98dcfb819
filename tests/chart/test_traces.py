# SPDX-License-Identifier: Apache-2.0
"""Traces in a cluster: one value has Envoy, the services and the collector send their spans, and nobody else."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
import yaml
from helm_python.errors import HelmError

from chassis import contract
from chassis.errors import Invalid
from chassis.keys import mint
from chassis.telemetry import traces
from control import pod
from control.envoy_tracing import add_tracing
from control.laptop.binaries import find_envoy
from tests.certificates import Authority
from tests.chart.rendering import (
    CHART,
    REPOSITORY,
    Object,
    containers,
    environment,
    envoy_files,
    find,
    mount_documents,
    render,
)
from tests.integration.ports import free_ports
from tests.otlp import collecting_traces

_URL: Final = "http://otel-collector.observability:4318"
#: What sends spans, besides Envoy, whose files `prepare` lays out.
_SENDERS: Final = {"extauth", "ratelimit", "metering", "collector"}
_PATIENCE_SECONDS: Final = 30


def _traced(placement: str, **values: Any) -> list[Object]:
    return render({"placement": placement, "traces": {"url": _URL} | values})


def _container(objects: list[Object], name: str) -> Any:
    """The one of that name; of `prepare`, the gateway's."""
    return next(one for where, one, _ in containers(objects) if one["name"] == name and (name != "prepare" or "gateway" in where))


@pytest.mark.parametrize("placement", ["separate", "sidecar"])
def test_whoever_has_spans_is_told_where_to_send_them(placement: str) -> None:
    """And nobody else; how many is Envoy's alone to know, which decides."""
    told = {
        (where if one["name"] == "prepare" else one["name"]): {name: value for name, value in environment(one).items() if "TRACES" in name}
        for where, one, _ in containers(_traced(placement, percent=0.25))
    }

    expected: dict[str, dict[str, str]] = {name: {"PEAJE_TRACES_URL": _URL} for name in _SENDERS}
    expected["StatefulSet/peaje-gateway/prepare"] = {"PEAJE_TRACES_URL": _URL, "PEAJE_TRACES_PERCENT": "0.25"}
    assert expected == {name: variables for name, variables in told.items() if variables}


@pytest.mark.parametrize("values", [{}, {"traces": {"url": "", "percent": 100}}, {"traces": None}], ids=["default", "empty", "no block"])
def test_without_an_address_nothing_speaks_of_traces(values: dict[str, Any]) -> None:
    """Also with the values of a release that had no such block (`--reuse-values`)."""
    objects = render(values)

    assert "TRACES" not in json.dumps([one for one in objects if one["kind"] != "ConfigMap"])
    assert "tracing.yaml" not in envoy_files(objects)
    assert objects == render({})


@pytest.mark.parametrize("placement", ["separate", "sidecar"])
def test_envoys_tracer_is_the_laptops_byte_for_byte(placement: str) -> None:
    """Beside envoy.yaml, which is as it is without."""
    files = envoy_files(_traced(placement))

    assert (REPOSITORY / "envoy/tracing.yaml").read_text() == files.pop("tracing.yaml")
    assert envoy_files(render({"placement": placement})) == files


def test_a_new_tracer_of_a_later_chart_replaces_the_pods(tmp_path: Path) -> None:
    """It is read once, when a pod starts; with traces off, it is no reason to end a stream."""
    later = tmp_path / "peaje"
    shutil.copytree(CHART, later)  # follows the links
    with (later / "files/envoy/tracing.yaml").open("a") as tracing:
        tracing.write("# later\n")

    def template(values: dict[str, Any], chart: Path) -> Any:
        return find(render(values, chart=chart), "StatefulSet", "peaje-gateway")["spec"]["template"]

    traced = {"traces": {"url": _URL}}
    assert template(traced, CHART) != template(traced, later)
    assert template({}, CHART) == template({}, later)


_TAKEN: Final = ("http://collector", _URL, f"{_URL}/", "http://10.1.2.3:80", "http://[fd00::1]:4318", "http://collector:65535/otlp")
_REFUSED: Final = (
    "collector:4318", "//collector", "http://", "/v1/traces", "http://here:99999", "http://here:0", "http://[::1", "ftp://here",
    "http://here?key=1", "http://here#there", "http://me:s3cret@here", "https://here:4318",
)  # fmt: skip


@pytest.mark.parametrize("url", _TAKEN)
def test_an_address_that_the_chart_takes_is_one_for_envoy(url: str) -> None:
    """What installs must not fail in a pod."""
    files = envoy_files(render({"traces": {"url": url}}))

    add_tracing(yaml.safe_load(files["envoy.yaml"]), yaml.safe_load(files["tracing.yaml"]), traces.Settings(url=url))


@pytest.mark.parametrize("url", _REFUSED)
def test_an_address_that_envoy_could_not_use_is_refused_by_the_chart(url: str) -> None:
    """By its name, before anything is installed; the pod would refuse it too."""
    files = envoy_files(_traced("separate"))

    with pytest.raises(HelmError, match=r"traces[./]url"):
        render({"traces": {"url": url}})
    with pytest.raises(Invalid, match="PEAJE_TRACES_URL"):
        add_tracing(yaml.safe_load(files["envoy.yaml"]), yaml.safe_load(files["tracing.yaml"]), traces.Settings(url=url))


def test_an_address_by_tls_is_refused_with_what_to_do_instead() -> None:
    """Silence would be spans in the clear, or none."""
    with pytest.raises(HelmError, match=r"traces\.url is https.*Name a collector in the cluster"):
        render({"traces": {"url": "https://otel.example.com"}})


@pytest.mark.parametrize("percent", [-0.1, 100.1, "1"])
def test_what_is_no_share_is_refused(percent: Any) -> None:
    """As above."""
    with pytest.raises(HelmError, match="traces/percent"):
        render({"traces": {"url": _URL, "percent": percent}})


@pytest.mark.parametrize("service", sorted(_SENDERS))
def test_what_a_service_is_told_has_it_send_its_spans(service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what the container's environment says, to a collector that listens there."""
    [port] = free_ports(1)
    trace, caller = secrets.token_hex(16), secrets.token_hex(8)
    objects = render({"traces": {"url": f"http://127.0.0.1:{port}"}})
    for name, value in environment(_container(objects, service)).items():
        monkeypatch.setenv(name, value)

    with collecting_traces(port) as collected:
        traces.configure(service)
        try:
            with traces.serving("/a.Service/Call", lambda: [("traceparent", f"00-{trace}-{caller}-01")]):
                pass
        finally:
            traces.stop()

    assert [(f"peaje-{service}", caller)] == [(span.service, span.parent_id) for span in collected.of(trace)]


def _prepare(objects: list[Object], tmp_path: Path) -> Path:
    """What the gateway's init container does, by the command and the environment that it has; only directories are ours."""
    home, mounts = tmp_path / "home", tmp_path / "mounts"
    home.mkdir()
    mount_documents(objects, mounts)
    container = _container(objects, "prepare")
    told = environment(container) | {"PEAJE_HOME": str(home), "PEAJE_POD_MOUNTS": str(mounts)}
    assert "python" == container["command"][0]
    answer = subprocess.run(
        [sys.executable, *container["command"][1:]], cwd=REPOSITORY, env=told, capture_output=True, text=True, timeout=60, check=False
    )
    assert 0 == answer.returncode, answer.stderr
    return home


def test_envoy_takes_the_tracer_beside_the_services_certificates(tmp_path: Path) -> None:
    """Envoy's own validation; the collector's cluster is none of those that are asked by mutual TLS."""
    home = _prepare(_traced("separate"), tmp_path)
    Authority.make().fill(home / "tls", "gateway")

    answer = subprocess.run(
        [find_envoy(os.environ), "--mode", "validate", "-c", "envoy/envoy.yaml", "--log-level", "error"],
        cwd=home, capture_output=True, text=True, timeout=60, check=False, env={"PEAJE_ENVOY_EPOCH": "x"},
    )  # fmt: skip

    assert 0 == answer.returncode, answer.stderr[-2000:]
    clusters = {one["name"]: "transport_socket" in one for one in yaml.safe_load((home / "envoy/envoy.yaml").read_text())["static_resources"]["clusters"]}
    assert {"extauth": True, "ratelimit": True, "metering": True, "traces": False} == clusters


@contextmanager
def _envoy(home: Path, *, tenants: int, admin: int) -> Iterator[None]:
    """Envoy as the pod runs it; only ports are changed, because this machine may have others that use them."""
    path = home / "envoy/envoy.yaml"
    bootstrap = yaml.safe_load(path.read_text())
    bootstrap["admin"]["address"]["socket_address"]["port_value"] = admin
    bootstrap["static_resources"]["listeners"][0]["address"]["socket_address"] = {"address": "127.0.0.1", "port_value": tenants}
    path.write_text(yaml.safe_dump(bootstrap, sort_keys=False))
    with (home / "envoy.log").open("w") as log:
        command = pod.envoy_command(["--concurrency", "1"], find_envoy(os.environ))
        process = subprocess.Popen(command, cwd=home, env={contract.EPOCH_ENVIRONMENT: "x"}, stdout=log, stderr=log)
        try:
            yield
        finally:
            process.terminate()
            process.wait(20)


def _until(ask: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < deadline:
        try:
            if (answer := ask()) is not None:
                return answer
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    pytest.fail(f"not within {_PATIENCE_SECONDS} s: {what}")


@pytest.mark.xdist_group("mutual-tls")
def test_a_gateway_pod_sends_envoys_spans_to_the_collector(tmp_path: Path) -> None:
    """A real Envoy on what the init container made of the chart: the caller's trace goes on, and the journal names it."""
    tenants, admin, port = free_ports(3)
    trace, caller = secrets.token_hex(16), secrets.token_hex(8)
    home = _prepare(render({"placement": "sidecar", "traces": {"url": f"http://127.0.0.1:{port}", "percent": 100}}), tmp_path)
    headers = {"traceparent": f"00-{trace}-{caller}-00", "authorization": f"Bearer {mint('live', secrets.token_bytes).key}"}

    with collecting_traces(port) as collected, _envoy(home, tenants=tenants, admin=admin):
        answer = _until(
            lambda: httpx.post(
                f"http://127.0.0.1:{tenants}/v1/chat/completions?key=secret-in-the-query",
                json={"model": "example", "messages": []}, headers=headers,
            ),
            "Envoy listens",
        )  # fmt: skip
        spans = collected.wait(trace, lambda found: any(span.parent_id == caller for span in found))
        [record] = _until(lambda: _records(home) or None, "the journal has the request")

    [span] = [span for span in spans if span.parent_id == caller]
    # No service is there that could decide, and what is not decided does not pass.
    assert 503 == answer.status_code
    assert ("peaje-envoy", "503", "/v1/chat/completions", "example") == (
        span.service, *(span.attributes[name] for name in ("http.status_code", "url.path", "gen_ai.request.model")),
    )  # fmt: skip
    assert trace == record[contract.J_TRACE].split("-")[1]
    assert b"secret-in-the-query" not in b"".join(collected.raw)


def _records(home: Path) -> list[dict[str, Any]]:
    texts = [path.read_text() for path in (home / contract.JOURNAL_PATH).parent.iterdir() if path.is_file()]
    return [record for text in texts for line in text.splitlines() if contract.J_TRACE in (record := json.loads(line))]
