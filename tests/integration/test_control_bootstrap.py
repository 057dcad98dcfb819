# SPDX-License-Identifier: Apache-2.0
"""The first operator: a token in a file, once, for fifteen minutes, and only while there is none."""

from __future__ import annotations

import asyncio
import secrets
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from chassis import keys as formats
from chassis.errors import Unavailable
from control import bootstrap
from control.api import __main__ as entry
from control.laptop import admission
from control.laptop.admission import Addresses
from control.laptop.errors import Trouble
from control.laptop.places import Places
from tests.integration.control_plane import ControlPlane, start

ADDRESSES = Addresses(endpoint="http://endpoint.test", control="http://control.test")


@pytest.fixture
def fresh(postgres_url: str, tmp_path: Path) -> Iterator[ControlPlane]:
    """A control API without any operator."""
    plane = start(postgres_url, tmp_path)
    yield plane
    plane.services.store.close()


def open_road(plane: ControlPlane) -> str | None:
    """What the start of the control plane does; the token that it wrote."""
    services = plane.services
    bootstrap.open_road(services.store, services.mint, services.bootstrap_token_path, now=plane.clock.now)
    path = services.bootstrap_token_path
    return path.read_text().strip() if path.exists() else None


def exchange(plane: ControlPlane, token: str | None) -> Any:
    return plane.client.post("/v1/bootstrap", json={"token": token})


def test_the_token_becomes_the_first_platform_admins_once(fresh: ControlPlane) -> None:
    """A second time it is as wrong as any, and its file is gone."""
    token = open_road(fresh)
    assert 0o600 == stat.S_IMODE(fresh.services.bootstrap_token_path.stat().st_mode)

    answer = exchange(fresh, token)

    assert (201, "platform-admin", None) == (answer.status_code, answer.json()["role"], answer.json()["tenant_id"])
    assert 200 == fresh.ask("GET", "/v1/tenants", answer.json()["token"]).status_code
    assert not fresh.services.bootstrap_token_path.exists()
    assert 401 == exchange(fresh, token).status_code


def test_it_is_over_after_fifteen_minutes(fresh: ControlPlane) -> None:
    """To the microsecond; a new start makes a new one."""
    token = open_road(fresh)
    fresh.clock.now += timedelta(minutes=15)
    assert 401 == exchange(fresh, token).status_code

    token = open_road(fresh)
    fresh.clock.now += timedelta(minutes=15) - timedelta(microseconds=1)
    assert 201 == exchange(fresh, token).status_code


def test_a_new_start_ends_the_token_of_the_one_before(fresh: ControlPlane) -> None:
    """One token at a time is good: the one in the file."""
    first, second = open_road(fresh), open_road(fresh)

    assert 401 == exchange(fresh, first).status_code
    assert 201 == exchange(fresh, second).status_code


def test_every_wrong_token_has_one_answer(fresh: ControlPlane) -> None:
    """Nothing, garbage, an invented one, another kind."""
    open_road(fresh)
    invented = formats.mint_token("boot", secrets.token_bytes).token
    other_kind = formats.mint_token("op", secrets.token_bytes).token

    answers = [exchange(fresh, token) for token in ("", "x", invented, other_kind, "\x00")]

    assert {401} == {answer.status_code for answer in answers}
    assert 1 == len({answer.json()["error"]["message"] for answer in answers})
    assert 400 == exchange(fresh, "x" * 257).status_code


def test_with_a_platform_admin_there_is_no_road(fresh: ControlPlane) -> None:
    """Not even for a token that was written before: two starts may race."""
    token = open_road(fresh)
    with psycopg.connect(str(fresh.services.store._pool.conninfo)) as connection:
        connection.execute(
            "insert into operator (operator_id, name, role, token_hash, pepper_version, created_at) "
            "values ('op_000000000000', 'x', 'platform-admin', decode(repeat('00', 32), 'hex'), 1, now())"
        )

    assert 401 == exchange(fresh, token).status_code
    assert open_road(fresh) is None


def test_without_a_usable_platform_admin_the_road_opens_again(fresh: ControlPlane) -> None:
    """How the database's owner gets back in when the last token is lost."""
    assert 201 == exchange(fresh, open_road(fresh)).status_code
    assert open_road(fresh) is None
    with psycopg.connect(str(fresh.services.store._pool.conninfo)) as connection:
        connection.execute("update operator set revoked_at = now()")

    assert 201 == exchange(fresh, open_road(fresh)).status_code


def test_of_many_at_once_one_becomes_the_first(fresh: ControlPlane) -> None:
    """Single use holds under concurrency."""
    token = open_road(fresh)

    with ThreadPoolExecutor(8) as pool:
        statuses = sorted(answer.status_code for answer in pool.map(lambda _: exchange(fresh, token), range(8)))

    assert [201, *[401] * 7] == statuses


def ensure(plane: ControlPlane, places: Places) -> None:
    """What `up` does, against this control API."""

    async def run() -> None:
        transport = httpx.ASGITransport(app=plane.app)
        async with httpx.AsyncClient(transport=transport) as client:
            await admission.ensure_operator(client, places, ADDRESSES)

    asyncio.run(run())


@pytest.mark.parametrize("left", [None, "peaje_admin_of_an_earlier_version_0000000", "another databases"])
def test_up_gets_itself_the_first_operators_token(fresh: ControlPlane, tmp_path: Path, left: str | None) -> None:
    """Also when the file holds what an earlier database knew; a token that works is left alone."""
    places = Places(tmp_path)
    places.secrets.mkdir()
    token_path = places.secrets / "admin-token"
    if left is not None:
        token_path.write_text(left)
    token = open_road(fresh)
    assert token is not None
    (places.secrets / "bootstrap-token").write_text(token + "\n")

    ensure(fresh, places)
    made = token_path.read_text().strip()
    ensure(fresh, places)

    assert 200 == fresh.ask("GET", "/v1/operators", made).status_code
    assert made == token_path.read_text().strip()
    assert 0o600 == stat.S_IMODE(token_path.stat().st_mode)


def test_up_without_a_token_that_works_says_what_to_do(
    fresh: ControlPlane, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A database that has operators already, and none of them is at hand."""
    assert 201 == exchange(fresh, open_road(fresh)).status_code
    places = Places(tmp_path)
    places.secrets.mkdir()
    monkeypatch.setattr(admission, "_OPERATOR_SECONDS", 0.0)

    with pytest.raises(Trouble, match="admin-token is not the token of an operator"):
        ensure(fresh, places)


def test_a_start_without_postgres_offers_the_road_once_it_answers(
    fresh: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control plane starts all the same, and nobody has to restart it."""
    real, failures = bootstrap.open_road, iter([Unavailable("away"), Unavailable("away")])

    def flaky(*arguments: Any, **named: Any) -> bool:
        for failure in failures:
            raise failure
        return real(*arguments, **named)

    monkeypatch.setattr(bootstrap, "open_road", flaky)
    monkeypatch.setattr(entry, "_RETRY_SECONDS", 0.0)
    monkeypatch.setattr(entry, "utc_now", fresh.clock)

    entry._open_bootstrap_later(fresh.services)

    assert 201 == exchange(fresh, fresh.services.bootstrap_token_path.read_text().strip()).status_code


def test_a_database_that_does_not_lend_the_role_says_what_to_grant(postgres_url: str, tmp_path: Path) -> None:
    """On a managed Postgres the role may have been made by somebody else."""
    name = f"app_{secrets.token_hex(4)}"
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(f"create role {name} login password 'pw' nosuperuser")
    plane = start(f"postgresql://{name}:pw@{postgres_url.rpartition('@')[2]}", tmp_path)

    answer = exchange(plane, formats.mint_token("boot", secrets.token_bytes).token)

    assert 503 == answer.status_code
    assert f"grant peaje_control to {name}" in answer.text
    plane.services.store.close()
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(f"drop role {name}")
