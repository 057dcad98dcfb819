# SPDX-License-Identifier: Apache-2.0
"""
`python -m bench.newcomer`: how long what a newcomer does first takes, by the clock.

A clone of this repository in a directory of its own, its own environment, its own state; each step as the README and
the guides say it: clone, up, the first 200; a limit and the 429 that it makes; a model and the 200 under its name. `--cache cold`
gives uv and pip an empty cache, so packages come over the network; `warm` the caller's own. The figures depend on the
machine and its network: none is asserted anywhere.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import httpx
import yaml

_REPOSITORY: Final = Path(__file__).resolve().parents[1]
#: Of one step; an environment over a slow network takes minutes.
_SECONDS_MAX: Final = 900.0
_LOOK_EVERY_SECONDS: Final = 0.02
_ASK: Final = {"max_tokens": 4, "messages": [{"role": "user", "content": "Hello!"}]}
#: What a run of our own must not hand on: the newcomer has set nothing.
_OURS: Final = ("PEAJE_", "PYTHON", "VIRTUAL_ENV")


@dataclass(slots=True, kw_only=True)
class Newcomer:
    """Somebody with a checkout, and how long each thing took them."""

    checkout: Path
    environment: dict[str, str]
    port: int
    steps: dict[str, float] = field(default_factory=dict)
    _key: str = ""

    def run(self, *command: str) -> str:
        """Run a command in the checkout; what it printed."""
        done = subprocess.run(
            command, cwd=self.checkout, env=self.environment, capture_output=True, text=True, check=False, timeout=_SECONDS_MAX
        )
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
        return done.stdout

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Note how long this takes."""
        began = time.perf_counter()
        yield
        self.steps[step] = time.perf_counter() - began
        print(f"{step:<58} {self.steps[step]:8.1f} s", flush=True)

    def make_tenant(self) -> None:
        """A tenant and its key, as the README makes them."""
        self.run("./peaje", "tenants", "create", "Newcomer")
        self._key = json.loads(self.run("./peaje", "keys", "create", "--tenant", "newcomer", "--json"))["key"]

    def ask(self, model: str = "tiny") -> httpx.Response:
        """One request."""
        return httpx.post(
            f"http://127.0.0.1:{self.port}/v1/chat/completions", headers={"authorization": f"Bearer {self._key}"},
            json=_ASK | {"model": model}, timeout=60,
        )  # fmt: skip


def wait(condition: Callable[[], object], what: str) -> None:
    """Wait until *condition* holds."""
    deadline = time.monotonic() + _SECONDS_MAX
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"{what}: not within {_SECONDS_MAX:.0f} s")
        time.sleep(_LOOK_EVERY_SECONDS)


def walk(newcomer: Newcomer, *, engine: str) -> None:
    """Do what a newcomer does, up to a model of their own."""
    with newcomer.timed("clone -> everything is up (./peaje up --detach)"):
        newcomer.run("git", "clone", "--quiet", str(_REPOSITORY), ".")
        newcomer.run("./peaje", "up", "--detach", "--engine", engine)
    with newcomer.timed("up -> the first answer (a tenant, a key, a request)"):
        newcomer.make_tenant()
        assert newcomer.ask().status_code == 200
    newcomer.steps["clone -> the first answer"] = sum(newcomer.steps.values())
    with newcomer.timed("edit a limit -> its effect (./peaje limits set, a 429)"):
        newcomer.run("./peaje", "limits", "set", "--tenant", "newcomer", "--rpm", "1")
        wait(lambda: newcomer.ask().status_code == 429, "the limit acts")
    newcomer.run("./peaje", "limits", "delete", "--tenant", "newcomer")
    wait(lambda: newcomer.ask().status_code == 200, "the limit is gone")
    document = newcomer.checkout / ".peaje/envoy/models.yaml"
    text = document.read_text()
    with newcomer.timed("add a model -> it is served (./peaje apply, a 200)"):
        document.write_text(f'{text}- name: second\n  engine: openai\n  endpoints: ["{_first_endpoint(text)}"]\n  model: tiny\n')
        newcomer.run("./peaje", "apply")
        assert newcomer.ask("second").status_code == 200
    with newcomer.timed("down, and up again with what is there"):
        newcomer.run("./peaje", "down")
        newcomer.run("./peaje", "up", "--detach", "--engine", engine)


def _first_endpoint(text: str) -> str:
    return str(yaml.safe_load(text)["models"][0]["endpoints"][0])


def main() -> None:
    """Walk once and print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.newcomer", description=__doc__)
    parser.add_argument("--cache", choices=("warm", "cold"), default="warm", help="of uv and pip; cold: an empty one")
    parser.add_argument("--engine", default="dynamo", help="as of ./peaje up")
    parser.add_argument("--port", type=int, default=10000)
    parser.add_argument("--directory", type=Path, help="below which the checkout is made; default: the system's own for such")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="peaje-newcomer-", dir=arguments.directory) as directory:
        checkout = Path(directory) / "peaje"
        checkout.mkdir()
        environment = {name: value for name, value in os.environ.items() if not name.startswith(_OURS)}
        environment |= {
            "PEAJE_PORT": str(arguments.port), "PEAJE_CONTROL_PORT": str(arguments.port + 1), "PEAJE_ADMIN_PORT": str(arguments.port + 2),
        }  # fmt: skip
        if arguments.cache == "cold":
            environment |= {"UV_CACHE_DIR": f"{directory}/uv", "PIP_CACHE_DIR": f"{directory}/pip"}
        newcomer = Newcomer(checkout=checkout, environment=environment, port=arguments.port)
        try:
            walk(newcomer, engine=arguments.engine)
        finally:
            if (checkout / "peaje").exists():
                subprocess.run(["./peaje", "down"], cwd=checkout, env=environment, capture_output=True, check=False, timeout=120)
    print(f"{'clone -> the first answer':<58} {newcomer.steps['clone -> the first answer']:8.1f} s")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
