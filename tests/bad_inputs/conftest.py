# SPDX-License-Identifier: Apache-2.0
"""A real Postgres for the rows that need one."""

from __future__ import annotations

from tests.integration.conftest import _migrated_template, postgres_server, postgres_url

__all__ = ["_migrated_template", "postgres_server", "postgres_url"]
