# SPDX-License-Identifier: Apache-2.0
"""Credits as double entry, re-ratings, and usage from outside the road."""

from chassis.schema.sqlfile import run_beside

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    """Run 0009_credits.sql."""
    run_beside(__file__)
