# SPDX-License-Identifier: Apache-2.0
"""Rows K and J as function calls: no transport, a directory in memory, a real issuer on loopback."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from chassis.clock import utc_now
from extauth.adapters.identities import Identities
from extauth.servicer import Servicer
from tests.bad_inputs import issuer as issuers
from tests.bad_inputs import world as worlds
from tests.bad_inputs.service import CATALOGUE, Check, directly
from tests.bad_inputs.tokens import TOKENS

PEPPERS = {1: b"p" * 32}


@dataclass(kw_only=True)
class Bench:
    """What a row needs."""

    world: worlds.World
    memory: worlds.Memory
    check: Check


@pytest.fixture(scope="module")
def bench(issuer: issuers.Issuer, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """extauth's whole inside but Postgres and gRPC."""
    home = tmp_path_factory.mktemp("home")
    worlds.write_identity(home, issuers.document(issuer) | {"policies": worlds.POLICIES}, issuers.CLIENT_SECRET)
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


@pytest.mark.parametrize("row", worlds.rows("tokens", "function"), ids=lambda row: row["id"])
def test_tokens(bench: Bench, issuer: issuers.Issuer, row: dict[str, Any]) -> None:
    """Each row gets exactly what it says, and no token makes us fetch anything but the key set."""
    token = TOKENS[str(row["token"])](issuer)

    expect(bench, row, lambda: bench.check([("authorization", f"Bearer {token}".encode())]))

    assert {"/jwks"} >= set(issuer.paths)


@pytest.mark.parametrize("row", worlds.rows("introspections", "function"), ids=lambda row: row["id"])
def test_introspections(bench: Bench, issuer: issuers.Issuer, row: dict[str, Any]) -> None:
    """A yes is a JSON true; what is neither yes nor no is 503, and is asked again."""
    status, body = row["answer"]
    token = f"op_{row['id']}"
    issuer.introspections[token] = (status, body.encode())
    headers = [("authorization", f"Bearer {token}".encode())]

    expect(bench, row, lambda: bench.check(headers))

    before = issuer.introspected
    bench.check(headers)
    assert (1 if row["status"] == 503 else 0) == issuer.introspected - before


def test_every_row_with_a_cve_runs_through_envoy() -> None:
    """A row that never met the real thing proves nothing."""
    for section in ("keys", "tokens", "introspections"):
        through_envoy = [row["id"] for row in worlds.rows(section, "envoy")]
        for level in worlds.LEVELS:
            assert [] == [row["id"] for row in worlds.rows(section, level) if "cve" in row and row["id"] not in through_envoy]
