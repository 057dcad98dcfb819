# SPDX-License-Identifier: Apache-2.0
"""docs/scale.md says what follows from docs/benchmarks.md, and its closed form is what the simulation shows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bench.lending import Scenario, asked_row, play
from bench.scale import EXTAUTH_KEYS_MAX, QUESTIONS_A_LIFE, Load, asked, asked_share, put, read_costs, tables
from extauth.core.cache import KNOWN_COUNT_MAX


@pytest.fixture
def measured(repository: Path) -> str:
    """What was measured."""
    return (repository / "docs/benchmarks.md").read_text()


def test_the_document_is_current(repository: Path, measured: str) -> None:
    """`python -m bench.scale --write` makes it; of what it plays the cheapest line is played again."""
    document = (repository / "docs/scale.md").read_text()

    assert document == put(document, tables(measured))
    assert asked_row(0) in document


def test_a_new_measurement_changes_it(measured: str) -> None:
    """Each figure is read where it stands: one that is doubled doubles what follows from it."""
    costs = read_costs(measured)
    slower = f"{2 * costs.limit_read:.1f} |"
    doubled = measured.replace(f"| {costs.limit_read:.1f} |", f"| {slower}", 1)

    assert 2 * costs.limit_read == read_costs(doubled).limit_read
    assert {"inputs", "parts", "breaks"} == {name for name, table in tables(doubled).items() if table != tables(measured)[name]}


def test_what_is_missing_is_named(measured: str) -> None:
    """No figure is made up where a line went."""
    with pytest.raises(ValueError, match=r"bytes|size of a row"):
        read_costs(measured.replace("bytes a row", "bytes"))
    with pytest.raises(ValueError, match="no place for inputs"):
        put("# Scale\n", {"inputs": ""})


@pytest.mark.parametrize(
    ("workers", "load", "first_byte"), [(1, 0.1, 0.2), (10, 0.5, 0.2), (100, 0.5, 0.2), (1000, 0.1, 0.2), (1, 0.1, 1.0), (10, 0.1, 1.0)]
)
def test_the_closed_form_is_what_the_simulation_shows(workers: int, load: float, first_byte: float) -> None:
    """To a tenth of the requests, from twenty a second at a worker to one in fifty seconds."""
    requests = int(3000 * load * max(1, 2 * first_byte))
    seen = play(Scenario(workers=workers, per_minute=12_000, load=load, used=0.0, requests=requests, first_byte_us=int(first_byte * 1e6)))

    said = asked_share(load * 200 / workers, first_byte_seconds=first_byte, questions=QUESTIONS_A_LIFE)
    assert said == pytest.approx(seen.asked_each, abs=0.1)


def test_shares_of_tenants_add_up_to_the_load() -> None:
    """Where nobody is remembered every request asks; a tenant on fewer workers asks less."""
    load = Load(near_share=1.0)
    spread = asked(load, workers=100, workers_a_tenant=100)

    assert load.requests_per_second == pytest.approx(spread.ratelimit, rel=1e-3)
    assert asked(load, workers=100, workers_a_tenant=8).extauth < spread.extauth < load.requests_per_second
    assert 2 * spread.ratelimit == pytest.approx(asked(replace(load, requests_per_second=2e5), workers=100, workers_a_tenant=100).ratelimit)


def test_the_keys_that_a_process_remembers_are_extauths() -> None:
    """The bound of its own core."""
    assert KNOWN_COUNT_MAX == EXTAUTH_KEYS_MAX
