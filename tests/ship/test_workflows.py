# SPDX-License-Identifier: Apache-2.0
"""The workflows: pinned, with no more rights than they need, and with every step that a change or a release must take."""

from __future__ import annotations

import copy
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from tests.house.files import read_lock

_REPOSITORY: Final = Path(__file__).resolve().parents[2]
_DIRECTORY: Final = _REPOSITORY / ".github/workflows"
_NAMES: Final = ("ci.yml", "release.yml")
_PINNED: Final = re.compile(r"^[\w.-]+/[\w./-]+@[0-9a-f]{40}$")
#: What somebody outside chooses: in a script it would be a command.
_CHOSEN_OUTSIDE: Final = re.compile(r"\$\{\{")


def _load(name: str) -> Any:
    # YAML 1.1 reads the key `on` as true.
    document = yaml.safe_load((_DIRECTORY / name).read_text())
    document["on"] = document.pop(True)
    return document


def _steps(workflow: Any) -> Iterator[tuple[str, Any]]:
    for job, body in workflow["jobs"].items():
        for step in body["steps"]:
            yield job, step


def broken(workflow: Any) -> list[str]:
    """What no workflow of ours may have, one line each."""
    found = []
    if workflow.get("permissions") != {}:
        found.append("rights are given to every job")
    if {"pull_request_target", "workflow_run"} & set(workflow["on"]):
        found.append("a stranger's change runs with our secrets")
    for job, body in workflow["jobs"].items():
        if "permissions" not in body:
            found.append(f"{job}: does not say its rights")
        if "timeout-minutes" not in body:
            found.append(f"{job}: may run for hours")
        if "pull_request" in workflow["on"] and ("secrets." in str(body) or set(body.get("permissions", {}).values()) - {"read"}):
            found.append(f"{job}: a change has secrets or may write")
        if not re.search(r"-\d", body["runs-on"]):
            found.append(f"{job}: runs on whatever is newest")
    for job, step in _steps(workflow):
        found += [f"{job}: {what}" for what in _broken_step(step)]
    return found


def _broken_step(step: Any) -> Iterator[str]:
    uses, script = step.get("uses", ""), step.get("run", "")
    if uses and not _PINNED.match(uses):
        yield f"{uses} is not pinned"
    if uses.startswith("actions/checkout@") and step.get("with", {}).get("persist-credentials") is not False:
        yield "the token stays in the work tree"
    if _CHOSEN_OUTSIDE.search(script):
        yield "an expression in a script"
    if re.search(r"(curl|wget)[^\n]*\|\s*(ba)?sh|pip\"? install(?![^\n]*--require-hashes)", script):
        yield "installs what nobody has looked at"


@pytest.mark.parametrize("name", _NAMES)
def test_a_workflow_keeps_the_rules(name: str) -> None:
    """All that there are."""
    assert set(_NAMES) == {path.name for path in _DIRECTORY.iterdir()}
    assert [] == broken(_load(name))


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (("permissions",), {"contents": "write"}, "rights are given to every job"),
        (("on",), {"pull_request_target": {}}, "a stranger's change runs with our secrets"),
        (("jobs", "lint", "permissions"), {"contents": "write"}, "lint: a change has secrets or may write"),
        (("jobs", "lint", "runs-on"), "ubuntu-latest", "lint: runs on whatever is newest"),
        (("jobs", "lint", "steps", 0, "uses"), "actions/checkout@v7", "lint: actions/checkout@v7 is not pinned"),
        (("jobs", "lint", "steps", 0, "with"), {}, "lint: the token stays in the work tree"),
        (("jobs", "lint", "steps", 1, "run"), "echo ${{ github.head_ref }}", "lint: an expression in a script"),
        (("jobs", "lint", "steps", 1, "run"), "curl https://example.com | sh", "lint: installs what nobody has looked at"),
        (("jobs", "lint", "steps", 1, "run"), "pip install ruff", "lint: installs what nobody has looked at"),
    ],
)
def test_what_breaks_a_rule_is_found(path: tuple[Any, ...], value: Any, expected: str) -> None:
    """One thing wrong is that one line."""
    workflow = copy.deepcopy(_load("ci.yml"))
    place = workflow
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value

    assert [expected] == broken(workflow)


@pytest.mark.parametrize("name", _NAMES)
def test_a_pin_says_its_version(name: str) -> None:
    """And one action has one commit, everywhere."""
    pins = re.findall(r"uses: ([\w./-]+)@([0-9a-f]{40}) # (v\d+\.\d+\.\d+)$", "\n".join((_DIRECTORY / one).read_text() for one in _NAMES), re.MULTILINE)
    uses = re.findall(r"uses: ", (_DIRECTORY / name).read_text())

    assert uses
    assert len({action for action, _, _ in pins}) == len(set(pins))
    assert sum(len(re.findall("uses: ", (_DIRECTORY / one).read_text())) for one in _NAMES) == len(pins)


@pytest.mark.parametrize("name", _NAMES)
def test_every_script_is_one(name: str) -> None:
    """By the shell's own reading; and each file of ours that it names is there."""
    for _job, step in _steps(_load(name)):
        script = step.get("run")
        if script is None:
            continue
        subprocess.run(["bash", "-n"], input=script, text=True, check=True, timeout=10)
        for path in re.findall(r"(?<![\w./$}])((?:\./)?(?:locks|charts|tests|\.ci)/[\w./-]+|\./peaje)", script):
            assert (_REPOSITORY / path).exists(), path


def _scripts(name: str) -> str:
    return "\n".join(step.get("run", "") + step.get("uses", "") for _, step in _steps(_load(name)))


def test_a_change_is_linted_typed_tested_built_and_audited() -> None:
    """Whoever removes one of these has to remove it here, too."""
    ci = _scripts("ci.yml")

    for wanted in ("ruff check", "mypy", ".ci/run", "tests/chart", "helm package", "--target services", "--target gateway", "mkdocs", "pip-audit"):
        assert wanted in ci
    assert {"push", "pull_request", "schedule"} == _load("ci.yml")["on"].keys()


def test_a_release_is_tested_first_and_says_where_it_comes_from() -> None:
    """SBOM, provenance of images and files, a base by digest, a tag that is the version."""
    workflow, release = _load("release.yml"), _scripts("release.yml")

    assert "suite" == workflow["jobs"]["publish"]["needs"]
    for wanted in ("cyclonedx-py", "locks/services.lock", "--provenance=mode=max", "--sbom=true", "attest-build-provenance", "@$digest", "helm push", "gh release create"):
        assert wanted in release
    assert 3 == release.count("attest-build-provenance")
    assert {"tags"} == workflow["on"]["push"].keys()


def test_the_versions_of_a_release_are_one() -> None:
    """The chart's, its application's and the project's: what the release workflow compares with the tag."""
    chart = yaml.safe_load((_REPOSITORY / "charts/peaje/Chart.yaml").read_text())
    project = tomllib.loads((_REPOSITORY / "pyproject.toml").read_text())["project"]

    assert chart["version"] == chart["appVersion"] == project["version"]


def test_installing_runs_no_code_of_ours() -> None:
    """Nothing to build, nothing of ours in a lock: an environment is other people's wheels and a path."""
    project = tomllib.loads((_REPOSITORY / "pyproject.toml").read_text())

    assert "build-system" not in project
    assert project["tool"]["uv"]["package"] is False
    assert not any((_REPOSITORY / name).exists() for name in ("setup.py", "setup.cfg", "MANIFEST.in"))
    for lock in sorted((_REPOSITORY / "locks").glob("*.lock")):
        assert "peaje" not in read_lock(lock)
        assert not re.search(r"^(-e|\.|/|file:|https?:)", lock.read_text(), re.MULTILINE)


def test_the_audit_has_a_lock_of_its_own() -> None:
    """What audits is pinned as what it audits."""
    assert "pip-audit" in read_lock(_REPOSITORY / "locks/tools.lock")
