# SPDX-License-Identifier: Apache-2.0
"""A service as a pod runs it: its own process, its settings from the environment, asked over TCP."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from chassis import certificates
from chassis.secrets import write_private
from chassis.serving import GRACE_SECONDS
from chassis.wire import ext_proc_pb2 as wire
from metering.servicer import METHOD
from tests.certificates import Authority

_REPOSITORY = Path(__file__).resolve().parents[2]
_PATIENCE_SECONDS = 30


def _start(home: Path, module: str = "metering", **settings: str) -> subprocess.Popen[str]:
    (home / "envoy").mkdir(parents=True, exist_ok=True)
    (home / "envoy/models.yaml").write_text('models: [{name: one, engine: openai, endpoints: ["127.0.0.1:1"]}]\n')
    environment = {
        "PATH": os.environ["PATH"], "PYTHONPATH": str(_REPOSITORY), "PYTHONSAFEPATH": "1", "PEAJE_HOME": str(home),
        # Nobody is there: a service that cannot reach Postgres serves all the same.
        "PEAJE_POSTGRES_URL": "postgresql://nobody:none@127.0.0.1:1/none?connect_timeout=1", **settings,
    }  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-m", module], cwd=home, env=environment, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _status(address: str, credentials: grpc.ChannelCredentials) -> int | grpc.StatusCode:
    with grpc.secure_channel(address, credentials, (("grpc.use_local_subchannel_pool", 1),)) as channel:
        try:
            return int(health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5).status)
        except grpc.RpcError as exc:
            code: grpc.StatusCode = exc.code()
            return code


def test_a_service_in_a_pod_serves_those_who_show_a_certificate(tmp_path: Path) -> None:
    """By PEAJE_METERING_LISTEN and PEAJE_TLS_DIRECTORY alone; there is no socket then, and it ends when it is told."""
    authority = Authority.make()
    server, client = authority.fill(tmp_path / "server", "metering"), authority.fill(tmp_path / "client", "gateway")
    good = certificates.channel_credentials(certificates.read(client))
    address = f"127.0.0.1:{_free_port()}"
    process = _start(
        tmp_path / "home", PEAJE_METERING_LISTEN=address, PEAJE_TLS_DIRECTORY=str(server), PEAJE_METERING_RATELIMIT="ratelimit.invalid:9002"
    )
    try:
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while (status := _status(address, good)) != health_pb2.HealthCheckResponse.SERVING and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.1)

        assert health_pb2.HealthCheckResponse.SERVING == status
        assert grpc.StatusCode.UNAVAILABLE == _status(address, grpc.ssl_channel_credentials(root_certificates=authority.pem()))
        assert not (tmp_path / "home/run/metering.sock").exists()

        process.send_signal(signal.SIGTERM)
        assert 0 == process.wait(_PATIENCE_SECONDS)
    finally:
        process.kill()
        process.communicate()


def test_a_stream_that_passes_a_service_that_is_to_go_ends_by_itself(tmp_path: Path) -> None:
    """Longer than a call may take; nobody else is let in meanwhile, and the process ends with the last stream."""
    authority = Authority.make()
    server, client = authority.fill(tmp_path / "server", "metering"), authority.fill(tmp_path / "client", "gateway")
    credentials = certificates.channel_credentials(certificates.read(client))
    address = f"127.0.0.1:{_free_port()}"
    process = _start(
        tmp_path / "home", PEAJE_METERING_LISTEN=address, PEAJE_TLS_DIRECTORY=str(server), PEAJE_METERING_STREAM_SECONDS="600"
    )
    pieces: queue.SimpleQueue[wire.ProcessingRequest | None] = queue.SimpleQueue()
    piece = wire.ProcessingRequest(response_body=wire.HttpBody(body=b"a piece"))
    try:
        with grpc.secure_channel(address, credentials) as channel:
            call = channel.stream_stream(
                METHOD, request_serializer=wire.ProcessingRequest.SerializeToString, response_deserializer=wire.ProcessingResponse.FromString
            )
            answers = call(iter(pieces.get, None), wait_for_ready=True, timeout=2 * _PATIENCE_SECONDS)
            pieces.put(piece)
            assert b"a piece" == next(answers).response_body.response.body_mutation.streamed_response.body

            process.send_signal(signal.SIGTERM)
            told = time.monotonic()
            while _status(address, credentials) != grpc.StatusCode.UNAVAILABLE or time.monotonic() < told + GRACE_SECONDS + 1:
                assert time.monotonic() < told + _PATIENCE_SECONDS
                time.sleep(0.1)

            pieces.put(piece)
            assert b"a piece" == next(answers).response_body.response.body_mutation.streamed_response.body
            pieces.put(None)
            assert [] == list(answers)
        assert 0 == process.wait(_PATIENCE_SECONDS)
    finally:
        process.kill()
        process.communicate()


def test_the_control_api_in_a_pod_serves_https(tmp_path: Path) -> None:
    """By its own name, to those who know the authority; plain http gets nothing."""
    home, authority = tmp_path / "home", Authority.make()
    (home / "secrets").mkdir(parents=True, mode=0o700)
    write_private(home / "secrets/pepper-1", "0f1e2d3c4b5a69788796a5b4c3d2e1f0" * 2)
    directory, port = authority.fill(tmp_path / "control", "localhost"), _free_port()
    known = ssl.create_default_context(cafile=str(directory / "ca.crt"))
    process = _start(home, "control.api", PEAJE_CONTROL_PORT=str(port), PEAJE_CONTROL_TLS_DIRECTORY=str(directory))
    try:
        deadline, answer = time.monotonic() + _PATIENCE_SECONDS, None
        while answer is None and time.monotonic() < deadline:
            assert process.poll() is None
            with contextlib.suppress(httpx.ConnectError):
                answer = httpx.get(f"https://localhost:{port}/health", verify=known)

        assert answer is not None
        assert (200, {"status": "ok"}) == (answer.status_code, answer.json())
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"http://localhost:{port}/health")
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"PEAJE_METERING_LISTEN": "127.0.0.1:0"}, "certificates only"),
        ({"PEAJE_METERING_RATELIMIT": "ratelimit:9002"}, "certificates only"),
    ],
)
def test_without_certificates_it_does_not_start(tmp_path: Path, settings: dict[str, str], said: str) -> None:
    """One line that names the setting."""
    process = _start(tmp_path / "home", **settings)
    _, stderr = process.communicate(timeout=_PATIENCE_SECONDS)

    assert 1 == process.returncode
    assert said in stderr.splitlines()[-1]
    assert "PEAJE_TLS_DIRECTORY" in stderr
    assert "Traceback" not in stderr
