# SPDX-License-Identifier: Apache-2.0
"""Run Valkey: on a Unix socket only, append-only file on, nothing evicted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

from chassis.secrets import write_private
from control.laptop.parts import Part, base_environment
from control.laptop.places import Places, socket_address
from control.laptop.probes import valkey_answers

SOCKET = "run/valkey.sock"
_CONFIGURATION = "valkey/valkey.conf"

# `dir` is entered first, so the socket is named from there; relative, as every socket.
_TEMPLATE = """\
dir valkey
port 0
unixsocket ../{socket}
unixsocketperm 700
requirepass {password}
# A counter that is lost is a limit that is lost for one window; never a bill.
appendonly yes
appendfsync everysec
save ""
# Evicting a counter would grant more than its limit allows; refusing writes is noticed.
maxmemory-policy noeviction
daemonize no
"""


def valkey_part(program: Path, places: Places, environ: Mapping[str, str]) -> Part:
    """Write the configuration (the password stays out of the arguments) and describe the process."""
    password = places.secret("valkey-password")
    write_private(places.home / _CONFIGURATION, _TEMPLATE.format(socket=SOCKET, password=password))
    return Part(
        name="valkey",
        argv=(str(program), _CONFIGURATION),
        env=base_environment(environ),
        ready=valkey_answers(SOCKET, password),
        before_start=_clear_socket,
    )


def valkey_url(places: Places) -> str:
    """The URL for Peaje's own processes."""
    password = quote(places.secret("valkey-password"), safe="")
    return f"unix://:{password}@{quote(socket_address(places.home, SOCKET))}?db=0"


def _clear_socket() -> Mapping[str, str]:
    Path(SOCKET).unlink(missing_ok=True)
    return {}
