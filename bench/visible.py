# SPDX-License-Identifier: Apache-2.0
"""`python -m bench.visible`: how long after an exchange ended its row can be read, under load."""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from pathlib import Path

from bench.load import Load, run
from tests.dataplane.installation import chat, running

_REQUESTS_DEFAULT = 6000
_CONNECTIONS = 16
_ROWS = """
select count(*) as rows, percentile_disc(array[0.5, 0.99, 1.0]) within group (order by extract(epoch from recorded_at - ended_at)) as seconds
from usage_event where tenant_id = %s
"""


def main() -> None:
    """Measure and print one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=_REQUESTS_DEFAULT)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory, running(Path(directory), "--engine", "fake") as installation:
        tenant = installation.new_tenant("visible")
        load = Load(
            port=installation.port, path="/v1/chat/completions", body=json.dumps(chat(stream=True, max_tokens=16)).encode(),
            headers={"authorization": f"Bearer {tenant.key}", "content-type": "application/json"},
            requests=arguments.requests, connections=_CONNECTIONS,
        )
        result = asyncio.run(run(load))
        found = installation.sql(_ROWS, tenant.tenant_id)[0]
        while found["rows"] < arguments.requests - result.failures:
            time.sleep(0.5)
            found = installation.sql(_ROWS, tenant.tenant_id)[0]
    half, most, longest = (float(seconds) for seconds in found["seconds"])
    print(
        f"{found['rows']} streams at {arguments.requests / result.seconds:,.0f} a second: a row is committed after "
        f"{half:.2f} s (p50), {most:.2f} s (p99), {longest:.2f} s at most; {result.failures} failures"
    )


if __name__ == "__main__":
    main()
