# SPDX-License-Identifier: Apache-2.0
"""Rows K as Envoy asks: over gRPC on a Unix socket, on a real Postgres."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, LiteralString

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chassis import keys
from chassis.clock import utc_now
from chassis.stores.postgres import ReadPool, fetch_all, read_pool
from extauth.adapters.directory import Directory
from extauth.adapters.identities import Identities
from extauth.adapters.key_writes import KeyWrites
from extauth.core.cache import FRESH_FOR, GRACE_FOR
from extauth.core.strangers import Strangers
from extauth.servicer import Servicer
from tests.bad_inputs import world as worlds
from tests.bad_inputs.service import CATALOGUE, Answer, Check, Clock, on_a_socket, request
from tests.hostile import callers as hostile_callers
from tests.hostile import rows as hostile_rows
from tests.identities import Call

#: Version 2 is newer than what the keys were made with.
PEPPERS = {1: b"p" * 32, 2: b"q" * 32}
#: Far above what anything here takes; a busy machine must not fail a test.
WAIT_SECONDS_MAX = 30.0


@dataclass(kw_only=True)
class Service:
    """One extauth on a database of its own."""

    world: worlds.World
    url: str
    check: Check
    writes: KeyWrites
    clock: Clock
    servicer: Servicer
    home: Path
    identities: Identities

    def sql(self, query: str, *arguments: Any) -> list[tuple[Any, ...]]:
        """Run one statement as the owner."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            cursor = connection.execute(query, arguments)  # type: ignore[arg-type]
            return cursor.fetchall() if cursor.description else []

    def key_id(self, name: str) -> str:
        """The id of a key by the rows' name for it."""
        return str(self.world.rows[name]["key_id"])

    def use(self, name: str, **attributes: Any) -> int:
        """Present a key; the status."""
        return self.check([("authorization", f"Bearer {self.world.texts[name]}".encode())], **attributes).status


@pytest.fixture
def service(postgres_url: str, tmp_path: Path) -> Iterator[Service]:
    """A whole extauth but for its process."""
    worlds.write_identity(tmp_path, {"policies": worlds.POLICIES})
    now = utc_now()
    world = worlds.build({1: PEPPERS[1]}, now)
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        worlds.store(world, connection, now)
    clock = Clock(now)
    pool = read_pool(postgres_url, name="extauth", connections=4)
    directory = Directory(pool, clock=clock)
    writes = KeyWrites(postgres_url, clock=clock, newest_pepper=2)
    identities = Identities(directory, peppers=PEPPERS, writes=writes, home=tmp_path, control_url="http://127.0.0.1:1")
    servicer = Servicer(identities, catalogue=lambda: CATALOGUE, clock=clock)
    with on_a_socket(servicer, tmp_path) as check:
        yield Service(
            world=world, url=postgres_url, check=check, writes=writes, clock=clock, servicer=servicer, home=tmp_path,
            identities=identities,
        )  # fmt: skip
    identities.close()
    pool.close()


def test_every_row_gets_what_it_says(service: Service) -> None:
    """All rows on one service, so that none leaves anything behind that would help the next."""
    wrong = []
    for row in worlds.rows("keys", "grpc"):
        answer = service.check(service.world.headers(row), host=row.get("host", "a.example"))
        wrong += [(row["id"], answer)] if (row["status"], row.get("code")) != (answer.status, answer.code) else []

    assert [] == wrong


def test_every_hostile_key_gets_what_the_function_gives_it(service: Service) -> None:
    """Rows K of tests/hostile, which say function and Envoy: over gRPC and on Postgres it is the same."""
    callers = hostile_callers.make()
    with psycopg.connect(service.url, autocommit=True) as connection:
        for caller in callers.values():
            caller.insert(connection, {1: PEPPERS[1]}, service.clock())
    stored = keys.hash_key(PEPPERS[1], callers["good"].key).hex()
    spellings = hostile_callers.spellings(callers) | {"stored_hash": stored}
    rows, wrong = hostile_rows.load("function"), []

    for row in rows:
        expected = row.expected["function"]
        answer = service.check(row.header_bytes(spellings), model=row.model, host=row.host, address=row.address)
        caller = callers[expected.caller].key_id if expected.caller else None
        if (answer.status, answer.code, answer.metadata.get("key_id")) != (expected.status[0], expected.code, caller):
            wrong.append((row.id, answer))

    assert len(rows) > 50
    assert [] == wrong


@pytest.mark.parametrize(
    ("statement", "code"),
    [
        ("update api_key set state = 'disabled' where key_id = %s", "key_disabled"),
        ("update api_key set revoked_at = now() - interval '1 day' where key_id = %s", "invalid_api_key"),
        ("update tenant set state = 'suspended' where tenant_id = 'acme' and %s <> ''", "tenant_suspended"),
        ("update project set state = 'suspended' where tenant_id = 'acme' and %s <> ''", "project_suspended"),
        ("update api_key set models = '{}' where key_id = %s", "model_not_allowed"),
        ("delete from api_key where key_id = %s", "invalid_api_key"),
    ],
)
def test_a_change_reaches_a_key_in_use_by_the_push_alone(
    service: Service, statement: str, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While other callers keep the service busy; what is remembered does not age here, so only the push can end it."""
    monkeypatch.setattr("extauth.core.cache.FRESH_FOR", timedelta(hours=1))
    service.clock.run()
    service.identities._directory.watch(service.url)
    listening = (
        "select count(*) from pg_stat_activity where datname = current_database() "
        "and application_name = 'extauth-listen' and query ilike '%%pg_notify%%'"
    )
    deadline = time.monotonic() + WAIT_SECONDS_MAX
    while service.sql(listening) != [(1,)] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert 200 == service.use("here")
    stop = threading.Event()
    failed: list[int] = []

    def others() -> None:
        while not stop.is_set():
            status = service.use("model_pattern")
            if status not in (200, 403):
                failed.append(status)

    threads = [threading.Thread(target=others) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        service.sql(statement, service.key_id("here"))
        deadline = time.monotonic() + WAIT_SECONDS_MAX
        while (answer := _answer(service, "here")) is None and time.monotonic() < deadline:
            pass
    finally:
        stop.set()
        for thread in threads:
            thread.join()

    assert code == answer
    assert [] == failed


def _answer(service: Service, name: str) -> str | None:
    return service.check([("authorization", f"Bearer {service.world.texts[name]}".encode())]).code


def test_postgres_away_known_keys_within_the_grace_unknown_ones_503(service: Service) -> None:
    """Never an allow for who is not known; after the grace nobody."""
    assert 200 == service.use("good")
    database = service.url.rpartition("/")[2]
    with psycopg.connect(service.url.rpartition("/")[0] + "/postgres", autocommit=True) as admin:
        admin.execute(f"alter database {database} allow_connections false")  # type: ignore[arg-type]
        admin.execute("select pg_terminate_backend(pid) from pg_stat_activity where datname = %s", (database,))
    start = service.clock()

    service.clock.move(start + GRACE_FOR - timedelta(seconds=1))
    assert 200 == service.use("good")
    assert 503 == service.use("here")
    assert 401 == service.check([("authorization", b"Bearer nonsense")]).status
    service.clock.move(start + GRACE_FOR)
    assert 503 == service.use("good")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids that were looked for in Postgres."""
    asked: list[str] = []
    def counted(pool: ReadPool, query: LiteralString, arguments: Sequence[Any]) -> list[tuple[Any, ...]]:
        asked.append(arguments[0])
        return fetch_all(pool, query, arguments)

    monkeypatch.setattr("extauth.adapters.directory.fetch_all", counted)
    return asked


def guess(service: Service, **attributes: Any) -> Answer:
    """Present a well-formed key that nobody has."""
    key = keys.mint("live", secrets.token_bytes).key
    return service.check([("authorization", f"Bearer {key}".encode())], **attributes)


def test_made_up_keys_cost_so_many_reads_and_a_key_in_use_is_never_touched(service: Service, reads: list[str]) -> None:
    """K04: after that each is refused unseen, until the next turn; who is remembered is asked about again all the same."""
    service.identities._strangers = Strangers(per_minute=6)
    assert 200 == service.use("good")
    before = len(reads)

    answers = [guess(service) for _ in range(20)]

    assert [401] * 6 + [429] * 14 == [answer.status for answer in answers]
    assert {"too_many_unknown_credentials"} == {answer.code for answer in answers[6:]}
    assert "10" == answers[-1].headers["retry-after"]
    assert 6 == len(reads) - before
    service.clock.move(service.clock() + FRESH_FOR)
    assert 200 == service.use("good")
    assert 7 == len(reads) - before


def test_who_comes_from_another_address_has_not_guessed(service: Service, reads: list[str]) -> None:
    """It is Envoy's word for the client that counts, where it says one, not the last proxy before Envoy."""
    service.identities._strangers = Strangers(per_minute=1)
    guess(service, told="192.0.2.7", address="10.0.0.1")

    assert 429 == guess(service, told="192.0.2.7", address="10.0.0.2").status
    assert 401 == guess(service, told="192.0.2.8", address="10.0.0.1").status
    assert 401 == guess(service, address="10.0.0.1").status
    assert 3 == len(reads)


def test_an_unknown_key_is_looked_for_once_in_a_minute_and_takes_one_turn(service: Service, reads: list[str]) -> None:
    """K04's other bound; a client with a dead key does not use up the turns of its office."""
    service.identities._strangers = Strangers(per_minute=2)
    start = service.clock()

    for seconds in (0, 1, 59):
        service.clock.move(start + timedelta(seconds=seconds))
        assert 401 == service.use("unknown")
    before = len(reads)
    service.clock.move(start + timedelta(seconds=60))
    assert 401 == service.use("unknown")

    assert (1, 2) == (before, len(reads))


def test_a_cold_start_of_many_good_keys_takes_no_turn(service: Service, reads: list[str]) -> None:
    """They are looked for, found, and nobody is refused."""
    service.identities._strangers = Strangers(per_minute=1)

    answers = {name: service.use(name) for name in service.world.rows}

    assert len(service.world.rows) == len(reads)
    assert 429 not in answers.values()
    assert 401 == guess(service).status


def test_a_network_of_a_key_is_judged_by_the_address_that_envoy_tells(service: Service) -> None:
    """H02 behind a proxy: not by the proxy's own."""
    key = [("authorization", f"Bearer {service.world.texts['elsewhere']}".encode())]

    assert 200 == service.check(key, told="192.0.2.7", address="127.0.0.1").status
    assert 403 == service.check(key, told="127.0.0.1", address="192.0.2.7").status


def test_uses_are_written_once_a_minute_and_those_after_rotation_are_counted(service: Service) -> None:
    """One batch, no NOTIFY, no write for a second use in the same minute."""
    for _ in range(3):
        service.use("rotated")
    service.use("good")
    service.writes.flush()

    query = "select last_used_at, uses_after_rotation from api_key where key_id = %s"
    now = service.clock()
    assert [(now, 3)] == service.sql(query, service.key_id("rotated"))
    assert [(now, 0)] == service.sql(query, service.key_id("good"))

    service.clock.move(now + timedelta(seconds=59))
    service.use("good")
    service.writes.flush()
    assert [(now, 0)] == service.sql(query, service.key_id("good"))

    service.clock.move(now + timedelta(seconds=60))
    service.writes.flush()
    assert [(now + timedelta(seconds=59), 0)] == service.sql(query, service.key_id("good"))


def test_a_verified_key_moves_to_the_newest_pepper_and_keeps_working(service: Service) -> None:
    """Only the verified hash is replaced, and the old pepper is then not needed for it."""
    service.use("good")
    service.use("wrong_secret")
    service.writes.flush()

    (stored,) = service.sql("select key_hash, pepper_version from api_key where key_id = %s", service.key_id("good"))
    assert (keys.hash_key(PEPPERS[2], service.world.texts["good"]), 2) == (bytes(stored[0]), stored[1])
    service.clock.move(service.clock() + timedelta(seconds=6))
    assert 200 == service.use("good")
    assert [(1,)] == service.sql("select pepper_version from api_key where key_id = %s", service.key_id("here"))


def test_a_key_that_changed_meanwhile_keeps_its_hash(service: Service) -> None:
    """A re-hash never overwrites what it did not verify."""
    service.use("good")
    service.sql("update api_key set key_hash = %s where key_id = %s", b"n" * 32, service.key_id("good"))
    service.writes.flush()

    assert [(b"n" * 32, 1)] == service.sql("select key_hash, pepper_version from api_key where key_id = %s", service.key_id("good"))


def test_a_faulty_document_keeps_the_last_good_and_a_good_one_is_taken(service: Service) -> None:
    """Build, validate, swap."""
    worlds.write_identity(service.home, {"policies": [{"name": "p", "deny": "model =="}]})
    service.identities.reload_if_changed()
    assert 200 == service.use("good")
    assert 403 == service.use("good", host="b.example")

    policies = [{"name": "none", "deny": "model != ''", "message": "Closed."}]
    worlds.write_identity(service.home, {"policies": policies})
    service.identities.reload_if_changed()
    assert 403 == service.use("good")

    (service.home / "identity.yaml").unlink()
    service.identities.reload_if_changed()
    assert 403 == service.use("good")


_NAMES = st.sampled_from(["authorization", "x-api-key", "Authorization", "x-request-id", "cookie"]) | st.text(max_size=20)
_VALUES = (
    st.binary(max_size=300)
    | st.binary(max_size=60).map(lambda raw: b"Bearer " + raw)
    | st.sampled_from([b"Bearer peaje_live_0123456789AB_0123456789abcdefghijklmnopqrstuv1fTxeV", b"Bearer a.b.c", b"Bearer e30.e30.e30", b"Bearer op_x"])
)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    headers=st.lists(st.tuples(_NAMES, _VALUES), max_size=6),
    model=st.text(max_size=30), dialect=st.text(max_size=20), host=st.text(max_size=20), address=st.text(max_size=20), principal=st.text(max_size=40),
)  # fmt: skip
def test_whatever_is_sent_nobody_crashes_it_and_nobody_passes(
    service: Service, headers: list[tuple[str, bytes]], model: str, dialect: str, host: str, address: str, principal: str
) -> None:
    """Random headers, repeated, not UTF-8, raw: always a refusal that can be read."""
    check = request([], model=model, dialect="openai.chat", host=host, address=address, principal=principal)
    check.attributes.metadata_context.filter_metadata["peaje.request"].fields["dialect"].string_value = dialect
    for name, value in headers:
        if name != "x-request-id":
            check.attributes.request.http.header_map.headers.add(key=name, raw_value=value)

    answer = service.servicer.check(type(check).FromString(check.SerializeToString()), Call())  # type: ignore[arg-type]

    assert 0 != answer.status.code
    assert 400 <= int(answer.denied_response.status.code) < 600
    assert not answer.dynamic_metadata.fields


