# SPDX-License-Identifier: Apache-2.0
"""What every file has (licence, docstring), and what no file has (a machine of ours, an index to install from)."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

SPDX: Final = "SPDX-License-Identifier: Apache-2.0"
#: It may follow a shebang.
_SPDX_WITHIN_LINES: Final = 2
_SOURCE_SUFFIXES: Final = {".py", ".lua", ".sql", ".proto", ".sh", ".toml", ".tf"}
_SOURCE_NAMES: Final = {"peaje", ".ci/run", "envoy/envoy.yaml"}
#: Written by protoc from the .proto beside it, which has its line.
_GENERATED: Final = re.compile(r"_pb2\.pyi?$")
#: Not ours to read: made by tools, or outside version control.
_NOT_OURS: Final = re.compile(r"^\.(?!ci$)|^__pycache__$|\.pyc$")

#: Somebody's home or workshop. /tmp, /etc, /usr and /var are where they are on every machine.
_MACHINE_PATH: Final = re.compile(r"(?<![\w.:}$~/])/(?:home|Users|work|mnt|root)/[\w.-]+")
#: Where packages come from is the machine's setting, never the project's.
_PACKAGE_INDEX: Final = re.compile(
    # Put together so that this file does not break its own rule.
    r"--(?:(?:extra-)?index-url|find-links|trusted-host)|\b(?:pypi|npmjs)\.org\b|\b(?:files\.)?pythonhosted\."
    r"|\[tool\.uv\.index\]|(?:PIP|UV)_INDEX"
)
_REQUIREMENT: Final = re.compile(r"^([a-z0-9][a-z0-9.-]*)==([^\s;\\]+)(?: ; [^\\]+)? ?\\?$")
_HASH: Final = re.compile(r"^    --hash=sha256:[0-9a-f]{64}(?: \\)?$")
_REQUIRED_NAME: Final = re.compile(r"^[A-Za-z0-9._-]+")


def walk(root: Path) -> Iterator[Path]:
    """Every file of the project below *root*; `.git`, environments, caches and state directories are none of it."""
    for path in sorted(root.iterdir()):
        if _NOT_OURS.search(path.name) or path.is_symlink():  # what a link leads to is met under its own name
            continue
        if path.is_dir():
            yield from walk(path)
        elif path.is_file():
            yield path


def unlicensed(root: Path) -> list[str]:
    """Source files without their SPDX line."""
    found = []
    for path in walk(root):
        name = path.relative_to(root).as_posix()
        if _GENERATED.search(name) or (path.suffix not in _SOURCE_SUFFIXES and name not in _SOURCE_NAMES):
            continue
        if not any(SPDX in line for line in path.read_text().splitlines()[:_SPDX_WITHIN_LINES]):
            found.append(f"{name} has no line with {SPDX}")
    return found


def undocumented(root: Path) -> list[str]:
    """Python modules that do not say what they are for."""
    return [
        f"{path.relative_to(root)} has no module docstring"
        for path in walk(root)
        if path.suffix == ".py" and not _GENERATED.search(path.name) and not ast.get_docstring(ast.parse(path.read_text()))
    ]


def packages_in_envoy(root: Path) -> list[str]:
    """
    Python below `envoy/`.

    An `__init__.py` there would hide the wheel's package of the same name, in which Envoy itself is.
    """
    return [f"{path.relative_to(root)}: no Python below envoy/" for path in walk(root / "envoy") if path.suffix == ".py"]


def local_traces(root: Path) -> list[str]:
    """Lines that hold on one machine only: paths of a person's home or workshop, addresses of a package index."""
    found = []
    for path in walk(root):
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), start=1):
            for pattern, what in ((_MACHINE_PATH, "a machine's path"), (_PACKAGE_INDEX, "a package index")):
                if pattern.search(line):
                    found.append(f"{path.relative_to(root)}:{number}: {what}: {line.strip()[:80]}")
    return found


def unlocked(lock: Path) -> list[str]:
    """Lines of *lock* that are not a pinned version with its hashes."""
    found = []
    hashes = dict.fromkeys(read_lock(lock), 0)
    current = ""
    for number, line in enumerate(lock.read_text().splitlines(), start=1):
        if requirement := _REQUIREMENT.match(line):
            current = requirement[1]
        elif _HASH.match(line) and current:
            hashes[current] += 1
        else:
            found.append(f"{lock.name}:{number}: neither a pinned version nor a hash: {line}")
    return found + [f"{lock.name}: {name} has no hash" for name, count in hashes.items() if not count]


def read_lock(lock: Path) -> dict[str, set[str]]:
    """The lines of each requirement of *lock* (one may be pinned twice, for different platforms)."""
    found: dict[str, set[str]] = {}
    current = ""
    for line in lock.read_text().splitlines():
        if requirement := _REQUIREMENT.match(line):
            current = requirement[1]
        if current:
            found.setdefault(current, set()).add(line.rstrip(" \\"))
    return found


def unlocked_requirements(root: Path) -> list[str]:
    """What pyproject.toml asks for and the lock of that set does not have, and where the two locks differ."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    peaje, test = read_lock(root / "locks/peaje.lock"), read_lock(root / "locks/test.lock")
    wanted = (
        ("peaje.lock", peaje, [*project["dependencies"], *extras["laptop"]]),
        ("test.lock", test, [*extras["test"], *extras["ship"]]),
    )
    found = [
        f"{lock} does not have {name}"
        for lock, locked, requirements in wanted
        for name in map(_name_of, requirements)
        if name not in locked
    ]
    # `./peaje test` makes the environment that `./peaje up` then uses.
    return found + [f"test.lock differs from peaje.lock in {name}" for name, lines in peaje.items() if test.get(name) != lines]


def _name_of(requirement: str) -> str:
    matched = _REQUIRED_NAME.match(requirement)
    assert matched is not None, requirement
    return re.sub(r"[._-]+", "-", matched[0]).lower()
