# SPDX-License-Identifier: Apache-2.0
"""
`python -m control.pod prepare | pools | envoy | drain`: what a pod needs that `up` does on one machine.

A pod mounts what people write below PEAJE_POD_MOUNTS: `envoy/`, `models/models.yaml`, `identity/identity.yaml` and
`secrets/pepper-<n>`. `prepare` lays out the state directory from it before anything starts. `pools` keeps Envoy's
clusters and routes in step with the models document while it changes, and shows Envoy's metrics, whose admin page stays
on loopback. `envoy` becomes Envoy, as a new life that the journal can name. `drain` is what Kubernetes calls first.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Final

import httpx
import structlog
import yaml
from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from chassis.contract import EPOCH_ENVIRONMENT, IDENTITY_PATH, JOURNAL_PATH, MODELS_PATH
from chassis.errors import Invalid, PeajeError
from chassis.secrets import write_private
from chassis.serving import run
from chassis.settings import StoreSettings
from chassis.telemetry import traces
from chassis.telemetry.log import configure
from chassis.watching import file_version
from control.envoy_resources import publish
from control.envoy_tracing import TRACING_FILE, add_tracing, trace_settings
from control.laptop.binaries import find_envoy
from control.laptop.envoy import drain
from extauth.adapters.document import DEFAULT_TEXT

log = structlog.get_logger()

#: Between looks at the models document; one stat() each.
LOOK_EVERY_SECONDS: Final = 1.0
#: The two pages of Envoy's admin interface that are read only; nothing else of it leaves the pod.
SHOWN: Final = {"/metrics": "/stats/prometheus", "/ready": "/ready"}
_SHOW_TIMEOUT_SECONDS: Final = 5.0
_PEPPERS: Final = "pepper-*"


class Settings(BaseSettings):
    """What a pod says of itself; the state directory is in `StoreSettings`."""

    model_config = SettingsConfigDict(env_prefix="PEAJE_POD_", frozen=True, populate_by_name=True)

    #: Directory with what Kubernetes mounts.
    mounts: Path = Path("/etc/peaje")
    #: Address on which Envoy takes tenants' requests; empty: what envoy.yaml says. The chart writes it there itself.
    bind_address: str = ""
    #: Port on which Envoy's metrics are shown, on PEAJE_METRICS_HOST; 0: nowhere.
    envoy_metrics_port: int = Field(default=0, ge=0, le=65535)
    #: How long streams may take to end once the pod is to go.
    drain_seconds: float = Field(default=600.0, gt=0)
    #: How long Envoy stays even if nothing is under way: until everybody has heard that the pod is to go.
    drain_least_seconds: float = Field(default=5.0, ge=0)
    #: Envoy's admin interface, on loopback.
    admin_port: int = Field(default=9901, validation_alias="PEAJE_ADMIN_PORT")


def prepare(home: Path, mounts: Path, *, bind_address: str = "", spans: traces.Settings | None = None) -> None:
    """
    Lay out the state directory from what is mounted; raises `Invalid`. Doing it again changes nothing.

    Where *spans* names a collector, Envoy sends its own there, as the mounted tracing.yaml says.

    Secrets are copied: Kubernetes makes a mounted one readable to the group, and no secret of ours may be. The
    two documents are linked, so that a change of theirs is seen by whoever watches them.
    """
    for directory in ("run", "envoy", "secrets", Path(JOURNAL_PATH).parent):
        (home / directory).mkdir(mode=0o700, parents=True, exist_ok=True)
    _copy_secrets(mounts / "secrets", home / "secrets")
    for source in _files(mounts / "envoy"):
        target = home / "envoy" / source.relative_to(mounts / "envoy")
        target.parent.mkdir(mode=0o700, exist_ok=True)
        shutil.copyfile(source, target)
    _link(home / MODELS_PATH, mounts / "models" / Path(MODELS_PATH).name)
    if (mounts / "identity").is_dir():
        _link(home / IDENTITY_PATH, mounts / "identity" / Path(IDENTITY_PATH).name)
    elif not (home / IDENTITY_PATH).exists():
        write_private(home / IDENTITY_PATH, DEFAULT_TEXT)
    bootstrap = home / "envoy/envoy.yaml"
    if bootstrap.exists():
        if bind_address:
            _bind(bootstrap, bind_address)
        if spans is not None and spans.url:
            _trace(bootstrap, spans)
        publish(home / MODELS_PATH, home / "envoy")


class _Ipv6Server(ThreadingHTTPServer):
    """The library's listens on IPv4 alone, whatever address it is given."""

    address_family = socket.AF_INET6


class Pools:
    """Clusters and routes of the models document; what is refused keeps the last good ones."""

    def __init__(self, home: Path) -> None:
        self._models = home / MODELS_PATH
        self._directory = home / "envoy"
        # So that a change between `prepare` and now is not missed.
        self._seen: tuple[int, int] | None = None

    def step(self) -> bool:
        """Publish the document if it changed since the last look; whether it was."""
        seen = file_version(self._models)
        if seen is None or seen == self._seen:
            return False
        self._seen = seen
        try:
            publish(self._models, self._directory)
        except PeajeError as exc:
            log.error("models_refused", reason=exc.message)
            return False
        log.info("models_published")
        return True


def follow(home: Path, *, stop: threading.Event) -> None:
    """Keep the pools in step until *stop*."""
    pools = Pools(home)
    while not stop.wait(LOOK_EVERY_SECONDS):
        pools.step()


def show(host: str, port: int, *, admin_port: int) -> ThreadingHTTPServer:
    """Show what `SHOWN` names of Envoy's admin interface, in a thread; other paths and methods are refused."""

    class Relay(BaseHTTPRequestHandler):
        timeout = _SHOW_TIMEOUT_SECONDS

        def do_GET(self) -> None:
            page = SHOWN.get(self.path)
            if page is None:
                self._say(404, b"")
                return
            try:
                answer = httpx.get(f"http://127.0.0.1:{admin_port}{page}", timeout=_SHOW_TIMEOUT_SECONDS)
            except httpx.HTTPError:
                self._say(503, b"Envoy does not answer.\n")
            else:
                self._say(answer.status_code, answer.content)

        def _say(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("content-type", "text/plain; charset=utf-8")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nothing: a scrape is no event."""

    server = (_Ipv6Server if ":" in host else ThreadingHTTPServer)((host, port), Relay)
    threading.Thread(target=server.serve_forever, name="show", daemon=True).start()
    return server


def envoy_command(arguments: Sequence[str], program: Path) -> list[str]:
    """Envoy as every pod runs it, and what this one adds."""
    return [
        str(program), "-c", "envoy/envoy.yaml",
        # The journal is on disk this long after a record is made (Envoy's default is 10 s).
        "--file-flush-interval-msec", "50",
        # A pod has one Envoy and is never handed over.
        "--disable-hot-restart", "--drain-strategy", "immediate", "--log-level", "warn",
        *arguments,
    ]  # fmt: skip


def _bind(path: Path, address: str) -> None:
    bootstrap = yaml.safe_load(path.read_text())
    for listener in bootstrap["static_resources"]["listeners"]:
        listener["address"]["socket_address"]["address"] = address
    path.write_text(yaml.safe_dump(bootstrap, sort_keys=False, width=120))


def _trace(path: Path, spans: traces.Settings) -> None:
    block = path.parent / TRACING_FILE
    if not block.exists():
        raise Invalid(f"{TRACING_FILE} is not mounted, and PEAJE_TRACES_URL is set.", mend=f"Mount it beside {path.name}.")
    bootstrap = yaml.safe_load(path.read_text())
    add_tracing(bootstrap, yaml.safe_load(block.read_text()), spans)
    path.write_text(yaml.safe_dump(bootstrap, sort_keys=False, width=120))


def _copy_secrets(source: Path, target: Path) -> None:
    mounted = {path.name: path for path in _files(source)}
    for name, path in mounted.items():
        write_private(target / name, path.read_text("ascii"))
    for path in target.iterdir():
        if path.match(_PEPPERS) and path.name not in mounted:
            path.unlink()  # on a volume that stays, what was withdrawn must not
        elif path.is_file():
            path.chmod(0o600)  # a volume that is mounted anew may have been given to the group, signing keys and all


def _files(directory: Path) -> Iterator[Path]:
    """Each file below *directory*, by the name that it is mounted under: Kubernetes keeps the data itself in `..` names."""
    if not directory.is_dir():
        return
    for path in sorted(directory.iterdir()):
        if path.name.startswith(".."):
            continue
        if path.is_dir():
            yield from _files(path)
        else:
            yield path


def _link(path: Path, target: Path) -> None:
    if not target.exists():
        raise Invalid(f"{target} is not mounted.")
    if not path.is_symlink() or path.readlink() != target:
        path.unlink(missing_ok=True)
        path.symlink_to(target)


def main(arguments: Sequence[str]) -> None:
    """Do what the first argument says."""
    os.umask(0o077)
    settings, stores = Settings(), StoreSettings()
    os.chdir(stores.home)
    match arguments:
        case ["prepare"]:
            prepare(stores.home, settings.mounts, bind_address=settings.bind_address, spans=trace_settings())
        case ["pools"]:
            configure("pools")
            stop = threading.Event()
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: stop.set())
            if settings.envoy_metrics_port:
                show(stores.metrics_host, settings.envoy_metrics_port, admin_port=settings.admin_port)
            follow(stores.home, stop=stop)
        case ["envoy", *rest]:
            command = envoy_command(rest, find_envoy(os.environ))
            os.execve(command[0], command, {**os.environ, EPOCH_ENVIRONMENT: uuid.uuid4().hex})  # noqa: S606 - becomes Envoy
        case ["drain"]:
            asyncio.run(_drain(settings))
        case _:
            raise Invalid("Say what to do.", mend="One of: prepare, pools, envoy, drain.")


async def _drain(settings: Settings) -> None:
    await asyncio.gather(
        drain(f"http://127.0.0.1:{settings.admin_port}", seconds=settings.drain_seconds),
        asyncio.sleep(settings.drain_least_seconds),
    )


def _main_of(arguments: Sequence[str]) -> Callable[[], None]:
    return lambda: main(arguments)


if __name__ == "__main__":
    run(_main_of(sys.argv[1:]))
