# SPDX-License-Identifier: Apache-2.0
"""
`python -m bench.slices`: what a stream costs that is held in slices, beside one that is held whole.

CPU of each process per 50-chunk stream. Each stream has a tenant of its own, whose monthly quota is far away (whole)
or less than four times what is asked for (slices of 16 tokens: three renewals).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from pathlib import Path

from bench.__main__ import _COUNTED
from bench.cpu import cpu_seconds
from bench.load import Load, run
from tests.dataplane.installation import Installation, running

_BODY = json.dumps(
    {"model": "tiny", "messages": [{"role": "user", "content": "hello there"}], "max_tokens": 50, "stream": True}
).encode()
_QUOTAS = {"whole": 1_000_000_000, "slices": 200}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.slices", description=__doc__)
    parser.add_argument("--streams", type=int, default=150, help="streams of each kind")
    options = parser.parse_args()
    print("| streams | " + " | ".join(_COUNTED) + " | all |")
    print("|---|" + "---|" * (len(_COUNTED) + 1))
    with tempfile.TemporaryDirectory(prefix="peaje-bench-") as home:
        with running(Path(home) / "state", "--engine", "fake", environment={"PEAJE_RATELIMIT_SLICE_TOKENS": "16"}) as road:
            status = {part["name"]: part["pid"] for part in road.status()["parts"]}
            pids = {name: int(status[name]) for name in _COUNTED if status.get(name)}
            for held, quota in _QUOTAS.items():
                keys = [_key(road, f"{held}-{number}", quota) for number in range(options.streams)]
                time.sleep(2.0)  # until the last limit acts
                before = {name: cpu_seconds(pid) for name, pid in pids.items()}
                for key in keys:
                    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
                    load = Load(port=road.port, path="/v1/chat/completions", headers=headers, body=_BODY, requests=1, connections=1)
                    assert asyncio.run(run(load)).failures == 0
                time.sleep(1.5)  # the collector and settlements finish what this load made
                spent = {name: 1e6 * (cpu_seconds(pid) - before[name]) / options.streams for name, pid in pids.items()}
                cells = " | ".join(f"{spent.get(name, 0):.0f}" for name in _COUNTED)
                print(f"| held {held} | {cells} | {sum(spent.values()):.0f} |", flush=True)


def _key(road: Installation, name: str, quota: int) -> str:
    tenant = road.new_tenant(name)
    answer = road.control("PUT", f"/v1/tenants/{tenant.tenant_id}/limits", json={"monthly_tokens": quota})
    answer.raise_for_status()
    return tenant.key


if __name__ == "__main__":
    main()
