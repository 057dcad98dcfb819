# SPDX-License-Identifier: Apache-2.0
"""
How many processes each service has, and what each of them is called.

The first keeps the service's own name and socket, which envoy.yaml spells; further ones are numbered from 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Final

from chassis.contract import CLUSTER_EXTAUTH, CLUSTER_METERING, CLUSTER_RATELIMIT, SOCKETS
from control.laptop.errors import Trouble

SERVICES: Final = (CLUSTER_EXTAUTH, CLUSTER_RATELIMIT, CLUSTER_METERING)
#: Processes of one service. Each is a Python process with connections of its own; more is for more machines.
PROCESSES_MAX: Final = 16
#: Envoy has looked twice by then (envoy.yaml: every 2 s) and asks another one.
DRAIN_SECONDS: Final = "4.5"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceProcess:
    """One process of a service."""

    service: str
    name: str
    #: Relative to the state directory.
    socket: str
    #: Loopback port of its metrics; 0: none.
    metrics_port: int = 0
    #: Whether there are others of its kind, which serve while it ends.
    has_siblings: bool = False

    def defaults(self) -> dict[str, str]:
        """What its environment says unless the user's own does."""
        return {"PEAJE_DRAIN_SECONDS": DRAIN_SECONDS} if self.has_siblings else {}

    def settings(self) -> dict[str, str]:
        """What its environment says that its siblings' does not."""
        prefix = f"PEAJE_{self.service.upper()}"
        settings = {f"{prefix}_SOCKET": self.socket}
        if self.metrics_port:
            settings[f"{prefix}_METRICS_PORT"] = str(self.metrics_port)
        return settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """Processes per service, and the first loopback port of their metrics: each process has its own."""

    counts: Mapping[str, int] = field(default_factory=dict)
    metrics_ports: Mapping[str, int] = field(default_factory=dict)

    def processes(self, service: str) -> list[ServiceProcess]:
        """
        Every process of *service*.

        >>> [process.name for process in Scale(counts={"extauth": 2}).processes("extauth")]
        ['extauth', 'extauth-2']
        """
        first_port = self.metrics_ports.get(service, 0)
        return [
            ServiceProcess(
                service=service,
                name=service if number == 1 else f"{service}-{number}",
                socket=_socket(service, number),
                metrics_port=first_port + number - 1 if first_port else 0,
                has_siblings=self.counts.get(service, 1) > 1,
            )
            for number in range(1, self.counts.get(service, 1) + 1)
        ]


def read_scale(environ: Mapping[str, str]) -> Scale:
    """Read PEAJE_EXTAUTH_PROCESSES and its like; raises `Trouble` for what is no number of processes or ports."""
    counts = {service: _read_count(environ, _setting(service, "PROCESSES")) for service in SERVICES}
    ports = {
        service: _read_first_port(environ, _setting(service, "METRICS_PORT"), counts[service]) for service in SERVICES
    }
    return Scale(counts=counts, metrics_ports=ports)


def _setting(service: str, what: str) -> str:
    return f"PEAJE_{service.upper()}_{what}"


def _read_count(environ: Mapping[str, str], variable: str) -> int:
    text = environ.get(variable) or "1"
    count = int(text) if text.isascii() and text.isdigit() else 0
    if not 1 <= count <= PROCESSES_MAX:
        raise Trouble(f"{variable}={text} is no number of processes.", mend=f"Give a number from 1 to {PROCESSES_MAX}.")
    return count


def _read_first_port(environ: Mapping[str, str], variable: str, count: int) -> int:
    text = environ.get(variable) or "0"
    port = int(text) if text.isascii() and text.isdigit() else -1
    highest = 65536 - count
    if not 0 <= port <= highest:
        raise Trouble(
            f"{variable}={text} is not a port.",
            mend=f"Give a number from 1 to {highest}: each process has the next one; or 0 for no metrics.",
        )
    return port


def _socket(service: str, number: int) -> str:
    first = PurePath(SOCKETS[service])
    return str(first if number == 1 else first.with_stem(f"{first.stem}-{number}"))
