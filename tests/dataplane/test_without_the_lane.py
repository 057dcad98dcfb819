# SPDX-License-Identifier: Apache-2.0
"""
The same road with the express lane off: what is true of a request does not depend on who remembers.

The short form of `./peaje test --express off`, which runs every test so: these are the tests of the other modules, on an
installation of this module's own.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from chassis.contract import EXPRESS_ENVIRONMENT
from tests.dataplane.installation import VISIBLE_SECONDS, Installation, Tenant, chat, running
from tests.dataplane.test_limits import test_what_was_held_is_replaced_by_what_the_engine_counted
from tests.dataplane.test_metering import test_hourly_sums_equal_the_rows
from tests.dataplane.test_refusals import (
    test_a_request_larger_than_its_limit_is_told_that_it_never_passes,
    test_two_hundred_at_once_with_room_for_ten_admits_ten,
)

__all__ = [
    "test_a_request_larger_than_its_limit_is_told_that_it_never_passes", "test_hourly_sums_equal_the_rows",
    "test_two_hundred_at_once_with_room_for_ten_admits_ten", "test_what_was_held_is_replaced_by_what_the_engine_counted",
]  # fmt: skip


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    """In place of everybody's road."""
    settings = {EXPRESS_ENVIRONMENT: "off", "PEAJE_COLLECTOR_IDLE_SECONDS": "0.1"}
    with running(tmp_path_factory.mktemp("asking"), "--engine", "fake", environment=settings) as installation:
        yield installation
        verified = installation.cli("ledger", "verify")
        assert verified["ok"], verified


def test_every_request_is_asked_about(road: Installation, tenant: Tenant) -> None:
    """The switch switches: nobody is remembered, and each request has its row."""
    before = road.asked_extauth()

    answers = [road.post(tenant, json=chat()) for _ in range(6)]

    assert [200] * 6 == [answer.status_code for answer in answers]
    assert before + 6 == road.asked_extauth()
    assert {answer.headers["x-request-id"] for answer in answers} == {row["request_id"] for row in road.rows(tenant, 6)}


def test_a_key_that_is_revoked_is_out(road: Installation, tenant: Tenant) -> None:
    """As soon as extauth has heard of it."""
    assert 200 == road.post(tenant, json=chat()).status_code

    road.control("POST", f"/v1/keys/{tenant.key_id}/revoke").raise_for_status()

    deadline = time.monotonic() + VISIBLE_SECONDS
    while road.post(tenant, json=chat()).status_code != 401:
        assert time.monotonic() < deadline
        time.sleep(0.05)
