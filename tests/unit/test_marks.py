# SPDX-License-Identifier: Apache-2.0
"""What processes say of the document that they serve, and that the dead say nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from chassis.marks import Mark, digest, lagging

OLD, NEW = digest(b"old"), digest(b"new")
_SAYS_AND_WAITS = """
import sys
from pathlib import Path
from chassis.marks import Mark
Mark(Path(sys.argv[1]), process="other").say(sys.argv[2])
print("said", flush=True)
sys.stdin.read()
"""


def test_who_has_said_nothing_yet_is_waited_for(tmp_path: Path) -> None:
    """It may still read what was there before."""
    mark = Mark(tmp_path / "read", process="extauth")

    before, _ = lagging(tmp_path / "read", NEW), mark.say(NEW)

    assert 1 == len(before)
    assert before[0].startswith("extauth-")
    assert [] == lagging(tmp_path / "read", NEW)


def test_two_processes_of_one_name_are_two(tmp_path: Path) -> None:
    """Each has to say it."""
    first, second = Mark(tmp_path, process="extauth"), Mark(tmp_path, process="extauth")
    first.say(NEW)
    second.say(OLD)

    late = lagging(tmp_path, NEW)
    second.say(NEW)

    assert (1, []) == (len(late), lagging(tmp_path, NEW))


def test_a_process_that_was_killed_is_not_waited_for(tmp_path: Path) -> None:
    """However it ended; and what it said is removed."""
    process = subprocess.Popen(
        [sys.executable, "-c", _SAYS_AND_WAITS, tmp_path, OLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    alive = lagging(tmp_path, NEW)

    process.kill()
    process.communicate()

    assert [f"other-{process.pid}"] == alive
    assert [] == lagging(tmp_path, NEW)
    assert [] == list(tmp_path.iterdir())


def test_where_nobody_reads_nobody_is_waited_for(tmp_path: Path) -> None:
    """No directory at all, for one."""
    assert [] == lagging(tmp_path / "none", NEW)
