# SPDX-License-Identifier: Apache-2.0
"""
`python -m bench.collector URL`: how many journal records a second one collector writes.

URL names an empty database; it gets the schema and a generated journal's rows. The journal has the
records of exchanges as they lie under load: three tenants, two models, one open for every ten ended.
"""

from __future__ import annotations

import argparse
import gc
import logging
import tempfile
import time
from pathlib import Path

import psycopg
import structlog

from chassis.schema.migrate import migrate
from metering.collector import GARBAGE_THRESHOLD
from tests.journals import NOON, collecting, exchanges, write_apart

_EXCHANGES_DEFAULT = 100_000
_SIZE = "select sum(pg_total_relation_size(relid)) from pg_partition_tree('usage_event')"


def main() -> None:
    """Measure and print one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--exchanges", type=int, default=_EXCHANGES_DEFAULT)
    arguments = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    gc.set_threshold(GARBAGE_THRESHOLD)
    migrate(arguments.url, NOON.date())
    with tempfile.TemporaryDirectory() as directory:
        live = write_apart(Path(directory) / "journal/journal.jsonl", exchanges(arguments.exchanges))
        size = sum(path.stat().st_size for path in live.parent.iterdir())
        with collecting(arguments.url, live) as collector:
            wall, cpu = time.perf_counter(), time.process_time()
            while collector.step(NOON, 0.0):
                pass
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    with psycopg.connect(arguments.url) as connection:
        [(size_of_rows,)] = connection.execute(_SIZE).fetchall()
    records = 2 * arguments.exchanges
    print(
        f"{records} records, {size / 1e6:.0f} MB: {records / cpu:,.0f} records/s per core of the collector, "
        f"{records / wall:,.0f} records/s with Postgres beside it; "
        f"{size_of_rows / arguments.exchanges:,.0f} bytes a row with its indexes"
    )


if __name__ == "__main__":
    main()
