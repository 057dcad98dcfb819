# SPDX-License-Identifier: Apache-2.0
"""Events out: the outbox, the webhooks that read it, and what was told already."""

from chassis.schema.sqlfile import run_beside

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    """Run 0008_events.sql."""
    run_beside(__file__)
