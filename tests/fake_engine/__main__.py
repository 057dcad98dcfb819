# SPDX-License-Identifier: Apache-2.0
"""Start one fake engine and serve until told to stop."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
from typing import Any

from .faults import KNOBS, BadKnob, Faults, read_faults
from .kinds import KINDS
from .server import FakeEngine
from .truth import TruthLog

#: Clients of a load test all connect at once.
BACKLOG = 4096


def read_arguments() -> argparse.Namespace:
    """Read the command line; `--help` lists every knob."""
    knobs = "\n".join(f"  {name:17} {knob['does']} ({knob['takes'].words})" for name, knob in KNOBS.items())
    parser = argparse.ArgumentParser(
        prog="python -m tests.fake_engine",
        description=f"A model server that writes down what it really produced.\n\nknobs:\n{knobs}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--port", type=int, required=True, help="0 takes a free one and prints it")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--engine", choices=sorted(KINDS), required=True)
    parser.add_argument("--model", action="append", required=True, help="a model's name; may be repeated")
    parser.add_argument("--truth", required=True, metavar="FILE", help="where the truth is appended")
    parser.add_argument("--chunk-ms", type=float, default=0, help="the knob of that name, for every request")
    parser.add_argument("--faults", metavar="JSON", help="knobs for every request; a request may set them anew")
    arguments = parser.parse_args()
    try:
        arguments.faults = read_faults(arguments.faults, read_faults(f'{{"chunk_ms": {arguments.chunk_ms}}}', Faults()))
    except BadKnob as exc:
        parser.error(str(exc))
    return arguments


def die_of_bug(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """End the process: an exchange that fails here would be a hole in the truth."""
    loop.default_exception_handler(context)
    os._exit(os.EX_SOFTWARE)


async def serve(arguments: argparse.Namespace) -> None:
    """Serve until SIGTERM or SIGINT; exchanges that still run then are cut as by a crash, without a record."""
    engine = FakeEngine(KINDS[arguments.engine], arguments.model, TruthLog(arguments.truth), arguments.faults)
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(die_of_bug)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    server = await loop.create_server(engine.connect, arguments.host, arguments.port, backlog=BACKLOG)
    host, port = server.sockets[0].getsockname()[:2]
    print(f"fake engine ({arguments.engine}) on http://{host}:{port}", flush=True)
    await stop.wait()
    os._exit(os.EX_OK)


if __name__ == "__main__":
    asyncio.run(serve(read_arguments()))
