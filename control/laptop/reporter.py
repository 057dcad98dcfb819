# SPDX-License-Identifier: Apache-2.0
"""
Tell a person what `up` and `down` are doing.

What happens is an `Event`, a plain mapping: printed at once, or sent as a line of JSON
by a supervisor in the background to the `up --detach` that started it.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Mapping
from typing import Any, Protocol, TextIO

Event = Mapping[str, Any]

SAY = "say"
WAITING = "waiting"
PART = "part"
TROUBLE = "trouble"
READY = "ready"


class Reporter(Protocol):
    """Where events go."""

    def tell(self, event: Event) -> None:
        """Take one event; never fails, nobody may be reading."""


class Printer:
    """Prints events: with colour and a spinner on a terminal, as plain lines elsewhere."""

    def __init__(self, *, out: TextIO | None = None, show_keys: bool = True) -> None:
        from rich.console import Console  # noqa: PLC0415 - `status` does without

        self._console = Console(file=out or sys.stdout, highlight=False, soft_wrap=True)
        self._errors = self._console if out else Console(stderr=True, highlight=False, soft_wrap=True)
        self._show_keys = show_keys
        self._status: Any = None
        unicode = (self._console.encoding or "").lower().startswith("utf")
        self._good, self._bad = ("✓", "✗") if unicode else ("ok", "!!")

    def tell(self, event: Event) -> None:
        """Print *event*; a reader that went away is no reason to stop."""
        with contextlib.suppress(OSError, ValueError):
            match event["kind"]:
                case "waiting":
                    self._spin(event["names"])
                case "say":
                    self._print(f"  {event['text']}")
                case "part":
                    self._part(event)
                case "trouble":
                    self._trouble(event["lines"])
                case "ready":
                    self._ready(event)

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._spin(())

    def _part(self, event: Event) -> None:
        seconds = f"{event['seconds']:5.1f} s"
        self._print(f"{self._good} {event['name']:<14} {event['what']:<10} {seconds}", mark="green")

    def _trouble(self, lines: list[str]) -> None:
        self._spin(())
        for number, line in enumerate(lines):
            if number == 0 and self._errors.is_terminal:
                self._errors.print(f"{self._bad} {line}", style="bold red", markup=False)
            else:
                self._errors.print(f"{self._bad} {line}" if number == 0 else line, markup=False)

    def _ready(self, event: Event) -> None:
        self._spin(())
        endpoint, key = event["endpoint"], event["key"]
        lines = ["", f"Peaje is ready ({event['seconds']:.1f} s).", ""]
        lines.append(f"  endpoint      {endpoint}")
        if self._show_keys:
            lines.append(f"  demo key      {key}")
        lines += [
            f"  models        {', '.join(event['models'])}  ({event['engine']})",
            f"  control API   {event['control']}  (token: {event['admin_token_file']})",
            f"  logs          {event['log']}",
            f"  stop          {event['stop']}",
            "",
        ]
        if self._show_keys:
            body = json.dumps(
                {
                    "model": event["models"][0],
                    "stream": True,
                    "max_tokens": 20,
                    "messages": [{"role": "user", "content": "Hello"}],
                }
            )
            lines += [
                "  Try it:",
                f"  curl -N {endpoint}/v1/chat/completions -H 'Authorization: Bearer {key}' "
                f"-H 'Content-Type: application/json' -d '{body}'",
                "",
            ]
        for line in lines:
            self._print(line)

    def _print(self, line: str, *, mark: str | None = None) -> None:
        if mark is not None and self._console.is_terminal:
            self._console.print(line[:1], style=mark, end="", markup=False)
            line = line[1:]
        self._console.print(line, markup=False)
        if not self._console.is_terminal:
            self._console.file.flush()

    def _spin(self, names: tuple[str, ...] | list[str]) -> None:
        if not self._console.is_terminal:
            return
        if not names:
            if self._status is not None:
                self._status.stop()
                self._status = None
            return
        text = f"[dim]{', '.join(names)}[/dim]"
        if self._status is None:
            self._status = self._console.status(text)
            self._status.start()
        else:
            self._status.update(text)


class Pipe:
    """Sends events to another process, and also writes them, without keys, to a log."""

    def __init__(self, descriptor: int, log: TextIO) -> None:
        self._file: TextIO | None = os.fdopen(descriptor, "w", buffering=1)
        self._log = Printer(out=log, show_keys=False)

    def tell(self, event: Event) -> None:
        """Send *event*; once the reader is gone, only the log is left."""
        self._log.tell(event)
        if self._file is not None:
            try:
                self._file.write(json.dumps(event) + "\n")
            except OSError:
                self.close()

    def close(self) -> None:
        """Tell the reader that there is no more to come."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None
