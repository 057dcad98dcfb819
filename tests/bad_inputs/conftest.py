# SPDX-License-Identifier: Apache-2.0
"""One issuer for all rows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.bad_inputs import issuer as issuers
from tests.integration.conftest import _migrated_template, postgres_server, postgres_url

__all__ = ["_migrated_template", "issuer", "postgres_server", "postgres_url"]


@pytest.fixture(scope="module")
def issuer() -> Iterator[issuers.Issuer]:
    """A real one, on loopback."""
    with issuers.serving() as serving:
        yield serving
