# SPDX-License-Identifier: Apache-2.0
"""Beside a running installation: mistakes at its command line, a second `up`, a second installation, another user."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from control.laptop.postgres import NOBODY, can_pass, tree_is_readable
from tests.dataplane.installation import Installation, Tenant, chat, free_ports, running
from tests.integration.laptop import attempt, copy_repository, processes_of

#: Large packages that `up` does without.
_ONLY_FOR_TESTS = ("mypy", "ruff", "openai", "anthropic", "grpc_tools", "lupa", "hypothesis")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--rpm", "-1"), "is -1; it must be"),
        (("--tpm", "-5"), "is -5; it must be"),
        (("--rpm", "many"), "--rpm is 'many'. Write a whole number, or none."),
        (("--rpm", "1.5"), "--rpm is '1.5'. Write a whole number, or none."),
        (("--rpm", "10", "--model", "no-such-model"), "no-such-model"),
        (("--rpm", "10", "--key", "nosuchkey"), "nosuchkey"),
    ],
)
def test_a_limit_that_can_never_be_right_is_refused_and_changes_nothing(
    road: Installation, tenant: Tenant, options: tuple[str, ...], expected: str
) -> None:
    """One line, an exit status that is not 0, and the limits are those of before."""
    road.cli("limits", "set", "--tenant", tenant.tenant_id, "--rpm", "1000")
    before = road.cli("limits", "show", "--tenant", tenant.tenant_id)

    done = road.run("limits", "set", "--tenant", tenant.tenant_id, *options)

    [line] = done.stderr.splitlines()
    assert 0 != done.returncode
    assert expected in line
    assert "" == done.stdout
    assert before == road.cli("limits", "show", "--tenant", tenant.tenant_id)


def test_up_twice_in_the_same_home_is_refused_and_the_first_goes_on(road: Installation, tenant: Tenant) -> None:
    """It is told who runs and what to do; the first one's processes and log are untouched."""
    before = {part["name"]: part["pid"] for part in road.status()["parts"]}

    for options in ((), ("--detach",)):
        done = attempt(road.home, *options)

        assert 1 == done.status
        assert done.line.startswith(f"Peaje is already running in {road.home} (pid ")
        assert "See `./peaje status`, stop it with `./peaje down`, or set PEAJE_HOME and the ports for a second one." in done.line

    assert before == {part["name"]: part["pid"] for part in road.status()["parts"]}
    assert 200 == road.post(tenant, json=chat()).status_code


def test_a_second_home_on_the_same_ports_is_refused_with_the_holder(road: Installation, tmp_path: Path) -> None:
    """The first one's Envoy is named."""
    done = attempt(tmp_path / "second", environment={"PEAJE_PORT": str(road.port)})

    assert 1 == done.status
    assert done.line.startswith(f"Port {road.port} (the tenants' endpoint) is taken by pid {road.pid('envoy')} (")
    assert [] == processes_of(tmp_path / "second")


def test_two_installations_run_side_by_side_and_share_nothing(
    road: Installation, tenant: Tenant, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Their own keys, their own rows; the end of one is not the end of the other."""
    with running(tmp_path_factory.mktemp("second"), "--engine", "fake") as second:
        other = second.new_tenant("other")

        assert 200 == second.post(other, json=chat()).status_code
        assert 200 == road.post(tenant, json=chat()).status_code
        assert 401 == second.post(tenant, json=chat()).status_code
        assert 401 == road.post(other, json=chat()).status_code
        assert 1 == len(second.rows(other, 1))
        assert [] == road.rows(other, 0)
        assert set() == {part["pid"] for part in road.status()["parts"] if part["pid"]} & {
            part["pid"] for part in second.status()["parts"] if part["pid"]
        }

    assert 3 == second.run("status").returncode
    assert [] == processes_of(second.home)
    assert 200 == road.post(tenant, json=chat()).status_code


# --- As an ordinary user ---------------------------------------------------------------------------------


@pytest.fixture
def workshop() -> Iterator[Path]:
    """A directory that everybody may pass and `nobody` may write below."""
    directory = Path(tempfile.mkdtemp(prefix="peaje-user-"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


def environment_for_others(workshop: Path, peaje: Path) -> Path:
    """
    This environment, if `nobody` can use it; else one with the same packages on the system's Python.

    Skips, with the reason, where there is neither.
    """
    ours = Path(sys.prefix)
    python = Path(sys.executable).resolve()
    if can_pass(python, NOBODY) and tree_is_readable(ours, NOBODY):
        return ours
    system = Path(f"/usr/bin/python{sys.version_info.major}.{sys.version_info.minor}")
    if not system.exists():
        pytest.skip(f"an ordinary user cannot run {python}, and the system has no Python of that version")
    target = workshop / "env"
    shutil.copytree(ours, target, symlinks=True, ignore=shutil.ignore_patterns(*_ONLY_FOR_TESTS, ".peaje-stamp"))
    for link in target.joinpath("bin").glob("python*"):
        link.unlink()
        link.symlink_to(system)
    target.joinpath("pyvenv.cfg").write_text(f"home = {system.parent}\ninclude-system-site-packages = false\n")
    # A lock asks for other packages on another patch release of Python: `./peaje` itself sees to them.
    made = subprocess.run(
        [peaje, "environment"], env={**os.environ, "PEAJE_ENV": str(target)}, capture_output=True, text=True, timeout=280, check=False
    )
    if made.returncode != 0:
        pytest.skip(f"no environment that an ordinary user can use: {made.stderr.splitlines()[-1]}")
    return target


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("setpriv") is None, reason="only root can become another user, with setpriv")
def test_it_runs_as_an_ordinary_user(workshop: Path) -> None:
    """From a copy that others may read, with a home of its own: up, a request, down, nothing left."""
    peaje = copy_repository(workshop / "repository")
    environment = environment_for_others(workshop, peaje)
    home = workshop / "home"
    home.mkdir()
    os.chown(home, NOBODY.uid, NOBODY.gid)
    as_nobody = ("setpriv", f"--reuid={NOBODY.uid}", f"--regid={NOBODY.gid}", "--clear-groups")
    ports = free_ports(3)
    settings = {
        "PEAJE_ENV": str(environment), "HOME": "/nonexistent",
        **dict(zip(("PEAJE_PORT", "PEAJE_CONTROL_PORT", "PEAJE_ADMIN_PORT"), map(str, ports), strict=True)),
    }  # fmt: skip

    done = attempt(home, "--detach", environment=settings, peaje=peaje, prefix=as_nobody)
    try:
        assert 0 == done.status, done.stdout + done.stderr
        key = (home / "secrets/demo-key").read_text().strip()
        answer = httpx.post(f"http://127.0.0.1:{ports[0]}/v1/chat/completions", json=chat(), headers={"authorization": f"Bearer {key}"}, timeout=60)
        assert 200 == answer.status_code, answer.text
        document = json.loads((home / "run/state.json").read_text())
        owners = {Path(f"/proc/{part['process']['pid']}").stat().st_uid for part in document["parts"] if part["process"]}
        assert {NOBODY.uid} == owners
    finally:
        down = subprocess.run(
            [*as_nobody, peaje, "down"], env={**os.environ, **settings, "PEAJE_HOME": str(home)}, capture_output=True, text=True,
            timeout=200, check=False,
        )  # fmt: skip
    assert 0 == down.returncode, down.stderr
    assert [] == processes_of(home)
    assert not any(path.stat().st_uid != NOBODY.uid for path in home.rglob("*"))
