# SPDX-License-Identifier: Apache-2.0
"""What engines counted against what the ledger has, with a real page over HTTP and a real Postgres."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psycopg
import pytest
from prometheus_client import REGISTRY

from chassis.models import ModelCatalogue
from control import external_usage, tenants
from control.act import ALL_TENANTS, Act
from control.store import Store
from metering.adapters.conservation import QUIET_SECONDS, Conservation
from metering.adapters.invariants import verify
from tests.journals import NOON, collect, end, rows, write

CHECKS = (
    "select state, engine_input_tokens, engine_output_tokens, ledger_input_tokens, ledger_output_tokens, request_count, cut_count "
    "from conservation_check order by ended_at"
)


class Engine:
    """An engine's page and what is on it."""

    def __init__(self) -> None:
        self.input, self.output, self.running = 100, 200, 0
        engine = self

        class Page(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                lines = {
                    "vllm:prompt_tokens_total": engine.input, "vllm:generation_tokens_total": engine.output,
                    "vllm:num_requests_running": engine.running,
                }
                self.send_response(200)
                self.end_headers()
                self.wfile.write("".join(f'{name}{{model_name="tiny"}} {it}.0\n' for name, it in lines.items()).encode())

            def log_message(self, format: str, *args: object) -> None:
                """Nobody reads it."""

        self.server = HTTPServer(("127.0.0.1", 0), Page)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def engine() -> Iterator[Engine]:
    """An engine that has served before anybody looked."""
    engine = Engine()
    yield engine
    engine.server.shutdown()
    engine.server.server_close()


def drifts() -> tuple[float | None, float | None]:
    """What the collector shows of input and output tokens."""
    name = "peaje_conservation_drift_tokens"
    return (REGISTRY.get_sample_value(name, {"model": "tiny", "kind": "input"}), REGISTRY.get_sample_value(name, {"model": "tiny", "kind": "output"}))


class NeverStopped(threading.Event):
    """Time passes by the test's clock, not by waiting."""

    def wait(self, timeout: float | None = None) -> bool:
        return False


def test_the_ledger_is_compared_with_the_engine_between_quiet_moments(ledger_url: str, engine: Engine, tmp_path: Path) -> None:
    """Equal; then one request that passed by the gateway; and nothing before the journal has been read that far."""
    live = tmp_path / "journal/journal.jsonl"
    port = engine.server.server_address[1]
    catalogue = ModelCatalogue.parse(
        {"models": [{"name": "tiny", "engine": "vllm", "endpoints": [f"127.0.0.1:{port}"]}]}, source="test"
    )
    now = [NOON]
    check = Conservation(
        url=ledger_url, catalogue=lambda: catalogue, clock=lambda: now[0], every_seconds=1, stop=NeverStopped()
    )

    with psycopg.connect(ledger_url, autocommit=True) as connection:

        def look(minutes: int) -> list[tuple[object, ...]]:
            now[0] = NOON + timedelta(minutes=minutes, seconds=QUIET_SECONDS / 2)
            check.look()
            check.keep(connection)
            return rows(ledger_url, CHECKS)

        assert [] == look(0)
        write(live, [end(1, at=NOON + timedelta(seconds=1)), end(2, at=NOON + timedelta(seconds=2), flags="DC")])
        engine.input, engine.output, engine.running = 106, 210, 1
        assert [] == look(1)
        engine.running = 0
        collect(ledger_url, live, now=NOON + timedelta(minutes=1))
        assert [] == look(2)

        collect(ledger_url, live, now=NOON + timedelta(minutes=3))
        assert [("compared", 6, 10, 6, 10, 2, 1)] == look(2)
        assert (0.0, 0.0) == drifts()

        engine.output += 7
        collect(ledger_url, live, now=NOON + timedelta(minutes=9))
        assert [("compared", 0, 7, 0, 0, 0, 0)] == look(4)[1:]
        engine.input = engine.output = 0
        assert (0.0, -7.0) == drifts()
        assert [("reset", 0, 0, 0, 0, 0, 0)] == look(6)[2:]
        assert (None, None) == drifts()


def test_usage_from_outside_is_none_of_the_engines(ledger_url: str, engine: Engine, tmp_path: Path) -> None:
    """What was posted of a served model did not pass by its engines, and is no drift."""
    live = tmp_path / "journal/journal.jsonl"
    port = engine.server.server_address[1]
    catalogue = ModelCatalogue.parse(
        {"models": [{"name": "tiny", "engine": "vllm", "endpoints": [f"127.0.0.1:{port}"]}]}, source="test"
    )
    now = [NOON + timedelta(seconds=QUIET_SECONDS / 2)]
    check = Conservation(url=ledger_url, catalogue=lambda: catalogue, clock=lambda: now[0], every_seconds=1, stop=NeverStopped())
    store = Store(ledger_url)
    operator = Act(actor="op_test", scope=ALL_TENANTS, request_id="test", now=NOON + timedelta(minutes=3))
    tenants.create(store, operator, "acme")
    posted = external_usage.Item(
        id="a", tenant="acme", model="tiny", input_tokens=9, output_tokens=9, started_at=NOON + timedelta(seconds=5)
    )

    with psycopg.connect(ledger_url, autocommit=True) as connection:
        check.look()
        write(live, [end(1, at=NOON + timedelta(seconds=1))])
        external_usage.post(store, operator, [posted])
        store.close()
        engine.input, engine.output = 103, 205
        now[0] += timedelta(minutes=2)
        check.look()
        collect(ledger_url, live, now=NOON + timedelta(minutes=3))
        check.keep(connection)

    assert [("compared", 3, 5, 3, 5, 1, 0)] == rows(ledger_url, CHECKS)
    assert (0.0, 0.0) == drifts()
    with psycopg.connect(ledger_url) as connection:
        assert 1 == verify(connection).notes["requests_not_witnessed"]
