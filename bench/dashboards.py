# SPDX-License-Identifier: Apache-2.0
"""
`python -m bench.dashboards --write`: the dashboards as docs/ shows them, drawn from a run of a few minutes.

Everything is real but the model servers and the callers: an installation, Envoy, a Prometheus that scrapes it with our
rules, and the questions of the dashboards themselves. PEAJE_PROMETHEUS or PATH has the program.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import httpx
import yaml

from control.monitoring.dashboards import ALL, Dashboard, Panel
from control.monitoring.picture import Answer, draw
from control.monitoring.rules import RULES_PATH
from tests.dataplane.installation import REPOSITORY, Installation, Tenant, free_ports, running

_PARTS: Final = ("extauth", "ratelimit", "metering", "collector", "beacon", "events")
_SCRAPE_SECONDS: Final = 3
#: What Grafana would put in: four scrapes.
_RATE: Final = f"{4 * _SCRAPE_SECONDS}s"
#: Served models and what a token of each takes, in milliseconds.
_MODELS: Final = {"llama-3.1-8b": 8, "qwen3-32b": 25}
#: Callers and how many of each are at it at once; the last is limited.
_TENANTS: Final = {"acme": 3, "bolt": 2, "crux": 1, "dune": 1}
#: Tests are more patient.
_AS_SHIPPED: Final = {"PEAJE_RATELIMIT_STORE_TIMEOUT_SECONDS": "0.1"}
_DIRECTORY: Final = REPOSITORY / "docs"


@dataclass(frozen=True, slots=True, kw_only=True)
class Oracle:
    """Who answers the dashboards' questions."""

    prometheus: str
    road: Installation
    start: float
    end: float
    tenant: str

    def answer(self, panel: Panel) -> Answer:
        """What *panel* shows at the end of the run."""
        if panel.is_sql:
            return Answer(lines={}, rows=self._rows(panel.queries[0][0]))
        found: dict[str, list[tuple[float, float]]] = {}
        for query, legend in panel.queries:
            for labels, line in self._lines(query):
                name = _named(legend, labels)
                found[name if name not in found else f"{name} {len(found)}"] = line
        return Answer(lines=found)

    def _lines(self, query: str) -> Iterator[tuple[Mapping[str, str], list[tuple[float, float]]]]:
        asked = query.replace("$__rate_interval", _RATE).replace("$tenant", self.tenant)
        answer = httpx.get(
            f"{self.prometheus}/api/v1/query_range", timeout=30,
            params={"query": asked, "start": str(self.start), "end": str(self.end), "step": str(_SCRAPE_SECONDS)},
        )  # fmt: skip
        document = answer.json()
        if document["status"] != "success":
            raise RuntimeError(f"{asked}: {document}")
        for series in document["data"]["result"]:
            yield series["metric"], [(float(at), float(value)) for at, value in series["values"]]

    def _rows(self, query: str) -> list[list[str]]:
        with self.road.database() as connection, connection.transaction():
            connection.execute("set local role peaje_billing")
            cursor = connection.execute(query)  # type: ignore[arg-type] - a query of ours
            names = [column.name for column in cursor.description or ()]
            return [names, *([_cell(row[name]) for name in names] for row in cursor.fetchall())]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, datetime):
        return f"{value.astimezone(UTC):%Y-%m-%d %H:%M}"
    return f"{value:.4f}" if hasattr(value, "is_normal") and value != int(value) else f"{value}"


def _named(legend: str, labels: Mapping[str, str]) -> str:
    for name, value in labels.items():
        legend = legend.replace(f"{{{{{name}}}}}", value)
    return legend.replace("{{", "").replace("}}", "").strip()


def main() -> None:
    """Run, ask, draw."""
    parser = argparse.ArgumentParser(prog="python -m bench.dashboards", description=__doc__)
    parser.add_argument("--minutes", type=float, default=2.5, help="how long it runs under load")
    parser.add_argument("--write", action="store_true", help="put the pictures into docs/; else into the working directory")
    asked = parser.parse_args()
    target = _DIRECTORY if asked.write else Path.cwd()
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="peaje-pictures-")))
        engines = {name: stack.enter_context(_engine(name, home)) for name in _MODELS}
        document = {"models": [{"name": name, "engine": "vllm", "endpoints": [f"127.0.0.1:{port}"]} for name, port in engines.items()]}
        (home / "models.yaml").write_text(yaml.safe_dump(document))
        ports = dict(zip(_PARTS, free_ports(len(_PARTS)), strict=True))
        settings = {f"PEAJE_{part.upper()}_METRICS_PORT": str(port) for part, port in ports.items()}
        road = stack.enter_context(running(home / "home", environment=settings | _AS_SHIPPED | {"PEAJE_MODELS": str(home / "models.yaml")}))
        prometheus = stack.enter_context(_prometheus(home, {**ports, "envoy": road.admin_port}, engines))
        start = time.time()
        _load(road, asked.minutes * 60)
        time.sleep(2 * _SCRAPE_SECONDS)
        oracle = Oracle(prometheus=prometheus, road=road, start=start, end=time.time(), tenant=next(iter(_TENANTS)))
        for dashboard in ALL:
            (target / f"{dashboard.uid}.svg").write_text(_drawn(dashboard, oracle), "utf-8")


def _drawn(dashboard: Dashboard, oracle: Oracle) -> str:
    rows = tuple((heading.replace("$tenant", oracle.tenant), panels) for heading, panels in dashboard.rows)
    answers = {panel.title: oracle.answer(panel) for _, panels in rows for panel in panels}
    named = Dashboard(uid=dashboard.uid, title=dashboard.title, rows=rows)
    about = f"{datetime.fromtimestamp(oracle.start, UTC):%H:%M:%S} to {datetime.fromtimestamp(oracle.end, UTC):%H:%M:%S} UTC"
    return draw(named, answers, start=oracle.start, end=oracle.end, about=about)


def _load(road: Installation, seconds: float) -> None:
    """Callers of each kind, and in the middle of it a store that stands still and an engine that fails."""
    tenants = {name: _tenant(road, name) for name in _TENANTS}
    for model, (input_, output) in zip(_MODELS, (("0.15", "0.60"), ("0.90", "2.40")), strict=True):
        made = road.run("prices", "set", "--model", model, "--input", input_, "--output", output)
        assert made.returncode == 0, made.stderr
    limits = {"acme": {"monthly_tokens": 500_000_000}, "dune": {"requests_per_minute": 60, "tokens_per_minute": 6000}}
    for name, body in limits.items():
        road.control("PUT", f"/v1/tenants/{tenants[name].tenant_id}/limits", json=body).raise_for_status()
    stop = threading.Event()
    with ThreadPoolExecutor(sum(_TENANTS.values()) + 1) as pool:
        callers = [
            pool.submit(_call, road, tenants[name], random.Random(f"{name}{number}"), stop)
            for name, count in _TENANTS.items() for number in range(count)
        ]  # fmt: skip
        callers.append(pool.submit(_call_as_nobody, road, stop))
        try:
            time.sleep(seconds / 2)
            road.silence("valkey", lambda: time.sleep(4))
            time.sleep(seconds / 2 - 4)
        finally:
            stop.set()
        for one in callers:
            one.result()


def _tenant(road: Installation, name: str) -> Tenant:
    tenant_id = road.control("POST", "/v1/tenants", json={"name": name}).raise_for_status().json()["tenant_id"]
    made = road.control("POST", f"/v1/tenants/{tenant_id}/keys", json={"name": "app"}).raise_for_status().json()
    return Tenant(tenant_id=tenant_id, key_id=made["key_id"], key=made["key"])


def _call(road: Installation, tenant: Tenant, order: random.Random, stop: threading.Event) -> None:
    """Chats of all sizes; one in thirty fails at the engine, one in thirty is given up by its caller."""
    with httpx.Client(headers={"authorization": f"Bearer {tenant.key}"}, timeout=30) as client:
        while not stop.wait(order.expovariate(4)):
            model = order.choice([*_MODELS])
            words = " ".join(["word"] * order.randrange(5, 400))
            body = {"model": model, "messages": [{"role": "user", "content": words}], "max_tokens": order.randrange(5, 120), "stream": order.random() < 0.7}
            fault: dict[str, Any] = {"first_ms": order.randrange(30, 400), "chunk_ms": _MODELS[model] * order.uniform(0.7, 1.6)}
            if order.random() < 1 / 30:
                fault = {"error_before": 500}
            with contextlib.suppress(httpx.HTTPError):
                if order.random() < 1 / 30:
                    with client.stream("POST", f"{road.url}/v1/chat/completions", json=body, headers=_as_header(fault)) as answer:
                        next(answer.iter_bytes(), b"")
                else:
                    client.post(f"{road.url}/v1/chat/completions", json=body, headers=_as_header(fault))


def _call_as_nobody(road: Installation, stop: threading.Event) -> None:
    """Somebody whose key is none."""
    while not stop.wait(1.5):
        with contextlib.suppress(httpx.HTTPError):
            httpx.post(f"{road.url}/v1/chat/completions", headers={"authorization": "Bearer sk-nobody"}, json={"model": "llama-3.1-8b", "messages": []}, timeout=30)


def _as_header(fault: Mapping[str, Any]) -> dict[str, str]:
    return {"x-fake-engine": json.dumps(fault)}


@contextmanager
def _process(arguments: Sequence[str], log: Path, cwd: Path = REPOSITORY) -> Iterator[None]:
    with log.open("w") as file:
        process = subprocess.Popen(arguments, cwd=cwd, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


@contextmanager
def _engine(name: str, home: Path) -> Iterator[int]:
    [port] = free_ports(1)
    arguments = [
        sys.executable, "-m", "tests.fake_engine", "--port", str(port), "--engine", "vllm", "--model", name,
        "--truth", str(home / f"{name}.jsonl"),
    ]  # fmt: skip
    with _process(arguments, home / f"{name}.log"):
        _wait_for(f"http://127.0.0.1:{port}/v1/models")
        yield port


@contextmanager
def _prometheus(home: Path, ports: Mapping[str, int], engines: Mapping[str, int]) -> Iterator[str]:
    program = os.environ.get("PEAJE_PROMETHEUS") or shutil.which("prometheus")
    if program is None:
        raise SystemExit("There is no Prometheus: name it in PEAJE_PROMETHEUS.")
    document = {
        "global": {"scrape_interval": f"{_SCRAPE_SECONDS}s", "evaluation_interval": f"{_SCRAPE_SECONDS}s", "scrape_timeout": "2s"},
        "rule_files": [str(REPOSITORY / RULES_PATH)],
        "scrape_configs": [
            *(
                {
                    "job_name": f"peaje-{part}", "metrics_path": "/stats/prometheus" if part == "envoy" else "/metrics",
                    "static_configs": [{"targets": [f"127.0.0.1:{port}"]}],
                }
                for part, port in ports.items()
            ),
            {"job_name": "engines", "static_configs": [{"targets": [f"127.0.0.1:{port}" for port in engines.values()]}]},
        ],
    }  # fmt: skip
    (home / "prometheus.yaml").write_text(yaml.safe_dump(document))
    [port] = free_ports(1)
    arguments = [
        program, f"--config.file={home / 'prometheus.yaml'}", f"--storage.tsdb.path={home / 'tsdb'}",
        f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn",
    ]  # fmt: skip
    with _process(arguments, home / "prometheus.log"):
        _wait_for(f"http://127.0.0.1:{port}/-/ready")
        yield f"http://127.0.0.1:{port}"


def _wait_for(url: str) -> None:
    deadline = time.monotonic() + 30
    while True:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(url, timeout=2).status_code == 200:
                return
        if time.monotonic() > deadline:
            raise RuntimeError(f"{url} does not answer")
        time.sleep(0.1)


if __name__ == "__main__":
    main()
