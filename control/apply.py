# SPDX-License-Identifier: Apache-2.0
"""
Put a models document into force while requests pass: all of it or nothing.

Checked first: by us, by our lint, by Envoy itself on a copy. Then published so that no request meets half of it:
services know the names before a route leads there, new pools are made and found healthy before that, old ones go after
no route leads to them. Everybody has to say that they took it; if one does not, the files from before are put back.
"""

from __future__ import annotations

import copy
import fcntl
import hashlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

from chassis.contract import MODELS_PATH, MODELS_READ_PATH
from chassis.errors import Conflict, Invalid, PeajeError, Unavailable
from chassis.marks import digest, lagging
from chassis.models import ModelCatalogue
from chassis.models_document import read, text_of
from chassis.secrets import write_private
from control.envoy_admin import Admin, Taken
from control.envoy_diff import Difference, differences
from control.envoy_lint import lint
from control.envoy_resources import (
    CLUSTERS_FILE,
    NO_POOL,
    ROUTES_FILE,
    Rendered,
    render_all,
    replace,
    write,
    write_credentials,
)
from control.laptop import envoy_files
from control.laptop.envoy import validate
from control.laptop.places import Places
from control.located_yaml import load

#: For Envoy to take one file: a new pool is asked for its health first, which a dead server leaves unanswered.
TAKEN_WITHIN_SECONDS: Final = 30.0
#: For every service to read the document; each looks twice a second. The largest one takes a busy process two seconds.
READ_WITHIN_SECONDS: Final = 20.0
_LOOK_EVERY_SECONDS: Final = 0.05
_LOCK: Final = "run/apply.lock"

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Applied:
    """What is in force now."""

    models: list[str]
    #: Whether Envoy runs and has said so; otherwise it will read the files when it starts.
    confirmed: bool
    changes: list[Difference] = field(default_factory=list)
    #: Files that were edited and that only a restart reads.
    unread: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Desk:
    """One installation as `apply` and `diff` work on it."""

    places: Places
    #: The program that judges; and the one that runs, None if none does.
    envoy: Path
    admin: Admin | None
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


def apply(desk: Desk, source: Path | None) -> Applied:
    """Put *source* into force, None: the installation's own document as it was edited. Raises what refuses it."""
    with _alone(desk.places):
        path = desk.places.home / MODELS_PATH
        text, rendered, catalogue = _read(desk, source or path)
        judge(desk.envoy, desk.places, rendered)
        changes = _differences(desk, rendered)
        before = _Before.of(desk.places)
        try:
            if source is not None:
                write_private(path, text)
            _wait_for_services(desk, text)
            write_credentials(rendered, desk.places.envoy)
            _publish(desk, rendered)
        except BaseException:
            before.put_back(desk.places)
            raise
        unread = [str(file) for file in envoy_files.edited(desk.places)] if desk.admin is not None else []
        return Applied(models=catalogue.names, confirmed=desk.admin is not None, changes=changes, unread=unread)


def diff(desk: Desk, source: Path | None) -> list[Difference]:
    """What *source* (None: the installation's own document) and Envoy's other files say against what Envoy runs."""
    if desk.admin is None:
        raise Unavailable("Envoy is not running.", mend="Start it with `./peaje up`, or name its admin interface.")
    _, rendered, _ = _read(desk, source or desk.places.home / MODELS_PATH)
    unread = [
        Difference(resource=f"file {file}", place="content", running="as it started with", files="edited, only a restart reads it")
        for file in envoy_files.edited(desk.places)
    ]
    return _differences(desk, rendered) + unread


def judge(program: Path, places: Places, rendered: Rendered) -> None:
    """Refuse what our lint or Envoy would refuse, on a copy."""
    with tempfile.TemporaryDirectory(prefix="peaje-judge-") as directory:
        home = Path(directory)
        shutil.copytree(places.envoy, home / "envoy", ignore=shutil.ignore_patterns("credentials"))
        for name in ("run", "journal"):
            (home / name).mkdir()
        write(rendered, home / "envoy")
        findings = [one for name in (CLUSTERS_FILE, ROUTES_FILE) for one in lint(load(home / "envoy" / name), name)]
        if findings:
            raise Invalid("; ".join(map(str, findings)))
        try:
            validate_inlined(program, Places(home), rendered, secrets=places.secrets)
        except PeajeError as exc:
            raise Invalid(str(exc).replace("envoy/envoy.yaml", "what the models document means")) from exc


def validate_inlined(program: Path, copy_: Places, rendered: Rendered, *, secrets: Path) -> None:
    """
    Have Envoy judge a copy of its configuration, whose bootstrap is changed for it.

    Its validation does not open the files that it watches, so clusters and routes are put where it looks.
    """
    (copy_.home / "secrets").symlink_to(secrets)
    bootstrap = yaml.safe_load((copy_.envoy / "envoy.yaml").read_text())
    (copy_.envoy / "envoy.yaml").write_text(yaml.safe_dump(inlined(bootstrap, rendered), sort_keys=False))
    validate(program, copy_)


def inlined(bootstrap: dict[str, Any], rendered: Rendered) -> dict[str, Any]:
    """*bootstrap* with clusters and routes in it, instead of the names of their files."""
    whole = copy.deepcopy(bootstrap)
    whole.pop("dynamic_resources", None)
    static = whole.get("static_resources")
    if not isinstance(static, dict) or not isinstance(static.get("listeners"), list):
        raise Invalid("envoy/envoy.yaml has no static_resources with listeners.", mend="Put back what `up` sets the ports of.")
    # Envoy now also refuses a route to a cluster that is not there, but for the one that never is.
    clusters = [*(_untyped(one) for one in _resources(rendered.clusters)), {"name": NO_POOL, "connect_timeout": "1s"}]
    static.setdefault("clusters", []).extend(clusters)
    [table] = map(_untyped, _resources(rendered.routes))
    for mapping in _mappings(static["listeners"]):
        if mapping.pop("rds", None) is not None:
            mapping["route_config"] = table
    return whole


def _read(desk: Desk, path: Path) -> tuple[str, Rendered, ModelCatalogue]:
    text = text_of(path)
    catalogue = ModelCatalogue(models=read(text, source=str(path)))
    return text, render_all(catalogue, desk.places.home), catalogue


def _differences(desk: Desk, rendered: Rendered) -> list[Difference]:
    if desk.admin is None:
        return []
    files = {"clusters": [_untyped(one) for one in _resources(rendered.clusters)], "routes": [_untyped(one) for one in _resources(rendered.routes)]}
    running = {kind: [_untyped(one) for one in found] for kind, found in desk.admin.resources().items()}
    return differences(running, files)


def _wait_for_services(desk: Desk, text: str) -> None:
    """Until every process that reads the document serves by *text*; one that ends meanwhile is not waited for."""
    wanted, deadline = digest(text.encode()), desk.clock() + READ_WITHIN_SECONDS
    while late := lagging(desk.places.home / MODELS_READ_PATH, wanted):
        if desk.clock() > deadline:
            raise Unavailable(
                f"Not read within {READ_WITHIN_SECONDS:.0f} s by {', '.join(late)}; the files from before are back.",
                mend="Its log says why: log/ in the state directory.",
            )
        desk.sleep(_LOOK_EVERY_SECONDS)


def _publish(desk: Desk, rendered: Rendered) -> None:
    directory = desk.places.envoy
    if desk.admin is None:
        write(rendered, directory)
        return
    refused = desk.admin.taken().refused
    both = _with_old(rendered.clusters, directory / CLUSTERS_FILE)
    steps = [(CLUSTERS_FILE, "clusters", both), (ROUTES_FILE, "routes", rendered.routes)]
    if both != rendered.clusters:
        steps.append((CLUSTERS_FILE, "clusters", rendered.clusters))
    for name, kind, text in steps:
        replace(directory / name, text)
        _wait(desk, refused, kind, text)


def _wait(desk: Desk, refused: int, kind: str, text: str) -> None:
    """Until Envoy runs the version of *kind* in *text*; for clusters, until all of them are made."""
    assert desk.admin is not None
    wanted = yaml.safe_load(text)["version_info"]
    deadline = desk.clock() + TAKEN_WITHIN_SECONDS
    while True:
        taken = desk.admin.taken()
        if getattr(taken, kind) == wanted and taken.warming == 0:
            return
        if taken.refused > refused:
            raise Invalid(f"Envoy refused the {kind}; what was in force still is.", mend="Its log says why: log/envoy.log.")
        if desk.clock() > deadline:
            raise Unavailable(_not_taken(kind, taken))
        desk.sleep(_LOOK_EVERY_SECONDS)


def _not_taken(kind: str, taken: Taken) -> str:
    waiting = f"{taken.warming} pools are not made yet" if taken.warming else "it has not read them"
    return f"Envoy did not take the {kind} within {TAKEN_WITHIN_SECONDS:.0f} s ({waiting}); the files from before are back."


def _with_old(text: str, path: Path) -> str:
    """The clusters of *text* and, of those at *path*, the ones that routes in force may still lead to."""
    document = yaml.safe_load(text)
    names = {resource["name"] for resource in document["resources"]}
    old = [resource for resource in _resources(path.read_text()) if resource["name"] not in names] if path.exists() else []
    if not old:
        return text
    document["resources"] += old
    document["version_info"] = hashlib.sha256(yaml.safe_dump(document["resources"]).encode()).hexdigest()[:16]
    return yaml.safe_dump(document, sort_keys=False, width=120)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Before:
    """What was in force."""

    files: dict[str, str]

    @classmethod
    def of(cls, places: Places) -> _Before:
        names = (f"envoy/{ROUTES_FILE}", f"envoy/{CLUSTERS_FILE}", MODELS_PATH)
        return cls(files={name: (places.home / name).read_text() for name in names if (places.home / name).exists()})

    def put_back(self, places: Places) -> None:
        """Routes first: they lead to the pools of before, which are all still there."""
        for name, text in self.files.items():
            (write_private if name == MODELS_PATH else replace)(places.home / name, text)


@contextmanager
def _alone(places: Places) -> Iterator[None]:
    with (places.home / _LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise Conflict("Another `apply` is under way.", mend="Wait for it.") from exc
        yield


def _resources(text: str) -> list[dict[str, Any]]:
    return list((yaml.safe_load(text) or {}).get("resources") or [])


def _untyped(resource: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in resource.items() if name != "@type"}


def _mappings(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from _mappings(inner)
