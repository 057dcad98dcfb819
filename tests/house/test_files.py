# SPDX-License-Identifier: Apache-2.0
"""Licence, docstrings, no trace of a machine, locks with hashes; each rule is seen to fail where it must."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.house import files
from tests.house.conftest import Planter

_LICENCE = f"# {files.SPDX}\n"
_HASH = f"    --hash=sha256:{'0' * 64}"
#: In pieces, so that this file does not break the rule it tests.
_INDEX_OPTION = "--index" + "-url"
_HOME = "/ho" + "me/ada"


def test_every_source_file_names_its_licence(repository: Path) -> None:
    """Python, Lua, SQL, protos, shell, TOML and Envoy's bootstrap."""
    assert [] == files.unlicensed(repository)


def test_every_module_says_what_it_is_for(repository: Path) -> None:
    """A docstring at the top."""
    assert [] == files.undocumented(repository)


def test_no_python_below_envoy(repository: Path) -> None:
    """It would hide the wheel that Envoy comes in."""
    assert [] == files.packages_in_envoy(repository)


def test_no_file_knows_a_machine_or_a_package_index(repository: Path) -> None:
    """What holds on one machine only is a setting of that machine."""
    assert [] == files.local_traces(repository)


@pytest.mark.parametrize("lock", ["peaje.lock", "test.lock", "services.lock", "tools.lock", "docs.lock", "dynamo.lock"])
def test_every_locked_package_is_pinned_and_hashed(repository: Path, lock: str) -> None:
    """Nothing else is in a lock: no option, no address."""
    assert files.read_lock(repository / "locks" / lock)
    assert [] == files.unlocked(repository / "locks" / lock)


def test_the_locks_hold_what_the_project_asks_for(repository: Path) -> None:
    """And test.lock holds peaje.lock, line by line."""
    assert [] == files.unlocked_requirements(repository)


def test_the_rules_look_at_the_whole_project(repository: Path) -> None:
    """A rule over no file would hold for ever."""
    seen = {path.relative_to(repository).as_posix() for path in files.walk(repository)}

    assert {"peaje", ".ci/run", "envoy/gate.lua", "chassis/contract.py", "docs/concepts.md", "tests/house/files.py"} <= seen
    assert not any(name.startswith((".git/", ".venv/", ".peaje/")) or "__pycache__" in name for name in seen)


@pytest.mark.parametrize(
    "name", ["a.py", "envoy/gate.lua", "a.sql", "a.proto", "pyproject.toml", "peaje", "envoy/envoy.yaml"]
)
def test_a_source_file_without_a_licence_is_found(plant: Planter, name: str) -> None:
    """The line counts at the top only."""
    text = "\n\n\n" + _LICENCE

    assert [f"{name} has no line with {files.SPDX}"] == files.unlicensed(plant({name: text}))


def test_a_licence_below_a_shebang_counts(plant: Planter) -> None:
    """And generated modules and prose need none."""
    tree = plant({"peaje": f"#!/bin/sh\n{_LICENCE}", "x_pb2.py": "", "README.md": "# Title"})

    assert [] == files.unlicensed(tree)


def test_a_module_without_a_docstring_is_found(plant: Planter) -> None:
    """A comment is not one."""
    tree = plant({"a.py": f"{_LICENCE}# words\n", "b.py": f'{_LICENCE}"""Words."""\n'})

    assert ["a.py has no module docstring"] == files.undocumented(tree)


def test_a_package_below_envoy_is_found(plant: Planter) -> None:
    """At any depth."""
    tree = plant({"envoy/lua/__init__.py": "", "envoy/gate.lua": ""})

    assert ["envoy/lua/__init__.py: no Python below envoy/"] == files.packages_in_envoy(tree)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (f"cd {_HOME}/peaje", "a machine's path"),
        (f'path = "{_HOME}"', "a machine's path"),
        (f"pip install {_INDEX_OPTION} https://index.example", "a package index"),
        ("https://py" + "pi.org/simple", "a package index"),
        ("PIP_IN" + "DEX_URL=x", "a package index"),
    ],
)
def test_a_trace_of_a_machine_is_found(plant: Planter, line: str, what: str) -> None:
    """With its place."""
    found = files.local_traces(plant({"docs/x.md": f"\n{line}\n"}))

    assert [f"docs/x.md:2: {what}: {line}"] == found


@pytest.mark.parametrize("line", ["https://host.example/home/page", "$HOME/x", "/etc/ssl", "/tmp/x", "/v1/models", "~/work/x"])
def test_what_is_the_same_everywhere_is_no_trace(plant: Planter, line: str) -> None:
    """Addresses, variables, and the places that every Linux has."""
    assert [] == files.local_traces(plant({"x.md": line}))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a>=1 \\\n" + _HASH, "x.lock:1: neither a pinned version nor a hash: a>=1 \\"),
        ("a==1\n", "x.lock: a has no hash"),
        (f"a==1 \\\n{_HASH}\nb==2\n", "x.lock: b has no hash"),
        (f"{_INDEX_OPTION} https://index.example\na==1 \\\n{_HASH}", f"x.lock:1: neither a pinned version nor a hash: {_INDEX_OPTION} https://index.example"),
        ("a @ https://host.example/a.whl", "x.lock:1: neither a pinned version nor a hash: a @ https://host.example/a.whl"),
        ("a==1 \\\n    --hash=md5:00", "x.lock:2: neither a pinned version nor a hash:     --hash=md5:00"),
    ],
)  # fmt: skip
def test_a_lock_that_does_not_hold_is_found(plant: Planter, text: str, expected: str) -> None:
    """A range, a version without a hash, an option, an address, a weak hash."""
    assert expected in files.unlocked(plant({"x.lock": text}) / "x.lock")


def test_a_requirement_that_is_not_locked_is_found(plant: Planter) -> None:
    """In the set that asks for it; and a package that the two locks have in different versions."""
    tree = plant(
        {
            "pyproject.toml": (
                '[project]\ndependencies = ["a>=1", "B_c[x]>=2"]\n'
                '[project.optional-dependencies]\nlaptop = ["d==1"]\ntest = ["e"]\nship = ["f"]\n'
            ),
            "locks/peaje.lock": f"a==1 \\\n{_HASH}\nd==1 \\\n{_HASH}\n",
            "locks/test.lock": f"a==2 \\\n{_HASH}\nd==1 \\\n{_HASH}\n",
        }
    )

    assert [
        "peaje.lock does not have b-c",
        "test.lock does not have e",
        "test.lock does not have f",
        "test.lock differs from peaje.lock in a",
    ] == files.unlocked_requirements(tree)
