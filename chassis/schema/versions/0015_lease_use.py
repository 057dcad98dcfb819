# SPDX-License-Identifier: Apache-2.0
"""What leases of quotas were spent on."""

from chassis.schema.sqlfile import run_beside

revision = "0015"
down_revision = "0014"


def upgrade() -> None:
    """Run 0015_lease_use.sql."""
    run_beside(__file__)
