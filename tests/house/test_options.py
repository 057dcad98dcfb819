# SPDX-License-Identifier: Apache-2.0
"""`./peaje test` leaves out what is long, says so, and runs it when asked."""

from __future__ import annotations

import pytest

from tests import conftest

pytest_plugins = ["pytester"]

_SUITE = """
import os, pytest
@pytest.mark.chaos
def test_storm(): pass
@pytest.mark.soak
def test_hours(): pass
@pytest.mark.chaos
@pytest.mark.soak
def test_both(): pass
def test_short(): assert "PEAJE_REDIS_URL" not in os.environ and os.environ["PEAJE_ENV"] == "kept"
"""


@pytest.fixture
def suite(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A small suite under our conftest, run by somebody who has settings."""
    monkeypatch.setenv("PEAJE_ENV", "kept")
    monkeypatch.setenv("PEAJE_REDIS_URL", "redis://elsewhere.example")
    pytester.makeconftest(f"from tests.conftest import *\nfrom tests.conftest import {', '.join(_hooks())}")
    pytester.makepyfile(_SUITE)
    return pytester


def _hooks() -> list[str]:
    return [name for name in vars(conftest) if name.startswith("pytest_")]


@pytest.mark.parametrize(
    ("options", "passed", "said"),
    [
        ([], 1, ["2 chaos tests left out (kill storms): --chaos runs them", "2 soak tests left out (hours of load): --soak runs them"]),
        (["--chaos"], 2, ["2 soak tests left out (hours of load): --soak runs them"]),
        (["--soak"], 2, ["2 chaos tests left out (kill storms): --chaos runs them"]),
        (["--chaos", "--soak"], 4, []),
    ],
)  # fmt: skip
def test_long_tests_run_when_asked_for_and_are_named_when_not(
    suite: pytest.Pytester, options: list[str], passed: int, said: list[str]
) -> None:
    """A test with both marks needs both options."""
    result = suite.runpytest_inprocess("-p", "no:cacheprovider", "--strict-markers", *options)

    result.assert_outcomes(passed=passed, deselected=4 - passed)
    assert said == [line for line in result.outlines if "left out" in line]
