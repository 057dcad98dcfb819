# SPDX-License-Identifier: Apache-2.0
"""`./peaje` before there is a Python environment: old Pythons, missing modules, directories that are not ours."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.dataplane.installation import PEAJE

#: What the script calls; nothing else is on its PATH, so that no real Python and no uv is found.
_TOOLS = ("sh", "readlink", "dirname", "mkdir", "rm", "cat", "tail", "grep", "sed", "flock", "mv", "ls", "sleep")
_OLD = '#!/bin/sh\ncase $2 in *sys.exit*) exit 1 ;; *) echo 3.9.2 ;; esac\n'
_NO_VENV = f'#!/bin/sh\ncase $2 in *"import venv"*) exit 1 ;; esac\nexec {sys.executable} "$@"\n'


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A PATH with the usual tools and no Python."""
    directory = tmp_path / "bin"
    directory.mkdir()
    for tool in _TOOLS:
        found = shutil.which(tool)
        assert found is not None
        (directory / tool).symlink_to(found)
    return directory


def program(directory: Path, name: str, text: str) -> Path:
    """A program on that PATH."""
    file = directory / name
    file.write_text(text)
    file.chmod(0o755)
    return file


def knock(path: Path, environment: Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run `./peaje` with that PATH and an environment of its own."""
    return subprocess.run(
        [PEAJE, *(arguments or ("status",))], env={"PATH": str(path), "PEAJE_ENV": str(environment), **settings},
        capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip


def test_an_old_python_is_refused_with_its_version_and_the_mend(path: Path, tmp_path: Path) -> None:
    """One line; no environment is begun."""
    program(path, "python3", _OLD)

    done = knock(path, tmp_path / "env")

    assert 1 == done.returncode
    assert ["peaje: Python 3.11 or newer is needed, found: 3.9.2. Install one (Debian, Ubuntu: apt install python3 python3-venv) or name it in PEAJE_PYTHON"] == done.stderr.splitlines()
    assert not (tmp_path / "env").exists()


def test_no_python_at_all_is_said(path: Path, tmp_path: Path) -> None:
    """Found: none."""
    done = knock(path, tmp_path / "env")

    [line] = done.stderr.splitlines()
    assert 1 == done.returncode
    assert "Python 3.11 or newer is needed, found: none." in line


def test_a_newer_python_beside_an_old_one_is_taken(path: Path, tmp_path: Path) -> None:
    """`python3` is what the system says; another may be there. It goes on to the next question."""
    program(path, "python3", _OLD)
    program(path, "python3.11", _NO_VENV)

    done = knock(path, tmp_path / "env")

    assert 1 == done.returncode
    assert "has no venv module" in done.stderr


def test_a_python_without_venv_is_refused_with_the_package_that_has_it(path: Path, tmp_path: Path) -> None:
    """As Debian ships it; the last line is the reason, and no environment is left half made."""
    program(path, "python3", _NO_VENV)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"

    done = knock(path, tmp_path / "env")

    assert 1 == done.returncode
    assert f"peaje: Python {version} has no venv module: install it (Debian, Ubuntu: apt install python{version}-venv), or put uv on PATH" == done.stderr.splitlines()[-1]
    assert not (tmp_path / "env").exists()


@pytest.mark.parametrize("text", [None, "#!/bin/sh\nexit 1\n", _OLD])
def test_a_named_python_that_will_not_do_is_refused(path: Path, tmp_path: Path, text: str | None) -> None:
    """PEAJE_PYTHON is taken at its word, not passed over."""
    named = path / "mine" if text is None else program(path, "mine", text)

    done = knock(path, tmp_path / "env", PEAJE_PYTHON=str(named))

    assert (1, [f"peaje: PEAJE_PYTHON={named} is not a Python of version 3.11 or newer: name one that is, or unset it"]) == (
        done.returncode, done.stderr.splitlines(),
    )  # fmt: skip


def test_a_directory_that_is_no_environment_is_left_alone(path: Path, tmp_path: Path) -> None:
    """PEAJE_ENV named a person's own."""
    program(path, "python3", _NO_VENV)
    own = tmp_path / "own"
    own.mkdir()
    (own / "thesis.txt").write_text("words")

    done = knock(path, own)

    assert (1, [f"peaje: {own} is not a Python environment and not empty: name another directory in PEAJE_ENV"]) == (
        done.returncode, done.stderr.splitlines(),
    )  # fmt: skip
    assert ["thesis.txt"] == [file.name for file in own.iterdir()]


def test_a_place_that_cannot_be_written_is_refused(path: Path) -> None:
    """In one line with the setting that mends it."""
    done = knock(path, Path("/proc/peaje/env"))

    assert (1, ["peaje: cannot write beside /proc/peaje/env: set PEAJE_ENV to a directory that you can write to"]) == (
        done.returncode, done.stderr.splitlines(),
    )  # fmt: skip


def test_an_installer_that_fails_leaves_an_environment_that_the_next_run_remakes(path: Path, tmp_path: Path) -> None:
    """Half made, it is never taken for whole."""
    uv = program(
        path, "uv",
        '#!/bin/sh\n[ "$1" != venv ] || { for last; do :; done; mkdir -p "$last/bin"; : >"$last/pyvenv.cfg"; exit 0; }\necho "network is unreachable"; exit 2\n',
    )  # fmt: skip
    program(path, "python3", _NO_VENV)
    environment = tmp_path / "env"

    first = knock(path, environment)
    uv.unlink()
    second = knock(path, environment)

    assert 1 == first.returncode
    assert "network is unreachable" in first.stderr
    assert first.stderr.splitlines()[-1].startswith("peaje: installing locks/peaje.lock failed; is the package index reachable?")
    assert f"peaje: remaking {environment}, it was left half made" == second.stderr.splitlines()[0]
    assert 1 == second.returncode


def test_an_unknown_environment_is_refused(path: Path, tmp_path: Path) -> None:
    """`./peaje environment` makes three."""
    done = knock(path, tmp_path / "env", "environment", "production")

    assert (1, ["peaje: no such environment: production (test, dynamo, or nothing)"]) == (done.returncode, done.stderr.splitlines())


def test_it_is_found_through_a_link_from_any_directory(tmp_path: Path) -> None:
    """A relative PEAJE_HOME is the caller's."""
    link = tmp_path / "p"
    link.symlink_to(PEAJE)

    done = subprocess.run(
        [link, "status"], cwd=tmp_path, env={**os.environ, "PEAJE_HOME": "mine"}, capture_output=True, text=True, timeout=60, check=False
    )

    assert (3, f"not running  {tmp_path / 'mine'}\n") == (done.returncode, done.stdout)
