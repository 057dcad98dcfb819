# SPDX-License-Identifier: Apache-2.0
"""
`python -m bench.hostile`: what an attack costs everybody else (H09, K04).

Requests of a good caller through the whole installation, alone and while somebody resets HTTP/2 streams as fast
as Envoy takes them, never ends a header, splits a cookie into thousands, or sends keys that nobody has, with a right
checksum and never the same, from the good caller's own address. The attackers share
the processors with the attacked, so part of any difference is theirs. `--write` puts the table into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import re
import secrets
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Final

import httpx

from bench.load import Load, run
from chassis import keys
from tests.dataplane.installation import REPOSITORY, chat, running
from tests.hostile.http import send_http2

_REQUESTS: Final = 2000
_RESETS: Final = 10_000
_CONTINUATIONS: Final = 20_000
_COOKIES: Final = 10_000
_DOCUMENT: Final = REPOSITORY / "docs/benchmarks.md"
_BEGIN, _END = "<!-- hostile: begin -->", "<!-- hostile: end -->"


def _reset_streams(port: int, stop: Event) -> None:
    while not stop.is_set():
        send_http2(port, {"resets": _RESETS})


def _never_end_headers(port: int, stop: Event) -> None:
    while not stop.is_set():
        send_http2(port, {"continuations": _CONTINUATIONS})


def _split_cookies(port: int, stop: Event) -> None:
    headers = [[":method", "GET"], [":scheme", "http"], [":authority", "a"], [":path", "/v1/models"]]
    while not stop.is_set():
        send_http2(port, {"headers": headers, "end": True, "cookies": _COOKIES})


def _guess_keys(port: int, stop: Event) -> None:
    with httpx.Client(timeout=30) as session:
        while not stop.is_set():
            key = keys.mint("live", secrets.token_bytes).key
            session.get(f"http://127.0.0.1:{port}/v1/models", headers={"x-api-key": key})


@contextmanager
def _under_attack(attack: Callable[[int, Event], None] | None, port: int) -> Iterator[None]:
    if attack is None:
        yield
        return
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    attacker = context.Process(target=attack, args=(port, stop))
    attacker.start()
    try:
        yield
    finally:
        stop.set()
        attacker.join(60)


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    options = parser.parse_args()
    attacks = {
        "nobody": None,
        f"HTTP/2 streams reset, {_RESETS:,} a connection": _reset_streams,
        f"a flood of CONTINUATION, {_CONTINUATIONS:,} a connection": _never_end_headers,
        f"a cookie in {_COOKIES:,} pieces": _split_cookies,
        "keys that nobody has": _guess_keys,
    }
    lines = ["| attack | p50, ms | p99, ms | failures |", "|---|---|---|---|"]
    with tempfile.TemporaryDirectory(prefix="peaje-bench-") as directory:
        with running(Path(directory) / "home", "--engine", "fake") as road:
            good = road.new_tenant("good", rpm=100_000_000)
            load = Load(
                port=road.port, path="/v1/chat/completions", body=json.dumps(chat(max_tokens=1)).encode(),
                headers={"authorization": f"Bearer {good.key}", "content-type": "application/json"},
                requests=_REQUESTS, connections=8,
            )  # fmt: skip
            asyncio.run(run(load))
            for name, attack in attacks.items():
                with _under_attack(attack, road.port):
                    result = asyncio.run(run(load))
                lines.append(f"| {name} | {result.quantile(0.5):.1f} | {result.quantile(0.99):.1f} | {result.failures} |")
                print(lines[-1], flush=True)
    if options.write:
        text = "\n".join(lines)
        document = _DOCUMENT.read_text()
        _DOCUMENT.write_text(re.sub(f"(?s){_BEGIN}.*{_END}", f"{_BEGIN}\n{text}\n{_END}", document))


if __name__ == "__main__":
    main()
