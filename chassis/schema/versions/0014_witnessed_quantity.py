# SPDX-License-Identifier: Apache-2.0
"""What two sources say differently of what is metered besides tokens."""

from chassis.schema.sqlfile import run_beside

revision = "0014"
down_revision = "0013"


def upgrade() -> None:
    """Run 0014_witnessed_quantity.sql."""
    run_beside(__file__)
