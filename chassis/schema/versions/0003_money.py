# SPDX-License-Identifier: Apache-2.0
"""Money: rate cards, amounts, periods, adjustments; a place per journal file, and what was no record."""

from chassis.schema.sqlfile import run_beside

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Run 0003_money.sql."""
    run_beside(__file__)
