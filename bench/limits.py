# SPDX-License-Identifier: Apache-2.0
"""
`python -m bench.limits URL`: what a process of ratelimit pays to read all limits, and those of one tenant that changed.

URL names an empty database; it gets the schema, and tenants of two limits by COPY. `--write` puts the table into
docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import re
import time
from pathlib import Path
from typing import Final

import psycopg

from chassis.clock import utc_now
from chassis.schema.migrate import migrate
from chassis.stores.postgres import read_pool
from ratelimit.adapters.limits_source import LIMIT_CHANNEL, LimitsSource
from tests.dataplane.installation import REPOSITORY

TENANTS: Final = 50_000
_CHANGES: Final = 500
_UNITS: Final = ("requests", "tokens")
_DOCUMENT: Final = REPOSITORY / "docs/benchmarks.md"
_BEGIN, _END = "<!-- limits: begin -->", "<!-- limits: end -->"


def main() -> None:
    """Load, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--tenants", type=int, default=TENANTS)
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    asked = parser.parse_args()
    migrate(asked.url, utc_now().date())
    _load(asked.url, asked.tenants)
    table = _measure(asked.url, asked.tenants)
    print(table)
    if asked.write:
        text = _DOCUMENT.read_text()
        _DOCUMENT.write_text(re.sub(f"(?s){_BEGIN}.*{_END}", f"{_BEGIN}\n{table}\n{_END}", text))


def _load(url: str, tenants: int) -> None:
    with psycopg.connect(url) as connection, connection.cursor() as cursor:
        # As many notifications of one transaction are not what is measured.
        cursor.execute("set local session_replication_role = replica")
        now = utc_now()
        with cursor.copy("copy tenant (tenant_id, name, created_at) from stdin") as copy:
            for number in range(tenants):
                copy.write_row((f"bench-{number}", f"bench {number}", now))
        with cursor.copy("copy rate_limit (tenant_id, unit, period, amount, updated_at) from stdin") as copy:
            for number in range(tenants):
                for unit in _UNITS:
                    copy.write_row((f"bench-{number}", unit, "minute", 1000, now))


def _measure(url: str, tenants: int) -> str:
    count = tenants * len(_UNITS)
    pool = read_pool(url, name="bench", connections=1)
    pool.wait()
    source = LimitsSource(pool)
    resident = _resident_kib()
    spent = time.process_time()
    source.read_all(rest=0.0)
    spent = time.process_time() - spent
    changed = time.process_time()
    for number in range(_CHANGES):
        source.tell(LIMIT_CHANNEL, f"bench-{number}")
        source.read_changed()
    changed = time.process_time() - changed
    pool.close()
    return "\n".join(
        [
            "| limits | ratelimit, µs CPU a limit | µs CPU a change, of one tenant | resident process |", "|---|---|---|---|",
            f"| {count:,} | {spent / count * 1e6:.1f} | {changed / _CHANGES * 1e6:.0f} | {resident / 1024:.0f} MiB |",
        ]
    )  # fmt: skip


def _resident_kib() -> int:
    return int(re.findall(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[0])


if __name__ == "__main__":
    main()
