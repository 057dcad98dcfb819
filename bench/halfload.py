# SPDX-License-Identifier: Apache-2.0
"""
`python -m bench.halfload`: how much later answers come at a fixed rate, beside bare Envoy at the same one.

Two Envoys in front of one upstream, as in `bench.waterfall`: the first step of it and the one with everything on. The
rates are parts of what the latter does in a closed loop in the same run; latencies count from the moment at which a
request was due. `--write` puts the table into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Final

from bench import waterfall
from bench.load import Load, Result, run
from bench.steps import STEPS, Caller
from tests.dataplane.installation import REPOSITORY, running

SHARES: Final = (0.25, 0.5)
_EVERYTHING: Final = "+ second witness: everything"
_DOCUMENT: Final = REPOSITORY / "docs/benchmarks.md"
_BEGIN, _END = "<!-- halfload: begin -->", "<!-- halfload: end -->"
#: Seconds of load at each rate.
_SECONDS, _SECONDS_QUICK = 10.0, 4.0


def main() -> None:
    """Measure and print, or write into the document."""
    parser = argparse.ArgumentParser(prog="python -m bench.halfload", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="once, and shorter")
    parser.add_argument("--runs", type=int, default=None, help="whose medians are told (3; 1 with --quick)")
    parser.add_argument("--write", action="store_true", help=f"put the table into {_DOCUMENT.name}")
    asked = parser.parse_args()
    made = _measure(asked.runs or (1 if asked.quick else 3), _SECONDS_QUICK if asked.quick else _SECONDS)
    print(made)
    if asked.write:
        text = _DOCUMENT.read_text()
        _DOCUMENT.write_text(re.sub(f"(?s){_BEGIN}.*{_END}", f"{_BEGIN}\n{made}\n{_END}", text))


def table(most: float, found: dict[tuple[str, float], list[Result]], rates: dict[float, float]) -> str:
    """Medians by rate in Markdown: bare Envoy, Peaje, and what Peaje adds."""
    lines = [
        f"Most in a closed loop with everything on: {most:,.0f} requests/s.", "",
        "| part of it | requests/s | bare Envoy p50 / p99, ms | Peaje p50 / p99, ms | added p50 / p99, ms | failures |", "|---" * 6 + "|",
    ]
    for share, rate in rates.items():
        figures = {
            name: [median(result.quantile(q) for result in found[name, share]) for q in (0.5, 0.99)] for name in ("bare", "everything")
        }
        added = [ours - bare for ours, bare in zip(figures["everything"], figures["bare"], strict=True)]
        failures = sum(result.failures for name in figures for result in found[name, share])
        cells = (" / ".join(f"{it:.2f}" for it in those) for those in (figures["bare"], figures["everything"], added))
        lines.append(f"| {share:.0%} | {rate:,.0f} | {' | '.join(cells)} | {failures} |")
    return "\n".join(lines)


def _measure(runs: int, seconds: float) -> str:
    shape = waterfall.shapes(1.0)[0]
    steps = {"bare": STEPS[0], "everything": next(step for step in STEPS if step.name == _EVERYTHING)}
    with tempfile.TemporaryDirectory(prefix="peaje-bench-") as directory, ExitStack() as stack:
        place = Path(directory)
        road = stack.enter_context(running(place / "home", "--engine", "fake"))
        upstream = stack.enter_context(waterfall.serving_upstream())
        keys = waterfall.make_callers(road, 1)[Caller.FAR]
        loads = {}
        for name, step in steps.items():
            _, port = stack.enter_context(waterfall.step_envoy(road, step, place / name, upstream[1]))
            loads[name] = Load(
                port=port, path="/v1/chat/completions", headers={"content-type": "application/json"}, body=shape.body,
                requests=shape.requests, connections=waterfall.CONNECTIONS, keys=keys,
            )  # fmt: skip
            asyncio.run(run(replace(loads[name], requests=waterfall.WARM_REQUESTS)))
        closed = asyncio.run(run(loads["everything"]))
        most = shape.requests / closed.seconds
        rates = {share: share * most for share in SHARES}
        found: dict[tuple[str, float], list[Result]] = {}
        for number in range(runs):
            for share, rate in rates.items():
                for name, load in loads.items():
                    result = asyncio.run(run(replace(load, rate=rate, requests=int(rate * seconds))))
                    found.setdefault((name, share), []).append(result)
                    print(f"{number + 1} | {name} | {rate:.0f}/s | p99 {result.quantile(0.99):.2f} ms | {result.failures} failures", flush=True)
    return table(most, found, rates)


if __name__ == "__main__":
    main()
