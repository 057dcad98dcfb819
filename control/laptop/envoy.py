# SPDX-License-Identifier: Apache-2.0
"""
Render the repository's `envoy/` into the state directory, have Envoy judge it, and run it.

Only ports are changed, and the endpoints of services with several processes. What SREs edit stays `envoy/`, or
the directory that PEAJE_ENVOY_SOURCE names; the rendered copy is made anew by each `up`.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import yaml

from chassis.contract import EXPRESS_ENVIRONMENT
from chassis.errors import Invalid
from chassis.secrets import write_private
from control.envoy_tracing import TENANTS_LISTENER, TRACING_FILE, add_tracing, trace_settings
from control.laptop import envoy_files
from control.laptop.envoy_lives import EnvoyLives, read_old_serves_seconds
from control.laptop.errors import Trouble
from control.laptop.parts import Part, base_environment
from control.laptop.places import REPOSITORY, Places, Ports
from control.laptop.probes import http_client
from control.laptop.scale import SERVICES, Scale

_SHIPPED = REPOSITORY / "envoy"
_SOURCE_SETTING = "PEAJE_ENVOY_SOURCE"
#: A second door, with TLS, where this file is in the state directory.
TLS_PATH = "tls.yaml"
TLS_EXAMPLE = "tls.example.yaml"
_BOOTSTRAP = "envoy/envoy.yaml"
_VALIDATE_SECONDS = 60

#: How long requests in flight may take once Envoy is told to stop.
DRAIN_SECONDS = 10.0
_COMPLAINT = re.compile(r"error initializing configuration '[^']*':([^\n]*)")
_ACTIVE_REQUESTS = "http.tenants.downstream_rq_active"


def find_source(environ: Mapping[str, str]) -> Path:
    """The directory that people edit: the checkout's, or one of their own; raises `Trouble` if that is none."""
    source = Path(environ.get(_SOURCE_SETTING) or _SHIPPED).absolute()
    if not (source / "envoy.yaml").is_file():
        raise Trouble(f"{_SOURCE_SETTING} is {source}, which has no envoy.yaml.", mend=f"Copy {_SHIPPED} there.")
    return source


def render(places: Places, ports: Ports, scale: Scale, *, source: Path = _SHIPPED) -> None:
    """Write the bootstrap with this installation's ports and processes, and the Lua files, into the state directory."""
    for path in sorted(source.rglob("*.lua")):
        target = places.envoy / path.relative_to(source)
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        os.chmod(target, 0o600)
    bootstrap = _load(source / "envoy.yaml")
    _set_ports(bootstrap, ports, source)
    _set_endpoints(bootstrap, scale, source)
    _add_tracing(bootstrap, source / TRACING_FILE)
    _add_tls_listener(bootstrap, places.home / TLS_PATH)
    write_private(places.home / _BOOTSTRAP, yaml.safe_dump(bootstrap, sort_keys=False, width=120))
    envoy_files.rendered(places, source)


def render_again(program: Path, places: Places, ports: Ports, scale: Scale, *, source: Path) -> None:
    """Take over what was edited since; raises `Trouble` if Envoy would not start on it, and then all is as it was."""
    note = places.run / envoy_files.RENDERED_FROM
    before = {path: path.read_bytes() for path in (note, places.home / _BOOTSTRAP, *places.envoy.rglob("*.lua"))}
    try:
        render(places, ports, scale, source=source)
        validate(program, places)
    except Trouble:
        for path, content in before.items():
            path.write_bytes(content)
        raise


def _add_tracing(bootstrap: dict[str, Any], path: Path) -> None:
    """Where a collector of traces is named, Envoy sends its spans there."""
    try:
        settings = trace_settings()
        if settings.url:
            add_tracing(bootstrap, _load(path), settings)
    except Invalid as exc:
        raise Trouble(exc.message, mend=exc.mend) from exc


def _add_tls_listener(bootstrap: dict[str, Any], path: Path) -> None:
    """
    Where *path* exists, tenants may come by TLS too: the same listener again, with its address and transport socket.

    A copy, so that no filter can be on one door and not on the other.
    """
    if not path.exists():
        return
    tls = _load(path)
    listeners = bootstrap["static_resources"]["listeners"]
    listener = copy.deepcopy(next(one for one in listeners if one["name"] == TENANTS_LISTENER))
    try:
        listener["name"], listener["address"] = "tenants-tls", tls["address"]
        for chain in listener["filter_chains"]:
            chain["transport_socket"] = tls["transport_socket"]
    except KeyError as exc:
        raise Trouble(f"{path}: {exc.args[0]} is missing.") from exc
    listeners.append(listener)


def validate(program: Path, places: Places) -> None:
    """Raise `Trouble` with Envoy's own words if it would not start on the rendered configuration."""
    try:
        answer = subprocess.run(  # noqa: S603 - found by us or named by the user
            [program, "--mode", "validate", "-c", _BOOTSTRAP, "--log-level", "critical"],
            cwd=places.home,
            capture_output=True,
            text=True,
            timeout=_VALIDATE_SECONDS,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except (OSError, subprocess.SubprocessError) as exc:
        raise Trouble(f"Envoy cannot be run ({program}): {exc}.") from exc
    if answer.returncode != 0:
        raise Trouble(f"Envoy refuses envoy/envoy.yaml: {_complaint(answer.stderr + answer.stdout)}")


def envoy_part(
    program: Path,
    environ: Mapping[str, str],
    ports: Ports,
    *,
    needs: tuple[str, ...],
    concurrency: int,
    refresh: Callable[[], None] = lambda: None,
) -> Part:
    """
    Describe the process. Ready is Envoy's own view: it has seen every service healthy once.

    Before a life takes over from another, *refresh* brings its files up to date, or raises `Trouble`.
    """
    admin = f"http://127.0.0.1:{ports.admin}"
    env = base_environment(environ) | {name: environ[name] for name in (EXPRESS_ENVIRONMENT,) if name in environ}
    lives = EnvoyLives(
        (
            str(program),
            "-c", _BOOTSTRAP,
            # The journal is on disk this long after a record is made (Envoy's default is 10 s).
            "--file-flush-interval-msec", "50",
            "--concurrency", str(concurrency),
            "--drain-time-s", str(int(DRAIN_SECONDS)),
            "--drain-strategy", "immediate",
            "--parent-shutdown-time-s", str(read_old_serves_seconds(environ)),
            "--log-level", "warn",
        ),
        env,
        admin,
        refresh,
    )  # fmt: skip
    return Part(
        name="envoy",
        argv=lives.first_argv,
        env=env,
        needs=needs,
        ready=lives.ready(),
        before_start=lives.first,
        heir=lives.heir,
        heir_lost=lives.lost,
        before_stop=lambda: drain(admin),
        # After the drain there is nothing left to wait for.
        stop_grace_seconds=5.0,
        ports={"tenants": ports.tenants, "admin": ports.admin},
    )


async def drain(admin: str, *, seconds: float = DRAIN_SECONDS) -> None:
    """Have Envoy refuse new connections, and wait until no request is left or the time is over."""
    deadline = time.monotonic() + seconds
    with contextlib.suppress(httpx.HTTPError, ValueError, KeyError, IndexError):
        async with http_client() as client:
            await client.post(f"{admin}/drain_listeners?graceful")
            while time.monotonic() < deadline:
                answer = await client.get(
                    f"{admin}/stats", params={"filter": f"^{_ACTIVE_REQUESTS}$", "format": "json"}
                )
                if answer.json()["stats"][0]["value"] == 0:
                    return
                await asyncio.sleep(0.1)


def default_concurrency() -> int:
    """One worker per processor that this process may use."""
    return len(os.sched_getaffinity(0))


def _load(path: Path) -> dict[str, Any]:
    try:
        bootstrap = yaml.safe_load(path.read_text())
    except OSError as exc:
        raise Trouble(f"{path} cannot be read: {exc.strerror}.") from exc
    except yaml.YAMLError as exc:
        mark = getattr(exc, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise Trouble(f"{path}{where} is not YAML: {getattr(exc, 'problem', exc)}.") from exc
    if not isinstance(bootstrap, dict):
        raise Trouble(f"{path} is not an Envoy configuration: it is no mapping.")
    return bootstrap


def _set_ports(bootstrap: dict[str, Any], ports: Ports, source: Path) -> None:
    try:
        bootstrap["admin"]["address"]["socket_address"]["port_value"] = ports.admin
        listener = next(
            listener
            for listener in bootstrap["static_resources"]["listeners"]
            if listener["name"] == TENANTS_LISTENER
        )
        listener["address"]["socket_address"]["port_value"] = ports.tenants
    except (KeyError, TypeError, StopIteration) as exc:
        raise Trouble(
            f"{source / 'envoy.yaml'} has no admin address, or no listener named {TENANTS_LISTENER}.",
            mend="`up` sets their ports; put them back.",
        ) from exc


def _set_endpoints(bootstrap: dict[str, Any], scale: Scale, source: Path) -> None:
    """Give each service's cluster an endpoint a process; it keeps all else that envoy.yaml says of it."""
    for service in SERVICES:
        endpoints = [
            {"endpoint": {"address": {"pipe": {"path": process.socket}}}} for process in scale.processes(service)
        ]
        try:
            clusters = bootstrap["static_resources"]["clusters"]
            cluster = next(cluster for cluster in clusters if cluster["name"] == service)
            cluster["load_assignment"]["endpoints"][0]["lb_endpoints"] = endpoints
        except (KeyError, IndexError, TypeError, StopIteration) as exc:
            raise Trouble(
                f"{source / 'envoy.yaml'} has no cluster named {service} with endpoints.",
                mend="`up` sets them, one a process; put it back.",
            ) from exc


def _complaint(text: str) -> str:
    """The one line of Envoy's output that says what is wrong."""
    matched = _COMPLAINT.search(text)
    if matched is not None:
        return matched[1].strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it gives no reason"
