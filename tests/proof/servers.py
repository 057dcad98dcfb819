# SPDX-License-Identifier: Apache-2.0
"""Several ratelimit processes on one store, as a deployment has them; any of them can be killed and comes back."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import grpc

from chassis import contract
from chassis.wire import ratelimit_pb2 as wire
from ratelimit.servicer import METHOD
from tests.dataplane.installation import REPOSITORY

_START_SECONDS_MAX = 60.0
_CALL_SECONDS_MAX = 5.0
#: A process that was killed is found again as soon as it is back, not after gRPC's usual second and more.
_OPTIONS = [("grpc.initial_reconnect_backoff_ms", 50), ("grpc.min_reconnect_backoff_ms", 50), ("grpc.max_reconnect_backoff_ms", 200)]


class Servers:
    """*count* processes of `python -m ratelimit`, each in a directory of its own."""

    def __init__(self, directory: Path, count: int, *, postgres_url: str, redis_url: str) -> None:
        self._environment = {name: value for name, value in os.environ.items() if not name.startswith("PEAJE_")} | {
            "PEAJE_POSTGRES_URL": postgres_url, "PEAJE_REDIS_URL": redis_url, "PYTHONPATH": str(REPOSITORY),
            "PEAJE_LOG_LEVEL": "error",
        }  # fmt: skip
        # A socket's path holds 107 bytes: named from a directory that is near.
        self._directories = [directory / str(number) for number in range(count)]
        for home in self._directories:
            models = home / contract.MODELS_PATH
            models.parent.mkdir(parents=True)
            models.write_text('models: [{name: m, engine: openai, endpoints: ["127.0.0.1:1"]}]\n')
        self._processes = [self._start(number) for number in range(count)]
        self._channels = [grpc.insecure_channel(f"unix:{self._socket(number)}", options=_OPTIONS) for number in range(count)]
        self._calls = [
            channel.unary_unary(
                METHOD, request_serializer=wire.RateLimitRequest.SerializeToString,
                response_deserializer=wire.RateLimitResponse.FromString,
            )
            for channel in self._channels
        ]  # fmt: skip
        self._lock = threading.Lock()
        for number in range(count):
            self.wait_ready(number)

    def __len__(self) -> int:
        return len(self._processes)

    def ask(self, number: int, request: wire.RateLimitRequest) -> wire.RateLimitResponse:
        """One call to one process; raises `grpc.RpcError`, after which nobody knows whether it was heard."""
        answer: wire.RateLimitResponse = self._calls[number](request, timeout=_CALL_SECONDS_MAX)
        return answer

    def kill(self, number: int) -> None:
        """End one without warning and start another in its place."""
        with self._lock:
            self._processes[number].kill()
            self._processes[number].wait(30)
            self._processes[number] = self._start(number)

    def wait_ready(self, number: int) -> None:
        """Wait until one answers."""
        grpc.channel_ready_future(self._channels[number]).result(timeout=_START_SECONDS_MAX)

    def close(self) -> None:
        """End all."""
        for channel in self._channels:
            channel.close()
        for process in self._processes:
            process.kill()
            process.wait(30)

    def _socket(self, number: int) -> Path:
        return self._directories[number] / contract.SOCKETS[contract.CLUSTER_RATELIMIT]

    def _start(self, number: int) -> subprocess.Popen[bytes]:
        home = self._directories[number]
        with (home / "log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "ratelimit"], cwd=home, env=self._environment | {"PEAJE_HOME": str(home)}, stderr=log
            )
