# SPDX-License-Identifier: Apache-2.0
"""
`python -m bench`: CPU per request of every process, beside bare Envoy in the same run.

With `--waterfall` each control is switched on in turn (`bench.waterfall`). Absolute figures belong to the machine; read the ratios. `--write` puts the table into
docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench import waterfall
from bench.cpu import cpu_seconds
from bench.load import Load, Result, run
from bench.peers import by_command, litellm
from tests.dataplane.installation import REPOSITORY, Installation, free_ports, running

_DOCUMENT = REPOSITORY / "docs/benchmarks.md"
_CHART = REPOSITORY / "docs/waterfall.svg"
_BEGIN, _END = "<!-- bench: begin -->", "<!-- bench: end -->"
#: Parts whose CPU is the price of a request; the model server and the load generator are not.
_COUNTED = ("envoy", "extauth", "ratelimit", "metering", "collector", "valkey", "postgres")

_BARE = """
admin: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {admin}}}}}}}
static_resources:
  listeners:
  - address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: bare
          route_config:
            virtual_hosts:
            - {{name: all, domains: ["*"], routes: [{{match: {{prefix: /}}, route: {{cluster: engine, timeout: 0s}}}}]}}
          http_filters:
          - name: envoy.filters.http.router
            typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
  clusters:
  - name: engine
    type: STATIC
    load_assignment:
      cluster_name: engine
      endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {engine}}}}}}}}}]}}]
"""


@dataclass(frozen=True, slots=True)
class Shape:
    """A kind of request that is measured."""

    name: str
    body: dict[str, object]
    requests: int
    knobs: dict[str, object]


def shapes(scale: float) -> list[Shape]:
    """Small request, 50-chunk stream, 100 KB prompt."""

    def message(text: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": text}]

    small = {"model": "tiny", "messages": message("hello there"), "max_tokens": 4}
    stream = {"model": "tiny", "messages": message("hello there"), "max_tokens": 50, "stream": True}
    large = {"model": "tiny", "messages": message("word " * 20_000), "max_tokens": 4}
    return [
        Shape("small JSON", small, int(6000 * scale), {}),
        Shape("50-chunk stream", stream, int(1500 * scale), {}),
        Shape("100 KB prompt", large, int(1500 * scale), {}),
    ]


@contextmanager
def bare_envoy(engine_port: int) -> Iterator[tuple[int, int]]:
    """A plain Envoy in front of the same engine: its pid and port."""
    port, admin = free_ports(2)
    binary = next(REPOSITORY.glob(".venv/lib/python3*/site-packages/envoy/_bin/envoy"), Path("envoy"))
    with tempfile.TemporaryDirectory() as directory:
        config = Path(directory) / "bare.yaml"
        config.write_text(_BARE.format(admin=admin, port=port, engine=engine_port))
        process = subprocess.Popen(
            [os.environ.get("PEAJE_ENVOY_BIN", str(binary)), "-c", str(config), "--concurrency", "2",
             "--use-dynamic-base-id", "--log-level", "error"],
            stdin=subprocess.DEVNULL,
        )
        try:
            time.sleep(2)
            yield process.pid, port
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(20)


def measure(pids: dict[str, int], load: Load) -> tuple[dict[str, float], Result]:
    """CPU microseconds per request of each process under *load*."""
    before = {name: cpu_seconds(pid) for name, pid in pids.items()}
    result = asyncio.run(run(load))
    time.sleep(1.5)  # the collector and settlements finish what this load made
    after = {name: cpu_seconds(pid) for name, pid in pids.items()}
    return {name: 1e6 * (after[name] - before[name]) / load.requests for name in pids}, result


def engine_port(road: Installation) -> int:
    """Where the fake engine listens."""
    text = (road.home / "envoy/models.yaml").read_text()
    return int(re.findall(r":(\d{4,5})\b", text)[0])


def main() -> None:
    """Measure and print, or write into the document."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the requests; of the waterfall less than half of them, once")
    parser.add_argument("--write", action="store_true", help=f"put the table into {_DOCUMENT.name}")
    parser.add_argument("--waterfall", action="store_true", help="each control switched on in turn, instead")
    parser.add_argument("--runs", type=int, default=None, help="of the waterfall, whose medians are told (3; 1 with --quick)")
    parser.add_argument("--keys", type=int, default=1, help="of the waterfall: keys of each caller, used in turn (1, 1000, 100000)")
    parser.add_argument("--litellm", type=Path, default=None, metavar="VENV", help="of the waterfall: an environment with LiteLLM")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=COMMAND", type=by_command,
                        help="of the waterfall: another gateway, by a command with {upstream} and {port}")
    options = parser.parse_args()
    if options.waterfall:
        _waterfall(options)
        return

    lines = [
        "| lane | request | bare Envoy | Envoy | extauth | ratelimit | metering | collector | Valkey | Postgres | all | ratio "
        "| p50 / p99 bare → Peaje, ms | failures |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory(prefix="peaje-bench-") as home:
        with running(Path(home) / "state", "--engine", "fake") as road:
            tenants = {
                "no limits": road.new_tenant("bench-express"),
                "far from limits": road.new_tenant("bench-leased", rpm=100_000_000, tpm=100_000_000_000),
                "asked each time": road.new_tenant("bench-exact", rpm=100_000_000, tpm=100_000_000_000),
            }
            # Who is under way is never lent, and a quota is.
            for name, limit in {"asked each time": {"concurrency": 10**6}, "far from limits": {"monthly_tokens": 10**12}}.items():
                road.control("PUT", f"/v1/tenants/{tenants[name].tenant_id}/limits", json=limit).raise_for_status()
            time.sleep(1)
            status = {part["name"]: part["pid"] for part in road.status()["parts"]}
            pids = {name: int(status[name]) for name in _COUNTED if status.get(name)}
            with bare_envoy(engine_port(road)) as (bare_pid, bare_port):
                for lane, tenant in tenants.items():
                    for shape in shapes(0.1 if options.quick else 1.0):
                        line = f"| {lane} {_measured(shape, tenant.key, road, pids, bare_pid, bare_port)}"
                        print(line, flush=True)
                        lines.append(line)
    if options.write:
        text = _DOCUMENT.read_text()
        start, end = text.index(_BEGIN) + len(_BEGIN), text.index(_END)
        _DOCUMENT.write_text(text[:start] + "\n" + "\n".join(lines) + "\n" + text[end:])


def _waterfall(options: argparse.Namespace) -> None:
    peers = (litellm(options.litellm), *options.peer)
    asked = waterfall.Options(
        runs=options.runs or (1 if options.quick else 3), scale=0.4 if options.quick else 1.0, key_count=options.keys, peers=peers
    )
    found = waterfall.measure_all(asked)
    table = waterfall.table(found, peers)
    print(table)
    if options.write:
        text = _DOCUMENT.read_text()
        begin, end = "<!-- waterfall: begin -->", "<!-- waterfall: end -->"
        made = f"{asked.runs} run{'s' * (asked.runs > 1)}, {asked.key_count:,} key{'s' * (asked.key_count > 1)} of each caller.\n\n{table}\n\n![CPU a request, by step](waterfall.svg)"
        start, stop = text.index(begin) + len(begin), text.index(end)
        _DOCUMENT.write_text(f"{text[:start]}\n{made}\n{text[stop:]}")
        _CHART.write_text(waterfall.chart(found))


def _measured(
    shape: Shape, key: str, road: Installation, pids: dict[str, int], bare_pid: int, bare_port: int
) -> str:
    load = Load(
        port=bare_port, path="/v1/chat/completions",
        headers={"authorization": f"Bearer {key}", "content-type": "application/json",
                 "x-fake-engine": json.dumps(shape.knobs)},
        body=json.dumps(shape.body).encode(), requests=shape.requests, connections=16,
    )
    warm = Load(**{name: getattr(load, name) for name in Load.__slots__} | {"requests": 200})
    asyncio.run(run(warm))
    bare, bare_result = measure({"envoy": bare_pid}, load)
    behind = Load(**{name: getattr(load, name) for name in Load.__slots__} | {"port": road.port})
    asyncio.run(run(Load(**{name: getattr(behind, name) for name in Load.__slots__} | {"requests": 200})))
    ours, result = measure(pids, behind)
    total = sum(ours.values())
    cells = " | ".join(f"{ours.get(name, 0):.0f}" for name in _COUNTED)
    return (
        f"| {shape.name} | {bare['envoy']:.0f} | {cells} | {total:.0f} | {total / bare['envoy']:.1f}× "
        f"| {bare_result.quantile(0.5):.1f} / {bare_result.quantile(0.99):.1f} → "
        f"{result.quantile(0.5):.1f} / {result.quantile(0.99):.1f} | {bare_result.failures + result.failures} |"
    )


if __name__ == "__main__":
    main()
