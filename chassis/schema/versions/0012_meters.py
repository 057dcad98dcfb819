# SPDX-License-Identifier: Apache-2.0
"""What is metered besides tokens, with its price, and journals that are gone for good."""

from chassis.schema.sqlfile import run_beside

revision = "0012"
down_revision = "0010"


def upgrade() -> None:
    """Run 0012_meters.sql."""
    run_beside(__file__)
