# SPDX-License-Identifier: Apache-2.0
"""Start records as Envoy's workers write them: on disk, or the request may not pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lupa.luajit21 import LuaRuntime

from metering.core.journal import parse
from tests.conformance.road import ROOT

_DRIVE = b"""
function(start, count, lease)
  local written, identity, request, admission = 0, { tenant = "acme" }, { started_at = "1.0" }, { admitted = true, lease = lease }
  for number = 1, count do
    if start(string.format("%08x-0000-4000-8000-000000000000", number), identity, request, admission, "epoch") then written = written + 1 end
  end
  return written
end
"""


class Worker:
    """One worker's script, of which as much is compiled as has become hot."""

    def __init__(self) -> None:
        self._lua = LuaRuntime(encoding=None)
        self._lua.execute(f"package.path = '{ROOT}/?.lua'".encode())
        self._journal: Any = self._lua.eval(b"require('envoy.lua.journal')")
        self._drive: Any = self._lua.eval(_DRIVE)
        #: Not Lua, as Envoy's is not: what is compiled begins anew behind it.
        self._lua.globals()[b"os"][b"time"] = lambda: self.second
        self.second = 0

    def starts(self, count: int, *, second: int, lease: str | None = None) -> int:
        """How many of *count* start records it says that it has written."""
        self.second = second
        return int(self._drive(self._journal[b"start"], count, lease and lease.encode()))


@pytest.mark.parametrize("before", [0, 1, 1000])
def test_a_start_that_a_full_disk_does_not_take_is_never_said_to_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: int
) -> None:
    """By a script that is cold, and by one that LuaJIT has compiled."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "journal").mkdir()
    live, worker = tmp_path / "journal/starts.jsonl", Worker()

    assert before == worker.starts(before, second=1)
    assert before == (live.read_bytes().count(b"\n") if before else 0)
    live.unlink(missing_ok=True)
    live.symlink_to("/dev/full")

    assert 0 == worker.starts(100, second=10)
    live.unlink()
    assert 100 == worker.starts(100, second=20)
    assert 100 == live.read_bytes().count(b"\n")


@pytest.mark.parametrize("lease", ["2f6ad4a8-0c2d-4f0b-9d4e-8a7c6b5d4e3f", None])
def test_the_lease_that_a_request_passed_on_is_read_from_its_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lease: str | None
) -> None:
    """Where it passed on none, none is named."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "journal").mkdir()

    assert 1 == Worker().starts(1, second=1, lease=lease)
    line = (tmp_path / "journal/starts.jsonl").read_bytes().rstrip()
    assert lease == parse(line).lease_id
    assert (lease is not None) == (b"lease" in line)
