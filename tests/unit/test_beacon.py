# SPDX-License-Identifier: Apache-2.0
"""The beacon: every change is said, said again, and what may have been missed is said to be missed."""

from __future__ import annotations

from pathlib import Path

import pytest

from chassis.beacon import CHANGES_MAX, DOCUMENT_READ_AFTER_SECONDS, SAID_AGAIN_AFTER_SECONDS, Beacon, News


@pytest.fixture
def beacon(tmp_path: Path) -> Beacon:
    """Give a beacon that has just been lit, beside one document."""
    document = tmp_path / "models.yaml"
    document.write_text("one")
    lit = Beacon(path=tmp_path / "changes", documents=(document,), news=News(sequence=100))
    lit.step(0.0)
    return lit


def lines(beacon: Beacon) -> list[str]:
    """Read what Envoy reads."""
    return beacon.path.read_text().splitlines()


def test_it_says_who_changed_and_says_it_again(beacon: Beacon) -> None:
    """A service that heard of it late has answered with the old state meanwhile; the second time ends that."""
    start = int(lines(beacon)[0])

    beacon.heard("peaje_api_key", "KEY1")
    beacon.step(1.0)
    first = lines(beacon)
    beacon.step(1.0 + SAID_AGAIN_AFTER_SECONDS / 2)
    between = lines(beacon)
    beacon.step(1.0 + SAID_AGAIN_AFTER_SECONDS)

    assert [f"{start + 1}", f"{start + 1} KEY1"] == first
    assert first == between
    assert [f"{start + 2}", f"{start + 1} KEY1", f"{start + 2} KEY1"] == lines(beacon)


def test_many_changes_of_one_are_one(beacon: Beacon) -> None:
    """A burst costs no more than its last."""
    for _ in range(1000):
        beacon.heard("peaje_tenant", "acme")
    beacon.step(1.0)

    # More than can be told at once came in, so it is a gap; a few are told once.
    assert 1 == len(lines(beacon))
    for _ in range(3):
        beacon.heard("peaje_tenant", "acme")
    beacon.step(1.1)
    assert ["acme"] == [line.split()[1] for line in lines(beacon)[1:]]


def test_a_lost_connection_is_a_gap(beacon: Beacon) -> None:
    """The listener hands on an empty payload: nobody knows what was missed."""
    before = int(lines(beacon)[0])
    beacon.heard("peaje_api_key", "KEY1")
    beacon.heard("peaje_api_key", "")
    beacon.step(1.0)

    assert 1 == len(lines(beacon))
    assert int(lines(beacon)[0]) > before + 1


def test_more_changes_than_can_be_told_are_a_gap(beacon: Beacon) -> None:
    """At the bound each is told; beyond it none."""
    for number in range(CHANGES_MAX):
        beacon.heard("peaje_api_key", f"k{number}")
    beacon.step(1.0)
    assert CHANGES_MAX + 1 == len(lines(beacon))

    for number in range(CHANGES_MAX + 1):
        beacon.heard("peaje_api_key", f"k{number}")
    beacon.step(2.0)

    assert 1 == len(lines(beacon))


def test_a_replaced_document_is_a_gap(beacon: Beacon) -> None:
    """Which models are served is part of every decision."""
    before = lines(beacon)
    [document] = beacon.documents

    beacon.step(1.0)
    assert before == lines(beacon)
    document.unlink()
    document.write_text("two")
    beacon.step(2.0)

    assert 1 == len(lines(beacon))
    assert lines(beacon) != before


def test_a_replaced_document_is_a_gap_again_once_every_service_has_read_it(beacon: Beacon) -> None:
    """Until then one may have answered by the old one, and a worker of Envoy has remembered that."""
    [document] = beacon.documents
    document.unlink()
    document.write_text("two")
    beacon.step(1.0)
    first = lines(beacon)

    beacon.heard("peaje_tenant", "acme")
    beacon.step(1.0 + DOCUMENT_READ_AFTER_SECONDS / 2)
    told = lines(beacon)
    beacon.step(1.0 + DOCUMENT_READ_AFTER_SECONDS)
    again = lines(beacon)
    beacon.step(1.0 + 3 * DOCUMENT_READ_AFTER_SECONDS)

    assert (1, 2, 1) == (len(first), len(told), len(again))
    assert int(again[0]) > int(told[0]) + 1
    assert again == lines(beacon)


def test_a_file_that_cannot_be_written_is_tried_again(tmp_path: Path) -> None:
    """Nothing heard meanwhile is lost."""
    place = tmp_path / "run"
    beacon = Beacon(path=place / "changes", documents=(), news=News(sequence=100))
    beacon.heard("peaje_tenant", "acme")
    beacon.step(0.0)
    place.mkdir()

    beacon.step(0.1)

    assert ["101", "101 acme"] == lines(beacon)


def test_only_the_owner_can_read_it(beacon: Beacon) -> None:
    """It names keys and tenants."""
    assert 0o600 == beacon.path.stat().st_mode & 0o777
