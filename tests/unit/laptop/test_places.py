# SPDX-License-Identifier: Apache-2.0
"""Which directory is ours, which ports are meant, which secrets are kept."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from control.laptop import places
from control.laptop.errors import Trouble
from control.laptop.places import Places, Ports, read_ports

_NOBODY = 65534


def mode(path: Path) -> int:
    """The permission bits of *path*."""
    return stat.S_IMODE(path.stat().st_mode)


def test_an_option_wins_over_the_environment_and_that_over_the_default() -> None:
    """Each port by itself."""
    environ = {"PEAJE_PORT": "20000", "PEAJE_CONTROL_PORT": "20001"}

    assert Ports(tenants=30000, control=20001, admin=9901) == read_ports(environ, tenants=30000, control=None, admin=None)
    assert Ports(tenants=10000, control=10001, admin=9901) == read_ports({}, tenants=None, control=None, admin=None)


@pytest.mark.parametrize("text", ["abc", "0", "65536", "-1", "10000.5", "99999999999999999999"])
def test_what_is_not_a_port_is_refused(text: str) -> None:
    """In one line that repeats it."""
    with pytest.raises(Trouble, match=r"is not a port\. Give a number from 1 to 65535\.$") as refused:
        read_ports({"PEAJE_PORT": text}, tenants=None, control=None, admin=None)

    assert text in str(refused.value)


@pytest.mark.parametrize("number", [0, -1, 65536])
def test_an_option_that_is_not_a_port_is_refused(number: int) -> None:
    """As in the environment."""
    with pytest.raises(Trouble, match=f"^{number} is not a port"):
        read_ports({}, tenants=number, control=None, admin=None)


@pytest.mark.parametrize("number", [1, 65535])
def test_the_first_and_the_last_port_are_ports(number: int) -> None:
    """The bounds are inside."""
    assert number == read_ports({}, tenants=number, control=None, admin=None).tenants


def test_two_equal_ports_are_refused() -> None:
    """Before one of them is taken by the other."""
    with pytest.raises(Trouble, match=r"The ports must differ: tenants 10001, control 10001, admin 9901\."):
        read_ports({}, tenants=10001, control=None, admin=None)


def test_a_new_state_directory_is_the_owners_alone(tmp_path: Path) -> None:
    """Whatever the umask; its secrets too."""
    place = Places(tmp_path / "deep" / "home")
    before = os.umask(0)
    try:
        places.make(place, passable=False)
    finally:
        os.umask(before)

    directories = [place.home, place.run, place.log, place.secrets, place.journal, place.envoy, place.valkey]
    assert {0o700} == {mode(path) for path in directories}
    secrets = list(place.secrets.iterdir())
    assert {"pepper-1", "postgres-password", "valkey-password"} == {path.name for path in secrets}
    assert {0o600} == {mode(path) for path in secrets}


def test_a_passable_state_directory_can_be_passed_but_not_listed(tmp_path: Path) -> None:
    """For a Postgres that runs as another user; everything inside stays closed."""
    place = Places(tmp_path / "home")

    places.make(place, passable=True)

    assert 0o711 == mode(place.home)
    assert {0o700} == {mode(path) for path in (place.run, place.secrets, place.journal)}


def test_secrets_are_made_once(tmp_path: Path) -> None:
    """A second `up` finds those of the first; two installations never share one."""
    first, second = Places(tmp_path / "a"), Places(tmp_path / "b")
    places.make(first, passable=False)
    kept = {path.name: path.read_text() for path in first.secrets.iterdir()}

    places.make(first, passable=False)
    places.make(second, passable=False)

    assert kept == {path.name: path.read_text() for path in first.secrets.iterdir()}
    assert set() == set(kept.values()) & {path.read_text() for path in second.secrets.iterdir()}


def test_an_empty_directory_becomes_ours(tmp_path: Path) -> None:
    """It was named on purpose."""
    places.make(Places(tmp_path), passable=False)

    assert (tmp_path / places.MARKER).exists()


def test_a_directory_with_other_things_is_refused_and_left_alone(tmp_path: Path) -> None:
    """Neither its mode nor its content changes."""
    (tmp_path / "thesis.txt").write_text("words")
    tmp_path.chmod(0o755)

    with pytest.raises(Trouble, match="is not empty and not a state directory of Peaje"):
        places.make(Places(tmp_path), passable=False)

    assert ["thesis.txt"] == [path.name for path in tmp_path.iterdir()]
    assert 0o755 == mode(tmp_path)


def test_a_file_is_refused(tmp_path: Path) -> None:
    """Named by mistake."""
    path = tmp_path / "file"
    path.write_text("words")

    with pytest.raises(Trouble, match="is not a directory"):
        places.make(Places(path), passable=False)

    assert "words" == path.read_text()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory to another user")
def test_another_users_directory_is_refused(tmp_path: Path) -> None:
    """Also for root, who could."""
    os.chown(tmp_path, _NOBODY, _NOBODY)

    with pytest.raises(Trouble, match=f"belongs to another user .uid {_NOBODY}."):
        places.make(Places(tmp_path), passable=False)

    assert [] == list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_refused() -> None:
    """With the system's reason and the mend."""
    with pytest.raises(Trouble, match=r"^Cannot (make|use) the state directory /proc/peaje.*Name another one in PEAJE_HOME\.$"):
        places.make(Places(Path("/proc/peaje/home")), passable=False)


def test_a_socket_is_named_in_full_up_to_what_the_kernel_takes() -> None:
    """107 bytes; above, by the way that Linux keeps to the working directory."""
    relative = "run/valkey.sock"
    longest = Path("/" + "h" * (places.SOCKET_PATH_BYTES_MAX - len(relative) - 2))

    assert f"{longest}/{relative}" == places.socket_address(longest, relative)
    assert f"/proc/self/cwd/{relative}" == places.socket_address(Path(f"{longest}h"), relative)


def test_a_socket_path_is_counted_in_bytes() -> None:
    """Not in characters."""
    relative = "run/valkey.sock"
    home = Path("/" + "é" * 50)

    assert len(f"{home}/{relative}") < places.SOCKET_PATH_BYTES_MAX
    assert f"/proc/self/cwd/{relative}" == places.socket_address(home, relative)


def test_a_private_file_replaces_an_open_one(tmp_path: Path) -> None:
    """Its text and its mode; nothing else is left behind."""
    path = tmp_path / "token"
    path.write_text("old")
    path.chmod(0o644)

    places.write_private(path, "new")

    assert ("new", 0o600) == (path.read_text(), mode(path))
    assert [path] == list(tmp_path.iterdir())
