# SPDX-License-Identifier: Apache-2.0
"""
Other gateways, measured as Peaje is: a peer is a command that serves an OpenAI endpoint in front of an upstream.

What is not installed is skipped by name: the table says so.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.cpu import descendants

#: Python gateways import for long.
_START_SECONDS_MAX: Final = 120.0
_STOP_SECONDS: Final = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """How to run one in front of an upstream, or why it cannot be run here."""

    name: str
    #: Given the upstream's port, its own, and a directory for what it writes.
    command: Callable[[int, int, Path], list[str]]
    #: None if it can be run.
    missing: str | None = None


def litellm(venv: Path | None) -> Peer:
    """LiteLLM's proxy from the environment *venv*, without keys and stores: the least that it costs."""
    program = None if venv is None else venv / "bin/litellm"
    if program is None:
        missing: str | None = "no environment was named (--litellm VENV)"
    else:
        missing = None if program.exists() else "not installed in the environment that --litellm names"

    def command(upstream: int, port: int, directory: Path) -> list[str]:
        # JSON is YAML.
        model = {"model": "openai/tiny", "api_base": f"http://127.0.0.1:{upstream}/v1", "api_key": "none"}
        config = directory / "litellm.yaml"
        settings = {"dangerously_permit_weak_or_unset_master_key": True}
        config.write_text(json.dumps({"model_list": [{"model_name": "tiny", "litellm_params": model}], "general_settings": settings}))
        return [str(program), "--config", str(config), "--host", "127.0.0.1", "--port", str(port), "--num_workers", "1"]

    return Peer(name="LiteLLM", command=command, missing=missing)


def by_command(text: str) -> Peer:
    """
    Any other one, as NAME=COMMAND with {upstream} and {port} in it; raises `ValueError` with what is wrong.

    >>> by_command("nothing=socat TCP-LISTEN:{port},fork TCP:127.0.0.1:{upstream}").command(1, 2, Path())
    ['socat', 'TCP-LISTEN:2,fork', 'TCP:127.0.0.1:1']
    """
    name, equals, line = text.partition("=")
    if not equals or not name or "{port}" not in line or "{upstream}" not in line:
        raise ValueError(f"{text!r} is not NAME=COMMAND with {{upstream}} and {{port}} in the command.")
    words = shlex.split(line)

    def command(upstream: int, port: int, _: Path) -> list[str]:
        return [word.replace("{port}", str(port)).replace("{upstream}", str(upstream)) for word in words]

    return Peer(name=name, command=command)


@contextmanager
def serving(peer: Peer, *, upstream: int, port: int, directory: Path, ready: Callable[[], bool]) -> Iterator[int]:
    """Run *peer* until the block ends; its pid. Raises `RuntimeError` with its last words if it is not *ready* in time."""
    log = directory / f"{peer.name}.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            peer.command(upstream, port, directory), cwd=directory, stdin=subprocess.DEVNULL, stdout=out, stderr=out
        )
        try:
            _wait(process, peer, ready, log)
            yield process.pid
        finally:
            children = descendants(process.pid)
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            for child in children:
                if Path(f"/proc/{child}").exists():
                    os.kill(child, signal.SIGKILL)


def _wait(process: subprocess.Popen[bytes], peer: Peer, ready: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS_MAX
    while not ready():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{peer.name} did not start: {log.read_text(errors='replace')[-500:]}")
        time.sleep(0.1)
