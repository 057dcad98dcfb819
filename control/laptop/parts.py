# SPDX-License-Identifier: Apache-2.0
"""What a part is, and the parts that are Peaje itself; Postgres, Valkey, engine and Envoy have their own files."""

from __future__ import annotations

import enum
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chassis.contract import CHANGES_PATH
from control.laptop.places import REPOSITORY, Places, Ports
from control.laptop.probes import Probe, file_exists, grpc_serving, http_ok
from control.laptop.scale import SERVICES, Scale, ServiceProcess

#: Written by the collector once it reads the journal, relative to the state directory.
COLLECTOR_READY = "run/collector.ready"
#: Written by the delivery process once it looks at the outbox.
EVENTS_READY = "run/events.ready"

#: What a part inherits from the environment of `up`; all else is left behind.
_INHERITED = ("PATH", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR", "SSL_CERT_FILE", "SSL_CERT_DIR")
#: Settings that are `up`'s own business, or that it answers differently to each part.
_OWN_SETTINGS = frozenset({"PEAJE_POSTGRES_URL", "PEAJE_REDIS_URL", "PEAJE_HOME", "PEAJE_ENV"})


class Kind(enum.Enum):
    """Whether a part stays, or does one thing and ends."""

    SERVICE = enum.auto()
    TASK = enum.auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """The user that a part runs as when `up` is run by root."""

    uid: int
    gid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Heir:
    """How the next life of a part is started while the present one still serves."""

    argv: tuple[str, ...]
    env: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One process: how it is started, when it counts as ready, how it is stopped."""

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    #: Parts that must be ready (or done) before this one starts.
    needs: tuple[str, ...] = ()
    kind: Kind = Kind.SERVICE
    #: None for a task: it is done when it has ended well.
    ready: Probe | None = None
    account: Account | None = None
    ready_within_seconds: float = 30.0
    stop_signal: signal.Signals = signal.SIGTERM
    stop_grace_seconds: float = 10.0
    #: Called before each life; clears what the last one left and returns what its environment adds.
    before_start: Callable[[], Mapping[str, str]] | None = None
    after_ready: Callable[[], Awaitable[None]] | None = None
    before_stop: Callable[[], Coroutine[Any, Any, None]] | None = None
    #: Where a new life can take over from one that serves: what it is started with. It ends the old one itself, in its time.
    #: None: the old one is stopped first.
    heir: Callable[[], Heir] | None = None
    #: Told of an heir that did not come to serve.
    heir_lost: Callable[[], None] | None = None
    #: TCP ports it listens on, by purpose; for `status`.
    ports: Mapping[str, int] = field(default_factory=dict)


def base_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """What every part gets; nothing of ours, so that a model server never sees a secret."""
    return {name: environ[name] for name in _INHERITED if name in environ}


def service_environment(
    environ: Mapping[str, str], places: Places, ports: Ports, *, postgres_url: str, redis_url: str
) -> dict[str, str]:
    """
    What Peaje's own processes get.

    The URLs hold passwords. The environment of a process can be read by its own user only,
    who could as well read `secrets/`; its arguments could be read by everybody.
    """
    settings = {
        name: value
        for name, value in environ.items()
        if name.startswith("PEAJE_") and name not in _OWN_SETTINGS
    }
    return {
        **base_environment(environ),
        **settings,
        "PEAJE_HOME": str(places.home),
        "PEAJE_POSTGRES_URL": postgres_url,
        "PEAJE_REDIS_URL": redis_url,
        "PEAJE_PORT": str(ports.tenants),
        "PEAJE_CONTROL_PORT": str(ports.control),
        "PEAJE_ADMIN_PORT": str(ports.admin),
        "PYTHONPATH": str(REPOSITORY),
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
    }


def service_parts(env: Mapping[str, str], ports: Ports, scale: Scale, *, stores: tuple[str, ...]) -> list[Part]:
    """The schema's migrations and Peaje's own processes; *stores* are the parts that hold their data."""
    migrations = Part(
        name="migrations",
        argv=_module("chassis.schema"),
        env=env,
        needs=tuple(name for name in stores if name == "postgres"),
        kind=Kind.TASK,
        ready_within_seconds=120.0,  # a later release may have a table to rewrite
    )
    needs = (*stores, migrations.name)
    return [
        migrations,
        *(_on_socket(process, env, needs) for service in SERVICES for process in scale.processes(service)),
        Part(
            name="collector",
            argv=_module("metering.collector"),
            env=env,
            needs=needs,
            ready=file_exists(Path(COLLECTOR_READY)),
            before_start=lambda: _remove(COLLECTOR_READY),
            # Reads what Envoy wrote last, into a Postgres that may be busy.
            stop_grace_seconds=20.0,
        ),
        Part(
            name="events",
            argv=_module("metering.events"),
            env=env,
            needs=needs,
            ready=file_exists(Path(EVENTS_READY)),
            before_start=lambda: _remove(EVENTS_READY),
        ),
        Part(
            name="beacon",
            argv=_module("chassis.beacon"),
            env=env,
            needs=needs,
            ready=file_exists(Path(CHANGES_PATH)),
            before_start=lambda: _remove(CHANGES_PATH),
        ),
        Part(
            name="control",
            argv=_module("control.api"),
            env=env,
            needs=needs,
            ready=http_ok(f"http://127.0.0.1:{ports.control}/health"),
            ports={"control": ports.control},
        ),
    ]


def _on_socket(process: ServiceProcess, env: Mapping[str, str], needs: tuple[str, ...]) -> Part:
    return Part(
        name=process.name,
        argv=_module(process.service),
        env={**process.defaults(), **env, **process.settings()},
        needs=needs,
        ready=grpc_serving(process.socket),
        before_start=lambda: _remove(process.socket),
        ports={"metrics": process.metrics_port} if process.metrics_port else {},
    )


def _module(name: str) -> tuple[str, ...]:
    return (sys.executable, "-m", name)


def _remove(path: str) -> Mapping[str, str]:
    Path(path).unlink(missing_ok=True)
    return {}
