# SPDX-License-Identifier: Apache-2.0
"""`python -m metering.events` as a process: it delivers, another one takes over, and it ends when it is asked to."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from chassis.secrets import write_private
from tests.integration.control_plane import ControlPlane
from tests.receivers import Receiver, receiving
from tests.waiting import WAIT_SECONDS, until

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def process(home: Path, url: str, name: str) -> Iterator[subprocess.Popen[bytes]]:
    """One delivery process with the installation's secrets, in a directory of its own for its ready mark."""
    directory = home / name
    directory.mkdir()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PEAJE_")} | {
        "PEAJE_HOME": str(home), "PEAJE_POSTGRES_URL": url, "PEAJE_EVENTS_LOOPBACK_ALLOWED": "true", "PEAJE_EVENTS_IDLE_SECONDS": "0.1",
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    with (directory / "log").open("wb") as log:
        running = subprocess.Popen([sys.executable, "-m", "metering.events"], env=environment, stderr=log, cwd=directory)
    try:
        until(lambda: (directory / "run/events.ready").exists() or running.poll() is not None)
        yield running
    finally:
        running.kill()
        running.wait(timeout=30)


def names(receiver: Receiver) -> list[str]:
    return list(dict.fromkeys(json.loads(it.body)["data"]["name"] for it in receiver.got))


def test_one_process_sends_and_another_takes_over_when_it_is_killed(control: ControlPlane, postgres_url: str, tmp_path: Path) -> None:
    """Two at a time: one has the lock. What is told while one dies comes from the other. SIGTERM ends it well."""
    (tmp_path / "secrets").mkdir()
    write_private(tmp_path / "secrets/pepper-1", control.services.mint.peppers[1].hex())
    object.__setattr__(control.services, "loopback_allowed", True)
    control.tenant("acme")
    with receiving() as receiver, ExitStack() as stack:
        control.made("/v1/webhooks", {"url": receiver.url, "tenant": "acme", "events": ["key.created"]})
        first = stack.enter_context(process(tmp_path, postgres_url, "first"))
        second = stack.enter_context(process(tmp_path, postgres_url, "second"))
        control.made("/v1/tenants/acme/keys", {"name": "before"})
        until(lambda: names(receiver) == ["before"])
        assert "delivering" in (tmp_path / "first/log").read_text()
        assert "delivering" not in (tmp_path / "second/log").read_text()

        first.kill()
        control.made("/v1/tenants/acme/keys", {"name": "after"})
        until(lambda: names(receiver) == ["before", "after"])
        second.send_signal(signal.SIGTERM)

        assert 0 == second.wait(timeout=WAIT_SECONDS)
        # At least once: the first may have died before it could write down that it had sent.
        assert 2 == len({got.headers["webhook-id"] for got in receiver.got})


def test_without_a_pepper_it_refuses_to_start_in_one_line(postgres_url: str, tmp_path: Path) -> None:
    """Nothing could be signed."""
    with process(tmp_path, postgres_url, "only") as running:
        assert 1 == running.wait(timeout=WAIT_SECONDS)
        said = (tmp_path / "only/log").read_text().strip()

    assert 1 == len(said.splitlines()) and "secrets" in said
