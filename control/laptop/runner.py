# SPDX-License-Identifier: Apache-2.0
"""
`up` as a use case: prepare everything that can be refused, then hand the parts to the supervisor.

The order of `prepare` is the order in which a person wants to hear: already running, port taken,
store not reachable, program missing, configuration refused; all of it before anything is started.
"""

from __future__ import annotations

import asyncio
import os
import platform
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from chassis.contract import IDENTITY_PATH, MODELS_PATH
from chassis.errors import Invalid
from chassis.secrets import write_private
from control.envoy_resources import publish
from control.laptop import binaries, engine, envoy, places, postgres, reporter, state, stores, valkey
from control.laptop.admission import Addresses, admit
from control.laptop.engine import Engine, EngineChoice
from control.laptop.errors import Trouble
from control.laptop.parts import Part, service_environment, service_parts
from control.laptop.places import Places, Ports
from control.laptop.processes import PortNeed, check_ports, end, identify
from control.laptop.scale import SERVICES, Scale
from control.laptop.supervisor import Supervisor
from extauth.adapters import document as identity_document

_SECRETS_TO_HIDE = ("postgres-password", "valkey-password", "admin-token", "demo-key", "probe-key")
_LEFTOVERS_GRACE_SECONDS = 15.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What `up` was asked for, with every setting of the environment already looked at."""

    home: Path
    ports: Ports
    #: None: whatever the models document or the model server says.
    engine: EngineChoice | None
    model_server: str | None
    models_document: Path | None
    restarts_max: int
    concurrency: int
    scale: Scale = field(default_factory=Scale)
    in_background: bool = False

    def document(self) -> dict[str, Any]:
        """As plain values, to hand to a supervisor in the background."""
        return asdict(self) | {
            "home": str(self.home),
            "models_document": str(self.models_document) if self.models_document else None,
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Options:
        """The reverse of `document`."""
        kept, chosen = document["models_document"], document["engine"]
        return cls(
            **{
                **document,
                "home": Path(document["home"]),
                "ports": Ports(**document["ports"]),
                "scale": Scale(**document["scale"]),
                "engine": EngineChoice(chosen) if chosen else None,
                "models_document": Path(kept) if kept else None,
            }
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All that is to run, decided."""

    parts: tuple[Part, ...]
    engine: Engine
    facts: Mapping[str, Any]


def run(options: Options, out: reporter.Reporter) -> int:
    """Run until asked to stop; the exit status. Raises `Trouble` for what is found before anything starts."""
    began = time.monotonic()
    environ = dict(os.environ)
    place = Places(options.home)
    places.make(place, passable=runs_postgres_for_root(environ))
    # Envoy and the rest create files as they please; nobody else is to read them.
    os.umask(0o077)
    with state.hold_lock(place):
        # Sockets are named relative to the state directory, which may have a long path.
        os.chdir(place.home)
        plan = prepare(options, place, environ, out)
        supervisor = Supervisor(
            plan.parts,
            place,
            out,
            restarts_max=options.restarts_max,
            facts=plan.facts,
            hide=_texts_to_hide(place, environ),
        )
        return asyncio.run(supervisor.run(lambda: _admit(options, place, plan, out, began)))


def prepare(
    options: Options, place: Places, environ: Mapping[str, str], out: reporter.Reporter
) -> Plan:
    """Decide and write all that the parts need; raises `Trouble`, having started nothing."""

    def say(text: str) -> None:
        out.tell({"kind": reporter.SAY, "text": text})

    _end_leftovers(place, say)
    # So that `status` and `down` know of this process while it prepares.
    state.write(
        place,
        {
            "phase": state.STARTING,
            "since": time.time(),
            "supervisor": state.process_document(identify(os.getpid())),
            "parts": [],
        },
    )
    check_ports(_port_needs(options.ports, options.scale))
    own_postgres = not environ.get("PEAJE_POSTGRES_URL")
    own_redis = not environ.get("PEAJE_REDIS_URL")
    stores.check(environ.get("PEAJE_POSTGRES_URL"), environ.get("PEAJE_REDIS_URL"))
    programs = _find_programs(environ, own_postgres=own_postgres, own_redis=own_redis)
    chosen = _choose_engine(options, place, environ, say)
    engine.publish_document(chosen, place)
    _publish_identity(place, environ)
    publish(place.home / MODELS_PATH, place.envoy)
    source = envoy.find_source(environ)
    envoy.render(place, options.ports, options.scale, source=source)
    envoy.validate(programs.envoy, place)

    notes = list(chosen.notes)
    parts: list[Part] = []
    postgres_url, redis_url = environ.get("PEAJE_POSTGRES_URL", ""), environ.get("PEAJE_REDIS_URL", "")
    if programs.postgres is not None:
        lodging = postgres.lodge(programs.postgres, place)
        if lodging.note:
            say(lodging.note)
            notes.append(lodging.note)
        if postgres.prepare(lodging, place, version=programs.versions["postgres"]):
            say("made the database")
        port = postgres.choose_port(place)
        postgres_url = postgres.postgres_url(place, port)
        parts.append(postgres.postgres_part(lodging, place, environ, port=port))
    if programs.valkey is not None:
        redis_url = valkey.valkey_url(place)
        parts.append(valkey.valkey_part(programs.valkey, place, environ))
    own_stores = tuple(part.name for part in parts)
    env = service_environment(
        environ, place, options.ports, postgres_url=postgres_url, redis_url=redis_url
    )
    parts += [*chosen.parts, *service_parts(env, options.ports, options.scale, stores=own_stores)]
    parts.append(
        envoy.envoy_part(
            programs.envoy,
            environ,
            options.ports,
            needs=tuple(part.name for part in parts),
            concurrency=options.concurrency,
            refresh=lambda: envoy.render_again(programs.envoy, place, options.ports, options.scale, source=source),
        )
    )
    for note in chosen.notes:
        say(note)
    return Plan(
        parts=tuple(parts),
        engine=chosen,
        facts=_facts(options, chosen, programs.versions, notes) | _own_ledger(place, programs, postgres_url),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Programs:
    envoy: Path
    postgres: Path | None
    valkey: Path | None
    versions: Mapping[str, str]


def _find_programs(
    environ: Mapping[str, str], *, own_postgres: bool, own_redis: bool
) -> _Programs:
    program = binaries.find_envoy(environ)
    directory = binaries.find_postgres(environ) if own_postgres else None
    server = binaries.find_valkey(environ) if own_redis else None
    with ThreadPoolExecutor() as pool:  # each is asked for its version; together they take as long as one
        asked = {"envoy": pool.submit(binaries.envoy_version, program)}
        if directory is not None:
            asked["postgres"] = pool.submit(binaries.postgres_version, directory)
        if server is not None:
            asked["valkey"] = pool.submit(binaries.valkey_version, server)
        versions = {name: future.result() for name, future in asked.items()}
    return _Programs(envoy=program, postgres=directory, valkey=server, versions=versions)


def _choose_engine(
    options: Options, place: Places, environ: Mapping[str, str], say: engine.Say
) -> Engine:
    if options.models_document is not None:
        return engine.read_models_document(options.models_document)
    if options.model_server is not None:
        return engine.ask_model_server(options.model_server)
    if options.engine is EngineChoice.FAKE:
        return engine.start_fake(place, environ)
    return engine.start_dynamo(place, environ, places.read_environment_path(environ), say=say)


async def _admit(
    options: Options, place: Places, plan: Plan, out: reporter.Reporter, began: float
) -> None:
    addresses = addresses_of(options.ports)
    out.tell({"kind": reporter.WAITING, "names": ["a real request"]})
    key = await admit(
        place,
        addresses,
        plan.engine.models[0],
        say=lambda text: out.tell({"kind": reporter.SAY, "text": text}),
    )
    out.tell(
        {
            "kind": reporter.READY,
            "seconds": time.monotonic() - began,
            "endpoint": addresses.endpoint,
            "control": addresses.control,
            "key": key,
            "models": plan.engine.models,
            "engine": plan.engine.description,
            "admin_token_file": str(place.secrets / "admin-token"),
            "log": str(place.log),
            "stop": "./peaje down" if options.in_background else "Ctrl-C here, or ./peaje down",
        }
    )


def addresses_of(ports: Ports) -> Addresses:
    """Where the two that people talk to listen."""
    return Addresses(
        endpoint=f"http://127.0.0.1:{ports.tenants}", control=f"http://127.0.0.1:{ports.control}"
    )


def _own_ledger(place: Places, programs: _Programs, url: str) -> dict[str, str]:
    """Where `peaje psql` finds our own Postgres; without the password, which it reads from its file."""
    if programs.postgres is None:
        return {}
    return {"postgres_url": url.replace(f":{place.secret('postgres-password')}@", "@")}


def _facts(
    options: Options, chosen: Engine, versions: Mapping[str, str], notes: list[str]
) -> dict[str, Any]:
    addresses = addresses_of(options.ports)
    return {
        "endpoint": addresses.endpoint,
        "control": addresses.control,
        "ports": asdict(options.ports),
        "control_port": options.ports.control,
        "models": chosen.models,
        "engine": chosen.description,
        "versions": {**versions, "python": platform.python_version()},
        "notes": notes,
    }


def _publish_identity(place: Places, environ: Mapping[str, str]) -> None:
    """
    Put the identity document into the state directory: the one that PEAJE_IDENTITY names, each time.

    Without one a new installation gets ours, and an operator's own is never touched. A faulty one is refused here.
    """
    path, named = place.home / IDENTITY_PATH, environ.get("PEAJE_IDENTITY")
    try:
        if named:
            identity_document.load_whole(Path(named), home=place.home)
            write_private(path, Path(named).read_text("utf-8"))
            return
    except Invalid as exc:
        raise Trouble(f"PEAJE_IDENTITY: {exc}") from exc
    if not path.exists():
        write_private(path, identity_document.DEFAULT_TEXT)
    identity_document.load_whole(path, home=place.home)


def _port_needs(ports: Ports, scale: Scale) -> tuple[PortNeed, ...]:
    return (
        PortNeed(number=ports.tenants, purpose="the tenants' endpoint", option="--port"),
        PortNeed(number=ports.control, purpose="the control API", option="--control-port"),
        PortNeed(number=ports.admin, purpose="Envoy's admin interface", option="--admin-port"),
        *(
            PortNeed(
                number=process.metrics_port, purpose=f"{process.name}'s metrics", option=f"PEAJE_{service.upper()}_METRICS_PORT"
            )
            for service in SERVICES
            for process in scale.processes(service)
            if process.metrics_port
        ),
    )


def _end_leftovers(place: Places, say: engine.Say) -> None:
    leftovers = state.read(place).leftovers()
    if leftovers:
        say(f"ending what an earlier run has left: {', '.join(leftovers)}")
        end(leftovers.values(), grace_seconds=_LEFTOVERS_GRACE_SECONDS)


def runs_postgres_for_root(environ: Mapping[str, str]) -> bool:
    """Whether another user must be able to pass through the state directory."""
    return os.geteuid() == 0 and not environ.get("PEAJE_POSTGRES_URL")


def _texts_to_hide(place: Places, environ: Mapping[str, str]) -> list[str]:
    """Our own secrets, and the passwords of stores that the user runs: no tail of a log shows one."""
    own = {
        (place.secrets / name).read_text().strip()
        for name in _SECRETS_TO_HIDE
        if (place.secrets / name).exists()
    }
    theirs = {
        password
        for variable in ("PEAJE_POSTGRES_URL", "PEAJE_REDIS_URL")
        for password in stores.passwords_in(environ.get(variable, ""))
    }
    # The longest first: one may be the beginning of another.
    return sorted((own | theirs) - {""}, key=len, reverse=True)
