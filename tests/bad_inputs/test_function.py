# SPDX-License-Identifier: Apache-2.0
"""Rows K as function calls: no transport, a directory in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from chassis.clock import utc_now
from extauth.adapters.identities import Identities
from extauth.servicer import Servicer
from tests.bad_inputs import world as worlds
from tests.bad_inputs.service import CATALOGUE, Check, directly

PEPPERS = {1: b"p" * 32}


@dataclass(kw_only=True)
class Bench:
    """What a row needs."""

    world: worlds.World
    memory: worlds.Memory
    check: Check


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """extauth's whole inside but Postgres and gRPC."""
    home = tmp_path_factory.mktemp("home")
    worlds.write_identity(home, {"policies": worlds.POLICIES})
    world = worlds.build(PEPPERS, utc_now())
    memory = worlds.Memory(world)
    identities = Identities(memory, peppers=PEPPERS, writes=None, home=home, control_url="http://127.0.0.1:1")  # type: ignore[arg-type]
    servicer = Servicer(identities, catalogue=lambda: CATALOGUE, clock=utc_now)
    return Bench(world=world, memory=memory, check=directly(servicer))


def expect(bench: Bench, row: dict[str, Any], ask: Callable[[], Any]) -> None:
    """Ask, and hold the answer against the row."""
    bench.memory.lookups = 0

    answer = ask()

    assert (row["status"], row.get("code")) == (answer.status, answer.code)
    # Nothing of an identity goes with a no.
    assert (row["status"] == 200) == bool(answer.metadata)
    if "lookups" in row:
        assert row["lookups"] == bench.memory.lookups


@pytest.mark.parametrize("row", worlds.rows("keys", "function"), ids=lambda row: row["id"])
def test_keys(bench: Bench, row: dict[str, Any]) -> None:
    """Each row gets exactly what it says."""
    expect(bench, row, lambda: bench.check(bench.world.headers(row), host=row.get("host", "a.example")))


def test_every_row_with_a_cve_runs_through_envoy() -> None:
    """A row that never met the real thing proves nothing."""
    through_envoy = [row["id"] for row in worlds.rows("keys", "envoy")]
    for level in worlds.LEVELS:
        assert [] == [row["id"] for row in worlds.rows("keys", level) if "cve" in row and row["id"] not in through_envoy]
