# SPDX-License-Identifier: Apache-2.0
"""
The supervisor in the background: `up --detach` starts it and listens until it is ready.

Options come as JSON on standard input, events go as lines of JSON to the descriptor that is
named as the only argument. Whoever started it may go away at any time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from chassis.errors import PeajeError
from control.laptop import logs, places, reporter, runner, state
from control.laptop.errors import Trouble
from control.laptop.places import REPOSITORY, Places
from control.laptop.runner import Options

_LOG = "supervisor.log"


def start(options: Options, out: reporter.Reporter) -> int:
    """Start a supervisor in the background and pass on what it tells until it is ready (0) or has failed (1)."""
    place = Places(options.home)
    places.make(place, passable=runner.runs_postgres_for_root(os.environ))
    with state.hold_lock(place):
        pass  # the supervisor takes it; asked here so that a second `up` does not touch the first one's log
    logs.rotate(place.log / _LOG)
    log = logs.open_for_appending(place.log / _LOG)
    ours, theirs = os.pipe()
    process = subprocess.Popen(  # noqa: S603 - ourselves
        [sys.executable, "-P", "-m", "control.laptop.daemon", str(theirs)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=log,
        pass_fds=(theirs,),
        start_new_session=True,
    )
    os.close(theirs)
    os.close(log)
    assert process.stdin is not None
    with process.stdin as stdin:
        stdin.write(json.dumps(options.document()).encode())
    with os.fdopen(ours) as events:
        try:
            for line in events:
                event: dict[str, Any] = json.loads(line)
                out.tell(event)
                if event["kind"] == reporter.READY:
                    return 0
        except KeyboardInterrupt:
            process.terminate()
            for line in events:
                out.tell(json.loads(line))
            process.wait()
            return 130
    status = process.wait()
    if status != 1:
        end = logs.tail(place.log / _LOG, since=0, hide=())
        raise Trouble(
            f"The supervisor ended with status {status}; the end of {place.log / _LOG}:", details=end
        )
    return status


def main() -> int:
    """Be the supervisor."""
    pipe = reporter.Pipe(int(sys.argv[1]), sys.stdout)
    options = Options.from_document(json.loads(sys.stdin.read()))
    try:
        return runner.run(options, _ClosingWhenReady(pipe))
    except PeajeError as exc:
        lines = exc.lines() if isinstance(exc, Trouble) else [str(exc)]
        pipe.tell({"kind": reporter.TROUBLE, "lines": lines})
        return 1
    finally:
        pipe.close()


class _ClosingWhenReady:
    """Passes events on; nobody listens past the one that says ready."""

    def __init__(self, pipe: reporter.Pipe) -> None:
        self._pipe = pipe

    def tell(self, event: reporter.Event) -> None:
        """Pass *event* on."""
        self._pipe.tell(event)
        if event["kind"] == reporter.READY:
            self._pipe.close()


if __name__ == "__main__":
    # Not the caller's directory: it may be removed while this runs.
    os.chdir(Path("/"))
    sys.exit(main())
