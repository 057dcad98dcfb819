# SPDX-License-Identifier: Apache-2.0
"""One running installation as the tests use it: its CLI, its endpoint, its tables, its processes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, LiteralString

import httpx
import psycopg
import redis
from psycopg.rows import dict_row

from control.laptop import state
from control.laptop.commands import describe
from control.laptop.places import Places
from control.laptop.postgres import elsewhere
from tests.otlp import Collected

REPOSITORY = Path(__file__).resolve().parents[2]
PEAJE = REPOSITORY / "peaje"

#: How long a row may take to be visible after its stream ended; far above the usual, because
#: the machine that runs the tests may be busy.
VISIBLE_SECONDS = 15.0
#: What every key's text begins with.
_KEYS_BEGIN = "peaje_"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """A tenant of a test's own, so that tests do not meet in each other's limits and rows."""

    tenant_id: str
    key_id: str
    key: str


@dataclass(slots=True)
class Installation:
    """A `./peaje up --detach` with its own state directory and ports."""

    home: Path
    port: int
    control_port: int
    admin_port: int
    _tenants: Iterator[int] = field(default_factory=lambda: iter(range(10_000)))
    #: Where its services show metrics.
    metrics_ports: dict[str, int] = field(default_factory=dict)
    #: Where its spans go.
    traces: Collected | None = None
    #: Every key that tests were given, to be looked for at the end where it must not be.
    issued: list[str] = field(default_factory=list, repr=False)

    @property
    def url(self) -> str:
        """The tenants' endpoint."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """What a command needs to find this installation."""
        return {
            **os.environ,
            "PEAJE_HOME": str(self.home),
            "PEAJE_PORT": str(self.port),
            "PEAJE_CONTROL_PORT": str(self.control_port),
            "PEAJE_ADMIN_PORT": str(self.admin_port),
            # Tests that share an installation have a tenant each, and count by it.
            "PEAJE_COLLECTOR_METRICS_TENANTS": "10000",
        }

    def run(self, *arguments: str, timeout: float = 120.0) -> subprocess.CompletedProcess[str]:
        """Run a `./peaje` command and return how it ended."""
        return subprocess.run(
            [PEAJE, *arguments], env=self.environment, capture_output=True, text=True, timeout=timeout,
            stdin=subprocess.DEVNULL, check=False,
        )

    def cli(self, *arguments: str) -> Any:
        """The JSON answer of a command that must succeed."""
        answer = self.run(*arguments, "--json")
        assert answer.returncode == 0, answer.stderr
        return json.loads(answer.stdout)

    def control(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        """Call the control API as its administrator: what the CLI does, without a process a call."""
        token = (self.home / "secrets/admin-token").read_text().strip()
        return httpx.request(
            method, f"http://127.0.0.1:{self.control_port}{path}",
            headers={"authorization": f"Bearer {token}"}, timeout=10, **arguments,
        )

    def new_tenant(self, name: str = "tenant", **limits: int) -> Tenant:
        """Make a tenant with one key, and limits if given (rpm=, tpm=)."""
        unique = f"{name}-{os.getpid()}-{next(self._tenants)}"
        answer = self.control("POST", "/v1/tenants", json={"name": unique})
        deadline = time.monotonic() + VISIBLE_SECONDS
        while answer.status_code == 503 and time.monotonic() < deadline:  # a test before has killed Postgres
            time.sleep(0.2)
            answer = self.control("POST", "/v1/tenants", json={"name": unique})
        tenant_id = answer.json()["tenant_id"]
        made = self.control("POST", f"/v1/tenants/{tenant_id}/keys", json={"name": "test"}).json()
        self.issued.append(made["key"])
        if limits:
            self.set_limits(tenant_id, **limits)
        return Tenant(tenant_id=tenant_id, key_id=made["key_id"], key=made["key"])

    def set_limits(self, tenant_id: str, *, rpm: int | None = None, tpm: int | None = None) -> None:
        """Set a tenant's limits and wait until they act."""
        body = {"requests_per_minute": rpm, "tokens_per_minute": tpm}
        answer = self.control(
            "PUT", f"/v1/tenants/{tenant_id}/limits", json={k: v for k, v in body.items() if v is not None}
        )
        assert answer.status_code in (200, 201), answer.text
        # Limits are pushed; the promise is one second.
        time.sleep(1.0)

    def post(self, tenant: Tenant | None, path: str = "/v1/chat/completions", **arguments: Any) -> httpx.Response:
        """Send one request; `fault` becomes the fake engine's header."""
        headers = dict(arguments.pop("headers", {}))
        if tenant is not None:
            headers.setdefault("authorization", f"Bearer {tenant.key}")
        if fault := arguments.pop("fault", None):
            headers["x-fake-engine"] = json.dumps(fault)
        return httpx.post(f"{self.url}{path}", headers=headers, timeout=60, **arguments)

    def leaks(self) -> list[tuple[str, str]]:
        """
        Where a key that was issued or one of the installation's secrets can be read, with its first letters.

        Looked at: files below log, journal, run and envoy; every table; everything in Valkey; what Envoy's
        admin interface and the services' metrics show; all spans, where they are collected.
        """
        secrets = {*self.issued, *(path.read_text().strip() for path in (self.home / "secrets").iterdir())}
        # One alternation of hundreds would be tried at every byte: keys are found by what all of them begin with.
        keys = {secret.encode() for secret in secrets if secret.startswith(_KEYS_BEGIN)}
        others = [secret.encode() for secret in secrets if not secret.startswith(_KEYS_BEGIN)]
        lengths = {len(key) for key in keys}
        beginnings = re.compile(re.escape(_KEYS_BEGIN.encode()))
        found: set[tuple[str, bytes]] = set()
        for where, text in self._texts():
            found |= {(where, secret) for secret in others if secret in text}
            starts = [match.start() for match in beginnings.finditer(text)]
            found |= {(where, text[at : at + length]) for at in starts for length in lengths if text[at : at + length] in keys}
        return [(where, secret[:16].decode()) for where, secret in found]

    def _texts(self) -> Iterator[tuple[str, bytes]]:
        for directory in ("log", "journal", "run", "envoy"):
            for path in (self.home / directory).rglob("*"):
                if path.is_file():
                    yield path.name, path.read_bytes()
        with self.database() as connection:
            tables = connection.execute(
                "select c.oid::regclass::text as name from pg_class c join pg_namespace n on n.oid = c.relnamespace "
                "where c.relkind = 'r' and n.nspname = 'public'"
            ).fetchall()
            for table in tables:
                with connection.cursor().copy(f"copy {table['name']} to stdout") as copy:  # type: ignore[arg-type]
                    yield f"table {table['name']}", b"".join(map(bytes, copy))
        store = redis.Redis(
            unix_socket_path=str(self.home / "run/valkey.sock"),
            password=(self.home / "secrets/valkey-password").read_text().strip(),
        )
        read = {b"string": store.get, b"hash": store.hgetall, b"zset": lambda key: store.zrange(key, 0, -1), b"list": lambda key: store.lrange(key, 0, -1)}
        for key in store.scan_iter(count=1000):
            kind = store.type(key)
            # A kind that is not read here would be one that nobody looks at.
            yield "valkey", key + repr(read[kind](key) if kind != b"none" else b"").encode()
        for path in ("stats?usedonly", "config_dump", "clusters", "certs", "server_info"):
            yield f"envoy {path}", httpx.get(f"http://127.0.0.1:{self.admin_port}/{path}", timeout=30).content
        if self.traces is not None:
            yield "traces", b"\n".join(self.traces.raw)
        for port in self.metrics_ports.values():
            yield f"metrics on {port}", httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=30).raise_for_status().content

    @contextmanager
    def database(self) -> Iterator[psycopg.Connection[dict[str, Any]]]:
        """A connection as the ledger's owner."""
        state = json.loads((self.home / "run/state.json").read_text())
        password = self.home / "secrets/postgres-password"
        with psycopg.connect(
            state["postgres_url"], password=password.read_text().strip(), row_factory=dict_row, autocommit=True
        ) as connection:
            yield connection

    def sql(self, query: LiteralString, *arguments: Any) -> list[dict[str, Any]]:
        """Rows of one query."""
        with self.database() as connection:
            return connection.execute(query, arguments).fetchall()

    def rows(self, tenant: Tenant, count: int) -> list[dict[str, Any]]:
        """The tenant's billing rows, once there are *count* of them (or the time for them is over)."""
        deadline = time.monotonic() + VISIBLE_SECONDS
        while True:
            found = self.sql(
                "select * from billing_usage_v1 where tenant = %s order by started_at", tenant.tenant_id
            )
            if len(found) >= count or time.monotonic() > deadline:
                return found
            time.sleep(0.1)

    def truth(self) -> dict[str, dict[str, Any]]:
        """The fake engine's own record by request id."""
        lines = (self.home / "log/fake-engine-truth.jsonl").read_text().splitlines()
        return {entry["request_id"]: entry for entry in map(json.loads, lines)}

    def status(self) -> dict[str, Any]:
        """What `./peaje status --json` shows, without a process for each look."""
        place = Places(self.home)
        return describe(state.read(place), place)

    def pid(self, part: str) -> int:
        """The process of a part."""
        return next(int(entry["pid"]) for entry in self.status()["parts"] if entry["name"] == part)

    def kill(self, part: str) -> int:
        """End a part without warning (SIGKILL), one that was just killed when it is back; returns the pid that was."""
        deadline = time.monotonic() + VISIBLE_SECONDS
        while True:
            pid = self.pid(part)
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                assert time.monotonic() < deadline, f"{part} did not come back"
                time.sleep(0.1)
            else:
                return pid

    def silence(self, part: str, call: Callable[[], object]) -> None:
        """Make *call* while a part stands still and answers nobody."""
        pid = self.pid(part)
        os.kill(pid, signal.SIGSTOP)
        try:
            call()
        finally:
            os.kill(pid, signal.SIGCONT)

    def wait_restarted(self, part: str, old_pid: int, timeout: float = 30.0) -> None:
        """Wait until the supervisor has a new, ready process for *part*, and Envoy sees it."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            for entry in self.status()["parts"]:
                is_back = entry["name"] == part and entry["pid"] not in (None, old_pid) and entry["state"] == "ready"
                if is_back and self.is_healthy():
                    self._wait_serving(deadline)
                    return
            time.sleep(0.1)
        raise AssertionError(f"{part} did not come back: {self.status()}")

    def _wait_serving(self, deadline: float) -> None:
        """Wait until a caller nobody has met yet is served: the services' connections to the stores are back too."""
        newcomer = self.new_tenant("newcomer")
        answer = self.post(newcomer, json=chat())
        while answer.status_code != 200:
            assert time.monotonic() < deadline, answer.text
            time.sleep(0.1)
            answer = self.post(newcomer, json=chat())

    def scrape(self, part: str, *, timeout: float = 30.0) -> str:
        """What a part shows to Prometheus; Envoy by its admin interface."""
        address = f"{self.admin_port}/stats/prometheus" if part == "envoy" else f"{self.metrics_ports[part]}/metrics"
        return httpx.get(f"http://127.0.0.1:{address}", timeout=timeout).raise_for_status().text

    def stat(self, name: str) -> int:
        """The sum of Envoy's statistics whose whole names match the expression *name*; those that never moved are 0."""
        answer = httpx.get(f"http://127.0.0.1:{self.admin_port}/stats", params={"filter": f"^{name}$"}, timeout=10)
        return sum(int(line.rpartition(" ")[2]) for line in answer.raise_for_status().text.splitlines())

    def asked_extauth(self) -> int:
        """How often Envoy has asked extauth."""
        return self.stat("http.tenants.ext_authz.(ok|denied)")

    def is_healthy(self) -> bool:
        """Whether Envoy would take requests: it looks at extauth and ratelimit itself, a little after they are ready."""
        try:
            return httpx.get(f"{self.url}/health", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False


def chat(text: str = "one two three", **fields: Any) -> dict[str, Any]:
    """A small chat request; the fake engine counts the words of *text* as prompt tokens."""
    return {"model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": 5, **fields}


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on, all different."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@contextmanager
def running(
    home: Path, *options: str, environment: dict[str, str] | None = None, sending_seconds: int | None = None
) -> Iterator[Installation]:
    """
    `./peaje up --detach` with *options*, taken down at the end.

    Its parts wait for each other ten times as long as usual: a machine that also runs another thousand
    tests is slow, which is no fault that Peaje should answer. *sending_seconds*: how long Envoy waits for a request's
    head, and as long again for the whole of it, in place of what envoy.yaml says.
    """
    installation = Installation(home, *free_ports(3))
    source = home.with_name(f"{home.name}-envoy")
    shutil.copytree(REPOSITORY / "envoy", source)
    bootstrap = source / "envoy.yaml"
    waits = re.compile(r"(?<=timeout: )0\.5s$|(?<=max_interval: )0\.5s", re.MULTILINE)
    bootstrap.write_text(waits.sub("5s", bootstrap.read_text()))
    if sending_seconds is not None:
        for name, seconds in (("request_headers_timeout", sending_seconds), ("request_timeout", 2 * sending_seconds)):
            text, count = re.subn(rf"(?<=          {name}: )\d+s", f"{seconds}s", bootstrap.read_text())
            assert count == 1, name
            bootstrap.write_text(text)
    patience = {"PEAJE_ENVOY_SOURCE": str(source), "PEAJE_RATELIMIT_STORE_TIMEOUT_SECONDS": "0.5"}
    arguments: Sequence[str] = ("up", "--detach", "--restarts", "500", *options)
    started = subprocess.run(
        [PEAJE, *arguments], env=installation.environment | patience | (environment or {}), capture_output=True, text=True,
        timeout=600, stdin=subprocess.DEVNULL, check=False,
    )
    assert started.returncode == 0, started.stdout + started.stderr
    try:
        yield installation
    finally:
        stopped = installation.run("down")
        # As root its Postgres may live outside of what pytest cleans, and would be found by the next one of this name.
        shutil.rmtree(elsewhere(home), ignore_errors=True)
        assert stopped.returncode == 0, stopped.stderr
