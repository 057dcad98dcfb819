# SPDX-License-Identifier: Apache-2.0
"""`./peaje up` as a person runs it who has made a mistake, and what it leaves behind."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.dataplane.installation import PEAJE, REPOSITORY, free_ports
from tests.house.files import walk

_UP_SECONDS_MAX = 240


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """An `up` that has ended."""

    home: Path
    status: int
    stdout: str
    stderr: str

    @property
    def line(self) -> str:
        """The one line that says what is wrong."""
        [line] = self.stderr.splitlines()
        return line.removeprefix("✗ ")

    def words(self) -> Iterator[str]:
        """Everything a person or a log could read of it: both outputs and every file but the secrets."""
        yield self.stdout
        yield self.stderr
        for path in self.home.rglob("*"):
            if path.is_file() and path.parent.name != "secrets":
                yield path.read_text(errors="replace")


def attempt(
    home: Path,
    *options: str,
    environment: Mapping[str, str] | None = None,
    peaje: Path = PEAJE,
    prefix: Sequence[str | Path] = (),
) -> Attempt:
    """Run `./peaje up` with free ports and the fake engine unless told otherwise."""
    ports = dict(zip(("PEAJE_PORT", "PEAJE_CONTROL_PORT", "PEAJE_ADMIN_PORT"), map(str, free_ports(3)), strict=True))
    chosen = () if {"--engine", "--model-server"} & set(options) else ("--engine", "fake")
    done = subprocess.run(
        [*prefix, peaje, "up", *chosen, *options], env={**os.environ, **ports, "PEAJE_HOME": str(home), **(environment or {})},
        capture_output=True, text=True, timeout=_UP_SECONDS_MAX, stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    return Attempt(home=home, status=done.returncode, stdout=done.stdout, stderr=done.stderr)


def processes_of(home: Path) -> list[str]:
    """Command lines of the processes that work in *home*, as every part does."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (entry / "cwd").readlink() == home:
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue
    return found


def status_of(home: Path) -> int:
    """The exit status of `./peaje status`: 3 when nothing runs."""
    return subprocess.run(
        [PEAJE, "status"], env={**os.environ, "PEAJE_HOME": str(home)}, capture_output=True, timeout=60, check=False
    ).returncode


def check(*directory: Path, home: Path) -> subprocess.CompletedProcess[str]:
    """`./peaje check`, on a directory if one is given, beside no installation."""
    return subprocess.run(
        [PEAJE, "check", *directory], env={**os.environ, "PEAJE_HOME": str(home), "PEAJE_CONTROL_PORT": str(free_ports(1)[0])},
        capture_output=True, text=True, timeout=_UP_SECONDS_MAX, stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip


def assert_nothing_started(done: Attempt) -> None:
    """It failed, no process is left, no store was made, and `status` agrees."""
    assert done.status == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert processes_of(done.home) == []
    assert not (done.home / "postgres").exists()
    assert b"" == b"".join(path.read_bytes() for path in (done.home / "journal").iterdir())
    assert 3 == status_of(done.home)


def copy_repository(target: Path) -> Path:
    """A copy of this repository that others may read; its front door."""
    for path in walk(REPOSITORY):
        copy = target / path.relative_to(REPOSITORY)
        copy.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
        copy.chmod(0o755 if os.access(path, os.X_OK) and path.stat().st_mode & 0o100 else 0o644)
    return target / "peaje"
