# SPDX-License-Identifier: Apache-2.0
"""Limits of every unit and period, per tenant, project, key, model and any combination."""

from chassis.schema.sqlfile import run_beside

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Run 0004_limits.sql."""
    run_beside(__file__)
