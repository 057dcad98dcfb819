# SPDX-License-Identifier: Apache-2.0
"""A stream can be ended by the gateway itself, where its budget ends."""

from chassis.schema.sqlfile import run_beside

revision = "0006"
down_revision = "0004"


def upgrade() -> None:
    """Run 0006_stopped_streams.sql."""
    run_beside(__file__)
