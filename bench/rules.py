# SPDX-License-Identifier: Apache-2.0
"""
`python -m bench.rules`: what a request by operators' rules costs ratelimit and the store, and how often it asks.

The servicer as it is served, one thread, on a Valkey of its own; without Envoy and gRPC. `--write` puts the table
into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import os
import re
import time
from pathlib import Path
from typing import Any, Final

import redis

from chassis.wire import ratelimit_pb2 as wire
from ratelimit.adapters.counters import connect
from ratelimit.adapters.rule_counters import RuleCounters
from tests.dataplane.installation import REPOSITORY
from tests.integration.stores import store_server
from tests.ratelimit_rules import context, request, rules_of, serving

REQUESTS: Final = 10_000
_DOCUMENT: Final = REPOSITORY / "docs/benchmarks.md"
_BEGIN, _END = "<!-- rules: begin -->", "<!-- rules: end -->"
_TICKS: Final = os.sysconf("SC_CLK_TCK")
_RULES: Final = {
    "domain": "bench",
    "descriptors": [
        {"key": "path", "value": "/api/*/orders", "rate_limit": {"unit": "hour", "requests_per_unit": 100}},
        {"key": "remote_address", "rate_limit": {"unit": "minute", "requests_per_unit": 100}},
    ],
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    asked = parser.parse_args()
    lines = ["| descriptors | ratelimit, µs CPU | Valkey, µs CPU | scripts a request |", "|---|---|---|---|"]
    with store_server() as url:
        lines += [_row(connect(url, cluster=False), count) for count in (1, 2, 10)]
    table = "\n".join(lines)
    print(table)
    if asked.write:
        text = _DOCUMENT.read_text()
        _DOCUMENT.write_text(re.sub(f"(?s){_BEGIN}.*{_END}", f"{_BEGIN}\n{table}\n{_END}", text))


def _row(store: redis.Redis, descriptors: int) -> str:
    servicer = serving(rules_of(_RULES), RuleCounters(store))
    raw = [_request(number, descriptors) for number in range(REQUESTS)]
    for one in raw[:500]:
        servicer.should_rate_limit(wire.RateLimitRequest.FromString(one), context())
    server = Path(f"/proc/{_info(store)['process_id']}/stat")
    before, scripts, ours = _cpu(server), _scripts(store), time.process_time()
    for one in raw:
        servicer.should_rate_limit(wire.RateLimitRequest.FromString(one), context()).SerializeToString()
    ours, theirs, scripts = time.process_time() - ours, _cpu(server) - before, _scripts(store) - scripts
    return f"| {descriptors} | {ours / REQUESTS * 1e6:.0f} | {theirs / REQUESTS * 1e6:.0f} | {scripts / REQUESTS:.0f} |"


def _request(number: int, descriptors: int) -> bytes:
    paths = [f"path=/api/{number}-{index}/orders" for index in range(descriptors - 1)]
    return bytes(request("bench", [f"remote_address=192.0.2.{number % 256}", *paths]).SerializeToString())


def _cpu(stat: Path) -> float:
    fields = stat.read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def _info(store: redis.Redis, section: str = "server") -> Any:
    return store.info(section)


def _scripts(store: redis.Redis) -> int:
    stats = _info(store, "commandstats")
    return sum(int(stats.get(f"cmdstat_{name}", {"calls": 0})["calls"]) for name in ("eval", "evalsha"))


if __name__ == "__main__":
    main()
