# SPDX-License-Identifier: Apache-2.0
"""The tap's start records on a disk that fails: what was said to be written is there, and nothing else was let through."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from metering.core import lines
from tests.conformance.road import ROOT

#: A worker that writes starts until one fails, then on a disk that has room again. Its own process: the limit is the process's.
_WORKER = """
import resource, signal, sys
from lupa import luajit21
lua = luajit21.LuaRuntime(unpack_returned_tuples=True)
lua.execute("package.path = '%s/?.lua'" % sys.argv[1])
journal = lua.eval("require('envoy.lua.journal')")
if isinstance(journal, tuple):
    journal = journal[0]
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
request = lua.table_from({"started_at": "1760000000.000001", "dialect": "openai.chat", "model": "tiny", "stream": False})
identity, admission = lua.table_from({"tenant": "acme", "project": "default", "key_id": "k"}), lua.table_from({"admitted": True})
def start(number):
    return journal.start("00000000-0000-4000-8000-%012d" % number, identity, request, admission, "e" * 32)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
said = [start(number) for number in range(20)]
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
said += [start(number) for number in range(20, 30)]
print("".join("1" if it else "0" for it in said))
"""


def starts(directory: Path, bytes_max: int) -> str:
    """What the tap said of thirty starts, of which the first twenty meet a file that may not grow beyond so many bytes."""
    (directory / "journal").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", _WORKER, str(ROOT), str(bytes_max)], cwd=directory, capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout.strip()


@pytest.mark.parametrize("bytes_max", [0, 1, 1000, 1400])
def test_a_start_is_there_if_and_only_if_the_tap_said_so(tmp_path: Path, bytes_max: int) -> None:
    """Also where the write fails within a record: the half is named as a defect, the next record in its line counts."""
    said = starts(tmp_path, bytes_max)

    data = (tmp_path / "journal/starts.jsonl").read_bytes()
    entries, defects, _ = lines.read(data, offset=0)
    assert "1" * 10 == said[20:]
    assert "0" in said[:20] and ("1" in said[:20]) == (bytes_max >= 1000)
    assert [number for number, it in enumerate(said) if it == "1"] == [int(entry.request_id[-12:]) for entry in entries]
    assert (bytes_max > 0) == bool(defects)
