# SPDX-License-Identifier: Apache-2.0
"""Real counter stores for tests: Valkey from the wheel, Debian's Redis if there is one, a three-node cluster."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import redis

from control.laptop.binaries import find_valkey
from tests.integration.ports import free_ports

_START_SECONDS_MAX = 20.0
#: A store that a busy machine keeps for longer than a service waits is no finding where it is not to fail.
PATIENCE_SECONDS = 10.0
_SLOTS = 16384


@contextmanager
def store_server(program: Path | None = None) -> Iterator[str]:
    """One server on a Unix socket; its URL."""
    with _directory() as directory, _server(program or find_valkey({}), directory, ["--port", "0"]) as _:
        url = f"unix://{directory}/s.sock?db=0"
        _wait(redis.Redis.from_url(url))
        yield url


@contextmanager
def store_cluster() -> Iterator[str]:
    """Three masters on loopback that share the slots; the URL of one of them."""
    program, free = find_valkey({}), free_ports(6)
    ports, buses = free[:3], free[3:]
    with _directory() as directory:
        nodes = []
        try:
            for port, bus in zip(ports, buses, strict=True):
                home = directory / str(port)
                home.mkdir()
                options = ["--port", str(port), "--cluster-port", str(bus), "--bind", "127.0.0.1", "--cluster-enabled", "yes"]
                nodes.append(_start(program, home, options))
            clients = [redis.Redis(port=port) for port in ports]
            for client in clients:
                _wait(client)
            bounds = [0, _SLOTS // 3, 2 * _SLOTS // 3, _SLOTS]
            for index, client in enumerate(clients):
                client.execute_command("CLUSTER ADDSLOTSRANGE", bounds[index], bounds[index + 1] - 1)
                client.execute_command("CLUSTER SET-CONFIG-EPOCH", index + 1)
                client.execute_command("CLUSTER MEET", "127.0.0.1", ports[0], buses[0])
            deadline = time.monotonic() + _START_SECONDS_MAX
            while not all(b"cluster_state:ok" in _info(c) and b"cluster_known_nodes:3" in _info(c) for c in clients):
                assert time.monotonic() < deadline, "the cluster did not form"
                time.sleep(0.05)
            yield f"redis://127.0.0.1:{ports[0]}/0"
        finally:
            for process in nodes:
                process.kill()
                process.wait(timeout=10)


def debian_redis() -> Path | None:
    """Redis as the distribution has it, the oldest that is supported."""
    found = shutil.which("redis-server")
    return Path(found) if found else None


def _info(client: redis.Redis) -> bytes:
    raw = client.execute_command("CLUSTER INFO")
    return raw if isinstance(raw, bytes) else "\n".join(f"{key}:{value}" for key, value in raw.items()).encode()


@contextmanager
def _directory() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="peaje-kv-"))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def _server(program: Path, directory: Path, options: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    process = _start(program, directory, [*options, "--unixsocket", str(directory / "s.sock")])
    try:
        yield process
    finally:
        process.kill()
        process.wait(timeout=10)


def _start(program: Path, directory: Path, options: list[str]) -> subprocess.Popen[bytes]:
    with (directory / "log").open("wb") as log:
        return subprocess.Popen(
            [program, "--save", "", "--appendonly", "no", "--dir", str(directory), *options], stdout=log, stderr=log
        )


def _wait(client: redis.Redis) -> None:
    deadline = time.monotonic() + _START_SECONDS_MAX
    while True:
        try:
            client.ping()
        except redis.RedisError:
            assert time.monotonic() < deadline, "the store did not start"
            time.sleep(0.02)
        else:
            return
