# SPDX-License-Identifier: Apache-2.0
"""`peaje up`, `peaje down`, `peaje status`: thin faces on the runner and on the state it leaves."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from chassis.errors import PeajeError
from control.laptop import places, reporter, state
from control.laptop.engine import EngineChoice
from control.laptop.errors import Trouble
from control.laptop.places import Places
from control.laptop.processes import ProcessId, end, is_alive, read_usage, wait_until
from control.laptop.supervisor import RESTARTS_MAX_DEFAULT, LifeState

#: More than all parts' graces together.
_DOWN_SECONDS_MAX = 150.0
_LEFTOVERS_GRACE_SECONDS = 15.0
#: A part's grace and its start together.
_RESTART_SECONDS_MAX = 90.0

NOT_RUNNING = 3
DEGRADED = 1


def up(
    *,
    detach: bool = False,
    port: int | None = None,
    control_port: int | None = None,
    admin_port: int | None = None,
    engine: EngineChoice | None = None,
    model_server: str | None = None,
    restarts: int = RESTARTS_MAX_DEFAULT,
    concurrency: int | None = None,
) -> int:
    """Start everything and stay until asked to stop; with *detach*, return once it is ready. The exit status."""
    # Late: `status` is asked often, and none of this is small.
    from control.laptop import daemon, envoy, runner, scale  # noqa: PLC0415

    environ = os.environ
    if environ.get("PEAJE_IDENTITY"):  # `run` changes the working directory
        environ["PEAJE_IDENTITY"] = os.path.abspath(environ["PEAJE_IDENTITY"])
    models = environ.get("PEAJE_MODELS")
    if models and (model_server or engine):
        raise Trouble(
            "PEAJE_MODELS names the model servers already.",
            mend=f"Unset it, or leave out {'--model-server' if model_server else '--engine'}.",
        )
    if model_server and engine:
        raise Trouble("--engine and --model-server are two answers to one question.", mend="Give one.")
    options = runner.Options(
        home=places.read_home(environ),
        ports=places.read_ports(environ, tenants=port, control=control_port, admin=admin_port),
        engine=engine,
        model_server=model_server,
        models_document=Path(os.path.abspath(models)) if models else None,
        restarts_max=restarts,
        concurrency=concurrency or envoy.default_concurrency(),
        scale=scale.read_scale(environ),
        in_background=detach,
    )
    out = reporter.Printer()
    try:
        return daemon.start(options, out) if detach else runner.run(options, out)
    finally:
        out.close()


def down() -> int:
    """Stop everything, in order; the exit status. Nothing to stop is no failure."""
    place = Places(places.read_home(os.environ))
    snapshot = state.read(place)
    out = reporter.Printer()
    try:
        supervisor = snapshot.supervisor
        if supervisor is not None:
            _stop_supervisor(place, supervisor, out)
            snapshot = state.read(place)
        leftovers = snapshot.leftovers()
        if leftovers:
            end(leftovers.values(), grace_seconds=_LEFTOVERS_GRACE_SECONDS)
            out.tell({"kind": reporter.SAY, "text": f"ended what was left: {', '.join(leftovers)}"})
        elif supervisor is None:
            out.tell({"kind": reporter.SAY, "text": f"nothing is running in {place.home}"})
    finally:
        out.close()
    return 0


def restart(part: str) -> int:
    """Give a part of a running installation a new process; the exit status."""
    place = Places(places.read_home(os.environ))
    snapshot = state.read(place)
    supervisor = snapshot.supervisor
    names = [str(entry["name"]) for entry in snapshot.parts]
    if supervisor is None or snapshot.phase != state.RUNNING:
        raise Trouble(f"Nothing is running in {place.home}, or not yet.", mend="Start it with ./peaje up.")
    if part not in names:
        raise Trouble(f"There is no part {part!r}.", mend=f"Parts are {', '.join(names)}.")
    asked = {"part": part, "id": uuid.uuid4().hex}
    state.ask_restart(place, asked)
    os.kill(supervisor.pid, signal.SIGUSR1)

    def answer() -> Mapping[str, str]:
        [entry] = [entry for entry in state.read(place).parts if entry["name"] == part]
        found = entry.get("asked") or {}
        return found if found.get("id") == asked["id"] else {}

    began = time.monotonic()
    if not wait_until(lambda: bool(answer()) or not is_alive(supervisor), seconds=_RESTART_SECONDS_MAX):
        raise Trouble(f"{part} was not restarted within {_RESTART_SECONDS_MAX:.0f} s.", mend=f"See ./peaje status and {place.log}.")
    found = answer()
    if found.get("outcome") != "done":
        raise Trouble(found.get("says") or "The supervisor has ended.")
    out = reporter.Printer()
    out.tell({"kind": reporter.PART, "name": part, "what": "restarted", "seconds": time.monotonic() - began})
    out.close()
    return 0


def status(*, as_json: bool = False) -> int:
    """Show what runs; 0 when all of it does, 3 when nothing does, 1 in between."""
    place = Places(places.read_home(os.environ))
    document = describe(state.read(place), place)
    if as_json:
        sys.stdout.write(json.dumps(document, indent=2) + "\n")
    else:
        sys.stdout.write("\n".join(_table(document)) + "\n")
    return {"running": 0, "not running": NOT_RUNNING}.get(str(document["state"]), DEGRADED)


def describe(snapshot: state.Snapshot, place: Places) -> dict[str, Any]:
    """The state as `status --json` shows it, with what Linux says about each process now."""
    supervisor = snapshot.supervisor
    alive = {
        str(part["name"]): process
        for part in snapshot.parts
        if (process := state.read_process(part.get("process"))) is not None and is_alive(process)
    }
    usage = read_usage(process.pid for process in alive.values())
    parts = []
    for part in snapshot.parts:
        process = alive.get(str(part["name"]))
        used = usage.get(process.pid) if process is not None else None
        parts.append(
            {
                "name": part["name"],
                "state": _state_of(part, process),
                "pid": process.pid if process is not None else None,
                "since": _timestamp(part["since"]),
                "restarts": part["restarts"],
                "cpu_seconds": round(used.cpu_seconds, 2) if used is not None else None,
                "rss_bytes": used.rss_bytes if used is not None else None,
                "ports": part["ports"],
                "log": part["log"],
            }
        )
    whole = "not running"
    if supervisor is not None:
        fine = all(part["state"] in (LifeState.READY, LifeState.DONE) for part in parts)
        whole = "degraded" if snapshot.phase == state.RUNNING and not fine else snapshot.phase
    elif alive:
        whole = "degraded"  # the supervisor was killed; `up` or `down` ends the rest
    document = snapshot.document if supervisor is not None or alive else {}
    return {
        "state": whole,
        "home": str(place.home),
        "since": _timestamp(document["since"]) if "since" in document else None,
        "supervisor_pid": supervisor.pid if supervisor is not None else None,
        **{name: document.get(name) for name in ("endpoint", "control", "ports", "models", "engine")},
        "versions": document.get("versions", {}),
        "notes": document.get("notes", []),
        "parts": parts if document else [],
    }


def register(app: typer.Typer) -> None:
    """Add the three commands to the command line."""

    @app.command("up")
    def up_command(
        detach: Annotated[bool, typer.Option("--detach", help="Return once it is ready; stop it with `peaje down`.")] = False,
        port: Annotated[int | None, typer.Option("--port", help="The tenants' endpoint (PEAJE_PORT, 10000).", show_default=False)] = None,
        control_port: Annotated[int | None, typer.Option("--control-port", help="The control API (PEAJE_CONTROL_PORT, 10001).", show_default=False)] = None,
        admin_port: Annotated[int | None, typer.Option("--admin-port", help="Envoy's admin interface (PEAJE_ADMIN_PORT, 9901).", show_default=False)] = None,
        engine: Annotated[EngineChoice | None, typer.Option("--engine", help="The model server to start (dynamo).", show_default=False)] = None,
        model_server: Annotated[str | None, typer.Option("--model-server", metavar="URL", help="Use this running OpenAI-compatible server instead.", show_default=False)] = None,
        restarts: Annotated[int, typer.Option("--restarts", min=0, help="How often a part that dies is started again, per minute; 0: then all is stopped.")] = RESTARTS_MAX_DEFAULT,
        concurrency: Annotated[int | None, typer.Option("--concurrency", min=1, help="Envoy's worker threads (one per processor).", show_default=False)] = None,
    ) -> None:
        """Start everything on this machine, on loopback, and show how to use it."""
        _exit_with(
            lambda: up(
                detach=detach,
                port=port,
                control_port=control_port,
                admin_port=admin_port,
                engine=engine,
                model_server=model_server,
                restarts=restarts,
                concurrency=concurrency,
            )
        )

    @app.command("down")
    def down_command() -> None:
        """Stop what `up` started, in order; also after `up --detach`."""
        _exit_with(down)

    @app.command("restart")
    def restart_command(part: Annotated[str, typer.Argument(help="As `peaje status` names it.")]) -> None:
        """Give one part a new process. Envoy's takes over while the old one ends its streams; any other ends first, its siblings are asked meanwhile."""
        _exit_with(lambda: restart(part))

    @app.command("status")
    def status_command(
        as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    ) -> None:
        """Show each part: its process, how long it runs, what it uses. Exit status 0: all well, 1: degraded, 3: not running."""
        _exit_with(lambda: status(as_json=as_json))


def _exit_with(command: Callable[[], int]) -> None:
    try:
        code = command()
    except PeajeError as exc:
        lines = exc.lines() if isinstance(exc, Trouble) else [str(exc)]
        sys.stderr.write("\n".join(lines) + "\n")
        code = 1
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    raise typer.Exit(code)


def _stop_supervisor(place: Places, supervisor: ProcessId, out: reporter.Reporter) -> None:
    """Ask the supervisor to stop, and tell what it does as it does it."""
    try:
        os.kill(supervisor.pid, signal.SIGTERM)
    except ProcessLookupError:
        return
    except PermissionError as exc:
        raise Trouble(
            f"The supervisor (pid {supervisor.pid}) belongs to another user.", mend="Run `down` as that user."
        ) from exc
    began = time.monotonic()
    told: set[str] = set()

    def tell() -> bool:
        for part in reversed(state.read(place).parts):
            name = str(part["name"])
            if part["state"] == LifeState.STOPPED and name not in told:
                told.add(name)
                out.tell({"kind": reporter.PART, "name": name, "what": "stopped", "seconds": time.monotonic() - began})
        return not is_alive(supervisor)

    if not wait_until(tell, seconds=_DOWN_SECONDS_MAX):
        raise Trouble(
            f"The supervisor (pid {supervisor.pid}) has not ended after {_DOWN_SECONDS_MAX:.0f} s.",
            mend=f"See {place.log}; `kill -9 {supervisor.pid}` and `./peaje down` end the rest.",
        )
    tell()


def _state_of(part: Mapping[str, Any], process: ProcessId | None) -> str:
    """The supervisor's word, unless it is gone and the process with it."""
    recorded = str(part["state"])
    if process is None and recorded in (LifeState.READY, LifeState.STARTING, LifeState.STOPPING):
        return LifeState.DIED
    return recorded


def _timestamp(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def _table(document: Mapping[str, Any]) -> list[str]:
    lines = [f"{document['state']}  {document['home']}"]
    if not document["parts"]:
        return lines
    lines += ["", f"{'PART':<14} {'STATE':<9} {'PID':>8} {'SINCE':<21} {'RESTARTS':>8} {'CPU':>9} {'MEMORY':>8}  PORTS"]
    for part in document["parts"]:
        cpu = f"{part['cpu_seconds']:.2f} s" if part["cpu_seconds"] is not None else "-"
        memory = f"{part['rss_bytes'] / 1e6:.0f} MB" if part["rss_bytes"] is not None else "-"
        ports = ", ".join(f"{number} ({name})" for name, number in part["ports"].items())
        lines.append(
            f"{part['name']:<14} {part['state']:<9} {part['pid'] or '-':>8} {part['since']:<21} "
            f"{part['restarts']:>8} {cpu:>9} {memory:>8}  {ports}".rstrip()
        )
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    lines += [
        "",
        f"endpoint     {document['endpoint']}",
        f"control API  {document['control']}",
        f"models       {', '.join(document['models'])}  ({document['engine']})",
        f"versions     {versions}",
        *(f"note         {note}" for note in document["notes"]),
    ]
    return lines
