# SPDX-License-Identifier: Apache-2.0
"""`python -m chassis.schema`: upgrade the database that PEAJE_POSTGRES_URL names."""

from __future__ import annotations

import sys

from chassis.clock import utc_now
from chassis.errors import PeajeError
from chassis.schema.migrate import migrate
from chassis.settings import StoreSettings


def main() -> int:
    """Upgrade and print one line: what was done, or why not. The exit status is 0 or 1."""
    try:
        print(migrate(StoreSettings().require_postgres(), utc_now().date()))
    except PeajeError as exc:
        print(f"chassis.schema: {exc}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
