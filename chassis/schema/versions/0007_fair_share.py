# SPDX-License-Identifier: Apache-2.0
"""What the pools of model servers can take, and each tenant's weight in them."""

from chassis.schema.sqlfile import run_beside

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    """Run 0007_fair_share.sql."""
    run_beside(__file__)
