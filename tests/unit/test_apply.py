# SPDX-License-Identifier: Apache-2.0
"""The order in which `apply` swaps files, and what is left when Envoy does not go along."""

from __future__ import annotations

import fcntl
import functools
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import control.apply
from chassis.contract import MODELS_READ_PATH
from chassis.errors import Conflict, Invalid, Unavailable
from chassis.marks import Mark, digest
from control.apply import READ_WITHIN_SECONDS, TAKEN_WITHIN_SECONDS, Desk, apply
from control.envoy_admin import Admin, Taken
from control.envoy_resources import publish
from control.laptop.places import Places

OLD = 'models: [{name: old, engine: vllm, endpoints: ["h:1"]}, {name: both, engine: vllm, endpoints: ["h:1"]}]\n'
NEW = '# New.\nmodels: [{name: both, engine: vllm, endpoints: ["h:2"]}, {name: new, engine: vllm, endpoints: ["h:1"]}]\n'


@dataclass
class Envoy(Admin):
    """An Envoy that takes what is in its files when it is looked at, unless it is told not to."""

    directory: Path
    #: The kind of file that it refuses or never reads.
    refuses: str | None = None
    ignores: str | None = None
    #: Names of clusters and the first cluster that routes lead to, each time one of the files is another.
    seen: list[tuple[str, set[str]]] = field(default_factory=list)
    _now: dict[str, str] = field(default_factory=dict)

    def taken(self) -> Taken:
        """What it runs after another look."""
        refused = 0
        for kind in ("clusters", "routes"):
            document = _parsed((self.directory / f"{kind}.yaml").read_text())
            if document["version_info"] == self._now.get(kind):
                continue
            if kind in self._now and kind == self.refuses:
                refused = 1
            elif kind not in self._now or kind != self.ignores:
                self._now[kind] = document["version_info"]
                self.seen.append((kind, _names(document)))
        return Taken(clusters=self._now["clusters"], routes=self._now["routes"], refused=refused, warming=0)

    def resources(self) -> dict[str, list[dict[str, Any]]]:
        """Nothing to compare with."""
        return {"clusters": [], "routes": []}


@functools.cache
def _parsed(text: str) -> dict[str, Any]:
    """It looks hundreds of times at what hardly changes."""
    document: dict[str, Any] = yaml.safe_load(text)
    return document


def _names(document: dict[str, Any]) -> set[str]:
    found = set()
    for resource in document["resources"]:
        if "virtual_hosts" not in resource:
            found.add(resource["name"])
            continue
        for route in resource["virtual_hosts"][0]["routes"]:
            found.add(route.get("route", {}).get("cluster"))
    return found - {None, "no-pool"}


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    """An installation with the old document in force; what Envoy judges is another test's."""
    monkeypatch.setattr(control.apply, "judge", lambda *_: None)
    for name in ("run", "envoy"):
        (tmp_path / name).mkdir()
    (tmp_path / "envoy/models.yaml").write_text(OLD)
    (tmp_path / "new.yaml").write_text(NEW)
    publish(tmp_path / "envoy/models.yaml", tmp_path / "envoy")
    now = [0.0]
    envoy = Envoy(directory=tmp_path / "envoy")
    envoy.taken()
    envoy.seen.clear()
    return Desk(
        places=Places(tmp_path), envoy=Path("envoy"), admin=envoy,
        clock=lambda: now[0], sleep=lambda seconds: now.__setitem__(0, now[0] + seconds),
    )  # fmt: skip


def files(desk: Desk) -> dict[str, str]:
    """All that is in force."""
    return {path.name: path.read_text() for path in desk.places.envoy.iterdir()}


def test_no_route_ever_leads_to_a_pool_that_is_not_there(desk: Desk) -> None:
    """Old and new pools, then new routes, then new pools alone; the document with its comments."""
    assert isinstance(desk.admin, Envoy)

    applied = apply(desk, desk.places.home / "new.yaml")

    old, both, new = "pool/main/old", "pool/main/both", "pool/main/new"
    assert [("clusters", {old, both, new}), ("routes", {both, new}), ("clusters", {both, new})] == desk.admin.seen
    assert (["both", "new"], True) == (applied.models, applied.confirmed)
    assert NEW == files(desk)["models.yaml"]


@pytest.mark.parametrize("kind", ["clusters", "routes"])
def test_what_envoy_refuses_is_put_back(desk: Desk, kind: str) -> None:
    """Every file, at whichever step."""
    assert isinstance(desk.admin, Envoy)
    before, desk.admin.refuses = files(desk), kind

    with pytest.raises(Invalid, match=f"Envoy refused the {kind}"):
        apply(desk, desk.places.home / "new.yaml")

    assert before == files(desk)


@pytest.mark.parametrize("kind", ["clusters", "routes"])
def test_what_envoy_does_not_take_in_time_is_put_back(desk: Desk, kind: str) -> None:
    """Not before the time is over."""
    assert isinstance(desk.admin, Envoy)
    before, desk.admin.ignores = files(desk), kind

    with pytest.raises(Unavailable, match=f"did not take the {kind} within 30 s"):
        apply(desk, desk.places.home / "new.yaml")

    assert before == files(desk)
    assert TAKEN_WITHIN_SECONDS < desk.clock() < TAKEN_WITHIN_SECONDS + 1


def test_services_know_the_names_before_a_route_leads_there(desk: Desk) -> None:
    """One that is busy is waited for; one that has ended is not."""
    assert isinstance(desk.admin, Envoy)
    busy, ended = (Mark(desk.places.home / MODELS_READ_PATH, process=name) for name in ("busy", "ended"))
    os.close(ended._descriptor)
    seen: list[int] = []

    def sleep(seconds: float) -> None:
        seen.append(len(desk.admin.seen))  # type: ignore[union-attr]
        if len(seen) == 3:
            busy.say(digest(NEW.encode()))
        desk.sleep(seconds)

    apply(replace(desk, sleep=sleep), desk.places.home / "new.yaml")

    assert [0, 0, 0] == seen[:3]
    assert NEW == files(desk)["models.yaml"]


def test_a_service_that_does_not_read_it_in_time_is_named_and_everything_is_put_back(desk: Desk) -> None:
    """Envoy has heard nothing by then."""
    assert isinstance(desk.admin, Envoy)
    before, stuck = files(desk), Mark(desk.places.home / MODELS_READ_PATH, process="stuck")
    stuck.say(digest(OLD.encode()))

    with pytest.raises(Unavailable, match=f"Not read within 20 s by stuck-{os.getpid()}; the files from before are back"):
        apply(desk, desk.places.home / "new.yaml")

    assert (before, []) == (files(desk), desk.admin.seen)
    assert READ_WITHIN_SECONDS < desk.clock() < READ_WITHIN_SECONDS + 1


def test_without_an_envoy_the_files_wait_for_its_start(desk: Desk) -> None:
    """Nobody confirms."""
    applied = apply(replace(desk, admin=None), desk.places.home / "new.yaml")

    assert not applied.confirmed
    assert {"pool/main/both", "pool/main/new"} == _names(yaml.safe_load(files(desk)["clusters.yaml"]))


def test_two_at_a_time_are_one_too_many(desk: Desk) -> None:
    """The second hears it and changes nothing."""
    before = files(desk)

    with (desk.places.run / "apply.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(Conflict, match="under way"):
            apply(desk, desk.places.home / "new.yaml")

    assert before == files(desk)
