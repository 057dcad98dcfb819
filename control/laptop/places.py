# SPDX-License-Identifier: Apache-2.0
"""
Where one installation keeps its things, and which ports it uses.

Everything hangs on the state directory (PEAJE_HOME); two of them never share anything.
"""

from __future__ import annotations

import os
import secrets as random_source
import stat
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from chassis.secrets import write_private
from control.laptop.errors import Trouble

REPOSITORY = Path(__file__).resolve().parents[2]

DEFAULT_TENANTS_PORT = 10000
DEFAULT_CONTROL_PORT = 10001
DEFAULT_ADMIN_PORT = 9901

#: A Unix socket's path holds 107 bytes and a closing zero (sockaddr_un).
SOCKET_PATH_BYTES_MAX = 107
#: Made first and kept: tells a state directory of ours from a directory named by mistake,
#: whose mode we would otherwise change.
MARKER = "peaje-state"
LAYOUT = "1\n"

#: What the secrets that `make` makes consist of; the services read them, `chassis.secrets` checks their modes.
_URL_SAFE = string.ascii_letters + string.digits


@dataclass(frozen=True, slots=True, kw_only=True)
class Ports:
    """The TCP ports that people choose, all on loopback."""

    tenants: int
    control: int
    admin: int


@dataclass(frozen=True, slots=True)
class Places:
    """Paths under one state directory."""

    home: Path

    @property
    def run(self) -> Path:
        """Sockets, the lock and the state."""
        return self.home / "run"

    @property
    def log(self) -> Path:
        """One file per part."""
        return self.home / "log"

    @property
    def secrets(self) -> Path:
        """Passwords, the pepper, signing keys, the first operator's token, the demo tenant's key."""
        return self.home / "secrets"

    @property
    def journal(self) -> Path:
        """Envoy's access log: what bills rest on."""
        return self.home / "journal"

    @property
    def envoy(self) -> Path:
        """The rendered configuration that Envoy runs on."""
        return self.home / "envoy"

    @property
    def postgres(self) -> Path:
        """Holds the data directory, unless its user could not reach it here."""
        return self.home / "postgres"

    @property
    def valkey(self) -> Path:
        """Valkey's append-only file and its configuration."""
        return self.home / "valkey"

    @property
    def dynamo(self) -> Path:
        """What NVIDIA Dynamo keeps between its two processes."""
        return self.home / "dynamo"

    @property
    def state(self) -> Path:
        """What the supervisor last knew, for `status` and for the next `up`."""
        return self.run / "state.json"

    @property
    def lock(self) -> Path:
        """Held by the running supervisor."""
        return self.run / "supervisor.lock"

    def secret(self, name: str) -> str:
        """The text of one secret; only after `make`."""
        return (self.secrets / name).read_text().strip()


def read_home(environ: Mapping[str, str]) -> Path:
    """The state directory; `./peaje` has made it absolute against the caller's directory."""
    return Path(os.path.abspath(environ.get("PEAJE_HOME") or REPOSITORY / ".peaje"))


def read_environment_path(environ: Mapping[str, str]) -> Path:
    """Where `./peaje` made the Python environment."""
    return Path(os.path.abspath(environ.get("PEAJE_ENV") or REPOSITORY / ".venv"))


def read_ports(
    environ: Mapping[str, str], *, tenants: int | None, control: int | None, admin: int | None
) -> Ports:
    """An option wins over its environment variable, which wins over the default."""

    def pick(option: int | None, variable: str, default: int) -> int:
        text = environ.get(variable)
        value = option if option is not None else (int(text) if text and text.isdigit() else None)
        if value is None and text:
            raise Trouble(f"{variable}={text} is not a port.", mend="Give a number from 1 to 65535.")
        value = default if value is None else value
        if not 0 < value < 65536:
            raise Trouble(f"{value} is not a port.", mend="Give a number from 1 to 65535.")
        return value

    ports = Ports(
        tenants=pick(tenants, "PEAJE_PORT", DEFAULT_TENANTS_PORT),
        control=pick(control, "PEAJE_CONTROL_PORT", DEFAULT_CONTROL_PORT),
        admin=pick(admin, "PEAJE_ADMIN_PORT", DEFAULT_ADMIN_PORT),
    )
    if len({ports.tenants, ports.control, ports.admin}) < 3:
        raise Trouble(
            f"The ports must differ: tenants {ports.tenants}, control {ports.control}, admin {ports.admin}.",
            mend="Change one with --port, --control-port or --admin-port.",
        )
    return ports


def make(places: Places, *, passable: bool) -> None:
    """
    Make the state directory and its secrets; what exists is kept.

    *passable* lets other users pass through (not list) the directory itself, which
    Postgres needs when root runs it under another user. Everything inside stays owner-only.
    """
    home = places.home
    _check_ours(home)
    try:
        home.mkdir(parents=True, exist_ok=True)
        marker = home / MARKER
        if not marker.exists():
            write_private(marker, LAYOUT)
        os.chmod(home, 0o711 if passable else 0o700)
        for path in (
            places.run,
            places.log,
            places.secrets,
            places.journal,
            places.envoy,
            places.valkey,
            places.dynamo,
        ):
            path.mkdir(mode=0o700, exist_ok=True)
            os.chmod(path, 0o700)
        _make_secrets(places)
    except OSError as exc:
        raise Trouble(
            f"Cannot make the state directory {home}: {exc.strerror} ({exc.filename}).",
            mend="Name another one in PEAJE_HOME.",
        ) from exc


def socket_address(home: Path, relative: str) -> str:
    """
    An absolute path for the socket at *relative*, short enough to connect to.

    Redis clients take no relative socket path in a URL. Every process of ours has the
    state directory as its working directory, so the link that Linux keeps to it stands in.
    """
    absolute = str(home / relative)
    if len(os.fsencode(absolute)) <= SOCKET_PATH_BYTES_MAX:
        return absolute
    return f"/proc/self/cwd/{relative}"


def _check_ours(home: Path) -> None:
    """Refuse a directory that is not ours before its mode is touched."""
    try:
        status = home.stat()
    except FileNotFoundError:
        return
    except OSError as exc:
        raise Trouble(
            f"Cannot use the state directory {home}: {exc.strerror}.",
            mend="Name another one in PEAJE_HOME.",
        ) from exc
    if not stat.S_ISDIR(status.st_mode):
        raise Trouble(f"{home} is not a directory.", mend="Name another one in PEAJE_HOME.")
    if status.st_uid != os.geteuid():
        raise Trouble(
            f"The state directory {home} belongs to another user (uid {status.st_uid}).",
            mend="Run as that user, or name another directory in PEAJE_HOME.",
        )
    if not (home / MARKER).exists() and any(home.iterdir()):
        raise Trouble(
            f"{home} is not empty and not a state directory of Peaje.",
            mend="Name a new or an empty directory in PEAJE_HOME.",
        )


def _make_secrets(places: Places) -> None:
    def token(length: int) -> str:
        return "".join(random_source.choice(_URL_SAFE) for _ in range(length))

    makers: Mapping[str, Callable[[], str]] = {
        "postgres-password": lambda: token(43),
        "valkey-password": lambda: token(43),
        "pepper-1": lambda: random_source.token_hex(32),
    }
    for name, maker in makers.items():
        path = places.secrets / name
        if not path.exists():
            write_private(path, maker() + "\n")
