# SPDX-License-Identifier: Apache-2.0
"""Identity: what a key may do, service accounts, operators, the audit log, row-level security."""

from chassis.schema.sqlfile import run_beside

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Run 0002_identity.sql."""
    run_beside(__file__)
