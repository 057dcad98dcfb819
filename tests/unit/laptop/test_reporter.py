# SPDX-License-Identifier: Apache-2.0
"""What a person sees, what goes to a log, and that a reader who leaves stops nothing."""

from __future__ import annotations

import io
import json
import os

import pytest

from control.laptop import reporter
from control.laptop.errors import Trouble
from control.laptop.reporter import Pipe, Printer

_KEY = "peaje_live_abc_secret"
_READY = {
    "kind": reporter.READY, "seconds": 7.25, "endpoint": "http://127.0.0.1:10000", "control": "http://127.0.0.1:10001",
    "key": _KEY, "models": ["tiny", "large"], "engine": "the fake engine", "admin_token_file": "/s/admin-token",
    "log": "/s/log", "stop": "./peaje down",
}  # fmt: skip


def printed(*events: reporter.Event, show_keys: bool = True) -> str:
    """What is printed where there is no terminal."""
    out = io.StringIO()
    printer = Printer(out=out, show_keys=show_keys)
    for event in events:
        printer.tell(event)
    printer.close()
    return out.getvalue()


def test_ready_shows_where_what_and_a_line_to_try() -> None:
    """The request in it is the one that a shell can run."""
    text = printed(_READY)

    assert "Peaje is ready (7.2 s)." in text
    assert f"demo key      {_KEY}" in text
    assert "models        tiny, large  (the fake engine)" in text
    [line] = [line for line in text.splitlines() if "curl" in line]
    assert "http://127.0.0.1:10000/v1/chat/completions" in line
    assert "tiny" == json.loads(line.partition(" -d '")[2].removesuffix("'"))["model"]


def test_a_log_shows_no_key() -> None:
    """Neither by itself nor in a line to try."""
    assert _KEY not in printed(_READY, show_keys=False)


def test_each_part_has_a_line() -> None:
    """Its name, what became of it, how long that took."""
    [line] = printed({"kind": reporter.PART, "name": "envoy", "what": "ready", "seconds": 1.23}).splitlines()

    assert ["envoy", "ready", "1.2", "s"] == line.split()[1:]


def test_trouble_is_one_line_and_its_proof() -> None:
    """What is in square brackets is text, not colour."""
    trouble = Trouble("envoy died [bold]now[/bold].", mend="See below.", details=["a [red]line[/red]", "another"])

    lines = printed({"kind": reporter.TROUBLE, "lines": trouble.lines()}).splitlines()

    assert lines[0].endswith("envoy died [bold]now[/bold]. See below.")
    assert ["    a [red]line[/red]", "    another"] == lines[1:]


def test_waiting_shows_nothing_without_a_terminal() -> None:
    """A log is not filled with spinners."""
    assert "" == printed({"kind": reporter.WAITING, "names": ["envoy"]})


def test_long_lines_are_not_wrapped() -> None:
    """They are to be copied."""
    assert 1 == len(printed({"kind": reporter.SAY, "text": "word " * 100}).splitlines())


def test_a_closed_output_stops_nothing() -> None:
    """Nobody may be reading."""
    out = io.StringIO()
    printer = Printer(out=out)
    out.close()

    printer.tell({"kind": reporter.SAY, "text": "anybody?"})


def test_a_pipe_sends_all_and_logs_without_keys() -> None:
    """A line of JSON for each event."""
    ours, theirs = os.pipe()
    log = io.StringIO()
    pipe = Pipe(theirs, log)

    pipe.tell(_READY)
    pipe.close()

    with os.fdopen(ours) as reader:
        assert [_READY] == [json.loads(line) for line in reader]
    assert "Peaje is ready" in log.getvalue()
    assert _KEY not in log.getvalue()


@pytest.mark.parametrize("events", [1, 3])
def test_a_pipe_whose_reader_has_gone_goes_on_logging(events: int) -> None:
    """Whoever started it in the background may go away at any time."""
    ours, theirs = os.pipe()
    log = io.StringIO()
    pipe = Pipe(theirs, log)
    os.close(ours)

    for number in range(events):
        pipe.tell({"kind": reporter.SAY, "text": f"event {number}"})
    pipe.close()

    assert [f"event {number}" for number in range(events)] == [line.strip() for line in log.getvalue().splitlines()]
