# SPDX-License-Identifier: Apache-2.0
"""Rate cards with tiers: other prices for requests with longer prompts."""

from chassis.schema.sqlfile import run_beside

revision = "0013"
down_revision = "0012"


def upgrade() -> None:
    """Run 0013_tiers.sql."""
    run_beside(__file__)
