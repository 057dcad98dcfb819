# SPDX-License-Identifier: Apache-2.0
"""What `./peaje up` refuses: one clear line with the mend, exit status 1, nothing started."""

from __future__ import annotations

import asyncio
import http.server
import os
import re
import shutil
import socket
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import pytest

from control.laptop import envoy, runner, stores
from control.laptop.binaries import find_envoy
from control.laptop.engine import ask_model_server
from control.laptop.errors import Trouble
from control.laptop.places import Places, Ports, make
from control.laptop.postgres import Lodging, postgres_part
from control.laptop.scale import Scale
from tests.dataplane.installation import REPOSITORY, free_ports
from tests.integration.laptop import assert_nothing_started, attempt, check, copy_repository, processes_of, status_of

_PASSWORD = "hunter2-is-no-secret"
_PORTS = Ports(tenants=10000, control=10001, admin=9901)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A state directory that does not exist yet."""
    return tmp_path / "home"


def with_password(url: str, password: str) -> str:
    """The same server with another password."""
    parts = urlsplit(url)
    return parts._replace(netloc=f"{parts.username}:{password}@{parts.hostname}:{parts.port}").geturl()


# --- Stores -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [(), ("--detach",)], ids=["foreground", "detached"])
def test_a_wrong_postgres_password_is_refused_and_never_shown(
    home: Path, postgres_server: str, options: tuple[str, ...]
) -> None:
    """Neither on the screen nor in a log."""
    url = with_password(postgres_server, _PASSWORD)

    done = attempt(home, *options, environment={"PEAJE_POSTGRES_URL": url})

    assert_nothing_started(done)
    assert re.search(r"^PEAJE_POSTGRES_URL: .*password authentication failed.* Nothing was started; correct it, or unset it", done.line)
    assert not any(_PASSWORD in text for text in done.words())


def test_a_database_of_another_password_is_named_with_what_to_do(postgres_server: str, tmp_path: Path) -> None:
    """Who removed the state directory and not the database: where it is, and that removing it loses what it holds."""
    places = Places(tmp_path / "home")
    make(places, passable=False)
    lodging = Lodging(programs=tmp_path, data=tmp_path / "data", account=None, note=None)
    part = postgres_part(lodging, places, os.environ, port=urlsplit(postgres_server).port or 0)
    assert part.ready is not None

    with pytest.raises(Trouble, match=f"begin anew, remove {tmp_path}/data"):
        asyncio.run(part.ready())


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("mysql://peaje:{password}@127.0.0.1/db", "does not start with postgresql://"),
        ("127.0.0.1:5432", "does not start with postgresql://"),
        ("postgresql:/peaje", "does not start with postgresql://"),
        ("postgresql://[::1/db", "does not start with postgresql://"),
        ("postgresql://peaje:{password}@127.0.0.1:1/db?colour=red", "is not a PostgreSQL URL"),
        ("postgresql://peaje:{password}@127.0.0.1:{free}/db", "Connection refused"),
        ("postgresql://peaje@127.0.0.1:{free}/db?password={password}", "Connection refused"),
        ("postgresql://peaje:{password}@127.0.0.1:notaport/db", "PEAJE_POSTGRES_URL"),
        ("postgresql://peaje:{password}@host.invalid/db", "PEAJE_POSTGRES_URL"),
    ],
)
def test_a_postgres_url_that_leads_nowhere_is_refused(url: str, expected: str) -> None:
    """One line with the variable's name; never the password."""
    with pytest.raises(Trouble) as refused:
        stores.check_postgres(url.format(password=_PASSWORD, free=free_ports(1)[0]))

    [line] = refused.value.lines()
    assert "PEAJE_POSTGRES_URL" in line
    assert expected in line
    assert _PASSWORD not in line


def test_a_database_that_does_not_exist_is_refused(postgres_server: str) -> None:
    """As Postgres says it."""
    with pytest.raises(Trouble, match='database "nowhere" does not exist'):
        stores.check_postgres(f"{postgres_server.rpartition('/')[0]}/nowhere")


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://127.0.0.1", "does not start with redis://"),
        ("127.0.0.1:6379", "does not start with redis://"),
        ("redis://[::1", "does not start with redis://"),
        ("redis://:{password}@127.0.0.1:{free}/0", "Connection refused"),
        ("redis://:{password}@127.0.0.1:notaport/0", "PEAJE_REDIS_URL"),
        ("redis://:{password}@127.0.0.1:6379/notanumber", "PEAJE_REDIS_URL"),
        ("unix:///nowhere/valkey.sock?password={password}", "No such file"),
    ],
)
def test_a_redis_url_that_leads_nowhere_is_refused(url: str, expected: str) -> None:
    """As with Postgres."""
    with pytest.raises(Trouble) as refused:
        stores.check_redis(url.format(password=_PASSWORD, free=free_ports(1)[0]))

    [line] = refused.value.lines()
    assert "PEAJE_REDIS_URL" in line
    assert expected in line
    assert _PASSWORD not in line


@contextmanager
def answering(reply: bytes) -> Iterator[int]:
    """A port where everything is answered with *reply*."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    while connection.recv(4096):
                        connection.sendall(reply)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield int(server.getsockname()[1])
        server.shutdown(socket.SHUT_RDWR)
    thread.join(timeout=10)


def test_a_wrong_redis_password_is_refused_and_never_shown(home: Path, postgres_server: str) -> None:
    """The server's words, without ours."""
    with answering(b"-WRONGPASS invalid username-password pair or user is disabled.\r\n") as port:
        done = attempt(
            home, environment={"PEAJE_POSTGRES_URL": postgres_server, "PEAJE_REDIS_URL": f"redis://:{_PASSWORD}@127.0.0.1:{port}/0"}
        )

    assert_nothing_started(done)
    assert done.line.startswith("PEAJE_REDIS_URL: invalid username-password pair")
    assert not any(_PASSWORD in text for text in done.words())


def test_nothing_is_written_to_a_database_when_the_other_store_is_wrong(home: Path, postgres_url: str) -> None:
    """Both are looked at before either is used."""
    server = postgres_url.rpartition("/")[0]
    name = "untouched"
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(f"create database {name} template template0")

    done = attempt(
        home, environment={"PEAJE_POSTGRES_URL": f"{server}/{name}", "PEAJE_REDIS_URL": f"redis://127.0.0.1:{free_ports(1)[0]}/0"}
    )

    assert_nothing_started(done)
    assert done.line.startswith("PEAJE_REDIS_URL: ")
    with psycopg.connect(f"{server}/{name}") as connection:
        assert (0,) == connection.execute("select count(*) from pg_tables where schemaname = 'public'").fetchone()


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("postgresql://peaje:a%2Fb%40c@host/db", {"a%2Fb%40c", "a/b@c"}),
        ("postgresql://peaje@host/db?sslmode=require&password=p%26q", {"p&q"}),
        ("redis://:word@host:6379/0", {"word"}),
        ("postgresql://peaje@host/db", set()),
        ("postgresql://[::1", set()),
        ("", set()),
    ],
)
def test_every_spelling_of_a_password_is_known(url: str, expected: set[str]) -> None:
    """So that no tail of a log shows it."""
    assert expected == stores.passwords_in(url)


def test_the_users_passwords_are_hidden_like_ours(tmp_path: Path) -> None:
    """The longest first, because one may begin another."""
    place = Places(tmp_path)
    place.secrets.mkdir()
    (place.secrets / "admin-token").write_text("word\n")

    hidden = runner._texts_to_hide(place, {"PEAJE_POSTGRES_URL": "postgresql://u:word-and-more@h/d", "PEAJE_REDIS_URL": "redis://:other@h"})

    assert ["word-and-more", "other", "word"] == hidden


# --- Ports ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "purpose", "option"),
    [
        ("PEAJE_PORT", "the tenants' endpoint", "--port"),
        ("PEAJE_CONTROL_PORT", "the control API", "--control-port"),
        ("PEAJE_ADMIN_PORT", "Envoy's admin interface", "--admin-port"),
    ],
)
def test_a_taken_port_is_named_with_its_holder(home: Path, variable: str, purpose: str, option: str) -> None:
    """And the option that chooses another one."""
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        done = attempt(home, environment={variable: str(port)})

    assert_nothing_started(done)
    assert done.line.startswith(f"Port {port} ({purpose}) is taken by pid {os.getpid()} (")
    assert done.line.endswith(f"Stop that, or choose another port with {option}.")


def test_a_port_that_is_none_is_refused_before_anything_is_made(home: Path) -> None:
    """Not even the state directory."""
    done = attempt(home, environment={"PEAJE_PORT": "http"})

    assert (1, "PEAJE_PORT=http is not a port. Give a number from 1 to 65535.") == (done.status, done.line)
    assert not home.exists()


# --- The state directory -------------------------------------------------------------------------------


def test_a_state_directory_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    """Its files, its mode; a person's directory named by mistake."""
    (tmp_path / "thesis.txt").write_text("words")
    tmp_path.chmod(0o755)

    done = attempt(tmp_path)

    assert (1, f"{tmp_path} is not empty and not a state directory of Peaje. Name a new or an empty directory in PEAJE_HOME.") == (
        done.status, done.line,
    )  # fmt: skip
    assert ["thesis.txt"] == [path.name for path in tmp_path.iterdir()]
    assert 0o755 == stat.S_IMODE(tmp_path.stat().st_mode)


# --- Envoy's configuration -----------------------------------------------------------------------------

_BROKEN = [
    ("envoy.yaml", "static_resources:", "static_resources: [", r"envoy\.yaml, line \d+ is not YAML: "),
    ("envoy.yaml", "stat_prefix: tenants", "stat_prefixes: tenants", r"Envoy refuses envoy/envoy\.yaml: .*stat_prefixes"),
    ("envoy.yaml", "failure_mode_allow: false", "failure_mode_allow: maybe", r"Envoy refuses envoy/envoy\.yaml: .*maybe"),
    ("envoy.yaml", "- name: tenants\n    address", "- name: others\n    address", r"no listener named tenants"),
    ("gate.lua", "local function refuse", "locale function refuse", r"Envoy refuses envoy/envoy\.yaml: script load error: .*:\d+: '=' expected"),
]


def break_envoy(directory: Path, file: str, old: str, new: str) -> None:
    """Make one mistake in a copy of envoy/."""
    path = directory / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(("file", "old", "new", "expected"), _BROKEN, ids=["yaml", "field", "value", "listener", "lua"])
def test_a_broken_envoy_configuration_is_refused(home: Path, tmp_path: Path, file: str, old: str, new: str, expected: str) -> None:
    """In Envoy's own words, one line, before anything starts."""
    peaje = copy_repository(tmp_path / "copy")
    break_envoy(peaje.parent / "envoy", file, old, new)

    done = attempt(home, peaje=peaje)

    assert_nothing_started(done)
    assert re.search(expected, done.line), done.line


def test_a_configuration_that_envoy_takes_and_lint_does_not_is_refused_by_check(tmp_path: Path) -> None:
    """`./peaje check DIRECTORY`: a line for each finding, and the exit status."""
    peaje = copy_repository(tmp_path / "copy")
    broken = peaje.parent / "envoy"
    break_envoy(broken, "envoy.yaml", "failure_mode_allow: false", "failure_mode_allow: true")

    done = check(broken, home=tmp_path / "home")

    [line] = done.stdout.splitlines()
    assert 1 == done.returncode
    assert re.fullmatch(rf"{broken}/envoy\.yaml:\d+: ext_authz lets everybody pass when extauth is away\. Write failure_mode_allow: false; .*", line)


@pytest.mark.parametrize(("file", "old", "new", "expected"), [_BROKEN[0], _BROKEN[2]], ids=["yaml", "value"])
def test_check_refuses_what_envoy_refuses(tmp_path: Path, file: str, old: str, new: str, expected: str) -> None:
    """The same mistakes, without starting anything."""
    peaje = copy_repository(tmp_path / "copy")
    broken = peaje.parent / "envoy"
    break_envoy(broken, file, old, new)

    done = check(broken, home=tmp_path / "home")

    assert 1 == done.returncode
    assert str(broken) in done.stdout or "Envoy refuses" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_check_of_the_projects_own_configuration_finds_nothing(tmp_path: Path) -> None:
    """And says so."""
    done = check(REPOSITORY / "envoy", home=tmp_path / "home")

    assert (0, "Nothing to mend.\n") == (done.returncode, done.stdout)


def test_check_of_a_directory_that_is_not_there_says_so(tmp_path: Path) -> None:
    """In one line."""
    done = check(tmp_path / "nowhere", home=tmp_path / "home")

    [line] = done.stdout.splitlines()
    assert 1 == done.returncode
    assert line.startswith(f"{tmp_path / 'nowhere'}")


def test_a_directory_of_envoy_files_without_any_is_refused(tmp_path: Path) -> None:
    """The one that the setting names; without it the checkout's is taken."""
    with pytest.raises(Trouble) as caught:
        envoy.find_source({"PEAJE_ENVOY_SOURCE": str(tmp_path)})

    assert str(tmp_path) in caught.value.message
    assert REPOSITORY / "envoy" == envoy.find_source({})


def test_check_reads_the_envoy_files_that_up_would_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake in a copy of one's own is found there; a directory without any is named."""
    source = tmp_path / "mine"
    shutil.copytree(REPOSITORY / "envoy", source)
    bootstrap = source / "envoy.yaml"
    bootstrap.write_text(bootstrap.read_text().replace("failure_mode_deny: true", ""))
    monkeypatch.setenv("PEAJE_ENVOY_SOURCE", str(source))

    spoiled = check(home=tmp_path / "home")
    bootstrap.unlink()
    empty = check(home=tmp_path / "home")

    assert (1, 1) == (spoiled.returncode, empty.returncode)
    assert str(bootstrap) in spoiled.stdout
    assert [f"PEAJE_ENVOY_SOURCE is {source}, which has no envoy.yaml."] == [line.split(" Copy ")[0] for line in empty.stdout.splitlines()]


def test_what_up_renders_is_what_envoy_is_asked_about(tmp_path: Path) -> None:
    """The ports of this installation, all Lua, private; Envoy takes it."""
    place = Places(tmp_path)
    for name in ("run", "journal", "envoy"):
        (tmp_path / name).mkdir()
    envoy.render(place, Ports(tenants=20000, control=20001, admin=20002), Scale(counts={"ratelimit": 3}))
    for name in ("clusters", "routes"):
        (tmp_path / f"envoy/{name}.yaml").write_text("resources: []\n")

    envoy.validate(find_envoy(os.environ), place)

    text = (tmp_path / "envoy/envoy.yaml").read_text()
    assert "port_value: 20000" in text
    assert "port_value: 20002" in text
    sockets = ["run/extauth.sock", "run/ratelimit.sock", "run/ratelimit-2.sock", "run/ratelimit-3.sock", "run/metering.sock"]
    assert sockets == re.findall(r"path: (run/\S+\.sock)", text)
    sources = {path.relative_to(REPOSITORY / "envoy") for path in (REPOSITORY / "envoy").rglob("*.lua")}
    assert sources == {path.relative_to(tmp_path / "envoy") for path in (tmp_path / "envoy").rglob("*.lua")}
    assert {0o600} == {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "envoy").rglob("*.lua")}


# --- The model server ------------------------------------------------------------------------------------


@contextmanager
def model_server(status: int, body: bytes) -> Iterator[str]:
    """Something that answers every GET alike; its URL."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
    thread.join(timeout=10)


def test_a_model_server_that_does_not_answer_is_refused(home: Path, postgres_server: str) -> None:
    """With what was asked of it."""
    url = f"http://127.0.0.1:{free_ports(1)[0]}"

    done = attempt(home, "--model-server", url)

    assert_nothing_started(done)
    assert done.line.startswith(f"The model server does not answer: GET {url}/v1/models: ")
    assert done.line.endswith("Check --model-server.")


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (500, b"oops", "The model server answers 500 to GET "),
        (200, b"<html>", "is not an OpenAI-style list of models."),
        (200, b'{"data": "x"}', "is not an OpenAI-style list of models."),
        (200, b'{"object": "list"}', "is not an OpenAI-style list of models."),
        (200, b'{"data": []}', "serves no model yet."),
    ],
)
def test_a_model_server_that_answers_something_else_is_refused(status: int, body: bytes, expected: str) -> None:
    """It is not one, or not yet."""
    with model_server(status, body) as url, pytest.raises(Trouble) as refused:
        ask_model_server(url)

    [line] = refused.value.lines()
    assert expected in line


@pytest.mark.parametrize("url", ["ftp://host", "http://", "://", "http://[::1", "http://host:notaport", "http://host:99999"])
def test_a_model_server_that_is_not_a_url_is_refused(url: str) -> None:
    """Before it is asked."""
    with pytest.raises(Trouble, match=re.escape(f"--model-server {url} is not a URL.")):
        ask_model_server(url)


# --- Contradictions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "environment", "expected"),
    [
        (("--engine", "fake", "--model-server", "http://h:1"), {}, "--engine and --model-server are two answers to one question. Give one."),
        (("--engine", "fake"), {"PEAJE_MODELS": "m.yaml"}, "PEAJE_MODELS names the model servers already. Unset it, or leave out --engine."),
    ],
)  # fmt: skip
def test_two_answers_to_one_question_are_refused(home: Path, options: tuple[str, ...], environment: dict[str, str], expected: str) -> None:
    """Before anything is made."""
    done = attempt(home, *options, environment=environment)

    assert (1, expected) == (done.status, done.line)
    assert not home.exists()


# --- A part that dies while starting --------------------------------------------------------------------------


def test_a_part_that_dies_while_starting_is_named_with_the_end_of_its_log(home: Path, tmp_path: Path, postgres_url: str) -> None:
    """And the others are stopped; a password that it printed is not shown."""
    valkey = tmp_path / "valkey-server"
    valkey.write_text(
        "#!/bin/sh\n"
        '[ "$1" != --version ] || { echo "Valkey server v=9.1.2"; exit 0; }\n'
        'echo "out of memory, says the password $(sed -n s/requirepass.//p valkey/valkey.conf)"\nexit 3\n'
    )
    valkey.chmod(0o755)

    done = attempt(home, environment={"PEAJE_VALKEY_BIN": str(valkey), "PEAJE_POSTGRES_URL": postgres_url})

    first, *details = done.stderr.splitlines()
    assert 1 == done.status
    assert re.fullmatch(rf"\S+ valkey died with exit status 3 after [\d.]+ s while starting; the end of {home}/log/valkey\.log:", first)
    assert ["    out of memory, says the password ***"] == details
    assert [] == processes_of(home)
    assert 3 == status_of(home)


def test_a_database_that_refuses_our_tables_is_named_by_the_migrations(home: Path, postgres_url: str) -> None:
    """The password of a store that the user runs is hidden like ours."""
    server = urlsplit(postgres_url)
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute("drop role if exists reader")
        connection.execute(f"create role reader login password '{_PASSWORD}'")
        connection.execute("create database readonly template template0")
    url = f"postgresql://reader:{_PASSWORD}@{server.hostname}:{server.port}/readonly"

    done = attempt(home, environment={"PEAJE_POSTGRES_URL": url})

    assert 1 == done.status
    assert re.search(r"migrations died with exit status \d+ .*while starting; the end of .*migrations\.log:", done.stderr.splitlines()[0])
    assert "permission denied" in done.stderr
    assert not any(_PASSWORD in text for text in done.words())
    assert [] == processes_of(home)
