# SPDX-License-Identifier: Apache-2.0
"""Parts die again and again under load, alone and together; the bill is the same. Minutes: only with --chaos."""

from __future__ import annotations

import json

import pytest

from tests.chaos.storm import INEXACT_SHARE_MAX, Storm, judge
from tests.dataplane.installation import Installation, running
from tests.dataplane.test_storm import outage

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]

_STORM_REQUESTS = 12_000
#: About as long as a part takes to be back, so that deaths meet parts that work and parts that start.
_BETWEEN_DEATHS_SECONDS = 3.0
#: A million requests take two hours on two cores: a thousand deaths.
_BETWEEN_DEATHS_OF_A_MILLION_SECONDS = 6.0
#: Two cores that share everything do about this many while parts die.
_STORM_REQUESTS_PER_SECOND = 150


@pytest.mark.parametrize(
    "parts",
    [
        ("metering",), ("collector",), ("extauth",), ("ratelimit",), ("valkey",), ("postgres",), ("collector", "postgres"),
        ("extauth", "ratelimit", "metering", "valkey"),
    ],
    ids="+".join,
)  # fmt: skip
def test_a_storm_of_deaths_loses_no_row_and_doubles_none(road: Installation, parts: tuple[str, ...]) -> None:
    """Every answer has one row; what the engine produced is what the row says, and nothing is a guess: Envoy lives."""
    storm = Storm(road=road, requests=_STORM_REQUESTS, seed=3, between=_BETWEEN_DEATHS_SECONDS, parts=parts)

    storm.rage()
    report = judge(storm, storm.settled())

    print(report)
    assert {} == report["wrong"]
    assert sum(storm.deaths.values()) >= 3
    assert len(storm.heard.whole) > 50
    assert 0 == report["inexact"]


def test_postgres_away_for_five_minutes_under_load_loses_no_row(road: Installation) -> None:
    """What the short form does in seconds."""
    outage(road, seconds=300.0, requests=300 * _STORM_REQUESTS_PER_SECOND)


@pytest.mark.timeout(0)
def test_a_million_requests_through_a_thousand_deaths(
    tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> None:
    """
    Every part, Envoy too; hours. `--storm-requests` makes it shorter, `--storm-seed` the same again.

    What Envoy takes with it depends on how often it dies: `--storm-requests-per-envoy-death`. All else is exact.
    """
    requests, seed, per_death = (
        pytestconfig.getoption(f"storm_{name}") for name in ("requests", "seed", "requests_per_envoy_death")
    )
    home = tmp_path_factory.mktemp("million")
    with running(home, "--engine", "fake", "--restarts", "1000000") as road:
        storm = Storm(
            road=road, requests=requests, seed=seed, between=_BETWEEN_DEATHS_OF_A_MILLION_SECONDS,
            requests_per_envoy_death=per_death,
        )  # fmt: skip
        storm.rage()
        report = judge(storm, storm.settled())
        report["ledger"] = road.cli("ledger", "verify")
        report["exceptions"] = road.cli("reconcile", "list")["counts"]
        path = home.parent / f"kill-storm-{seed}.json"
        path.write_text(json.dumps(report, indent=1))
        print(f"\nkill storm: report in {path}\n{json.dumps(report, indent=1)}")

        assert {} == report["wrong"]
        assert report["ledger"]["ok"]
        assert report["inexact_otherwise"]["share"] <= INEXACT_SHARE_MAX
        with_envoy = report["inexact_with_their_envoy"]
        assert with_envoy["under_way"] <= with_envoy["under_way_at_most"]
        assert report["rows"] > requests / 2
