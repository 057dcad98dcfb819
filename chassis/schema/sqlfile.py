# SPDX-License-Identifier: Apache-2.0
"""Run the .sql file beside a version file: SQL is written as SQL."""

from __future__ import annotations

from pathlib import Path

from alembic import op


def run_beside(version_file: str) -> None:
    """Run `NNNN_name.sql` for the caller's `NNNN_name.py`, as one script of many statements."""
    script = Path(version_file).with_suffix(".sql").read_text("utf-8")
    # Past SQLAlchemy: it would read parameters into "%" and ":" and refuse several statements.
    driver = op.get_bind().connection.driver_connection
    assert driver is not None
    driver.execute(script)
