# SPDX-License-Identifier: Apache-2.0
"""Tenants, keys, limits; the journal's position; usage and the billing views."""

from chassis.schema.sqlfile import run_beside

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Run 0001_road.sql."""
    run_beside(__file__)
