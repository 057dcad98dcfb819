# SPDX-License-Identifier: Apache-2.0
"""What `peaje check` says of the environment's settings."""

from __future__ import annotations

import os

import pytest

from control.cli.environment import faults
from control.reference import SETTINGS

KINDS = [kind for _, kind in SETTINGS]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("PEAJE_COLLECTOR_IDLE_SECONDS", "abc", "PEAJE_COLLECTOR_IDLE_SECONDS: Input should be a valid number"),
        ("PEAJE_DRAIN_SECONDS", "-1", "PEAJE_DRAIN_SECONDS: Input should be greater than or equal to 0"),
        ("PEAJE_TRACES_PERCENT", "200", "PEAJE_TRACES_PERCENT: "),
        ("PEAJE_ADMIN_PORT", "many", "PEAJE_ADMIN_PORT: "),
        ("PEAJE_EXTAUTH_PROCESSES", "0", "is no number of processes"),
        ("PEAJE_LOG_LEVEL", "loud", "Use one of debug"),
        ("PEAJE_EXTAUTH_PROCESES", "2", "PEAJE_EXTAUTH_PROCESES is no setting, and does nothing. Is PEAJE_EXTAUTH_PROCESSES meant?"),
        ("PEAJE_COLECTOR_IDLE_SECONDS", "2", "Is PEAJE_COLLECTOR_IDLE_SECONDS meant?"),
    ],
)
def test_a_setting_that_no_part_would_start_with_or_that_nobody_reads_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    """Before anything is started by it; a part that dies of it says so in its own log only."""
    monkeypatch.setenv(name, value)

    found = faults(os.environ, KINDS)

    assert [True] * len(found) == [name in one or said in one for one in found]
    assert [said] == [said for one in found if said in one], found


def test_what_is_right_or_belongs_to_others_is_not_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kubernetes and compose files have names that begin alike."""
    for name, value in (
        ("PEAJE_EXTAUTH_PROCESSES", "2"), ("PEAJE_POSTGRES_PASSWORD", "secret"), ("PEAJE_PEPPER", "secret"),
        ("PEAJE_EXTAUTH_SERVICE_HOST", "10.0.0.1"), ("PEAJE_COLLECTOR_IDLE_SECONDS", "0.5"),
    ):  # fmt: skip
        monkeypatch.setenv(name, value)

    assert [] == faults(os.environ, KINDS)
