# SPDX-License-Identifier: Apache-2.0
"""Installations shared by the tests: one on the fake engine, one on NVIDIA Dynamo."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.dataplane.installation import Installation, Tenant, running


@pytest.fixture(scope="session")
def road(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    """Everything real but the model server, which is the instrument."""
    with running(tmp_path_factory.mktemp("road"), "--engine", "fake") as installation:
        yield installation
        # After everything that the tests have done to it, the ledger still holds.
        verified = installation.cli("ledger", "verify")
        assert verified["ok"], verified


@pytest.fixture(scope="session")
def dynamo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    """Everything real: what `./peaje up` starts by itself."""
    with running(tmp_path_factory.mktemp("dynamo")) as installation:
        yield installation


@pytest.fixture
def tenant(road: Installation) -> Tenant:
    """A tenant without limits on the fake engine's road."""
    return road.new_tenant()

