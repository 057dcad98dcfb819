# SPDX-License-Identifier: Apache-2.0
"""The stores of the integration tests."""

from __future__ import annotations

from tests.integration.conftest import _migrated_template, counter_store, postgres_server, postgres_url

__all__ = ["_migrated_template", "counter_store", "postgres_server", "postgres_url"]
