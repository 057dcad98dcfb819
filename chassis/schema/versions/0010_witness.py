# SPDX-License-Identifier: Apache-2.0
"""Two streams of records per journal, and what a second witness says about the ledger."""

from chassis.schema.sqlfile import run_beside

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    """Run 0010_witness.sql."""
    run_beside(__file__)
