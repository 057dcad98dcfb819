# SPDX-License-Identifier: Apache-2.0
"""
Write one JSON line per event to stderr: an event name and key/values, UTC.

Never given credentials, prompts, bodies or claims: there is no redaction here to rely on.
Libraries that use the standard `logging` come out in the same form.

The level is changed while the process runs: by a file in the state directory that is looked at once a second.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import structlog
from structlog.typing import Processor

from chassis.errors import Invalid
from chassis.watching import file_version

#: Quieter hides a refused reload or a dropped row; noisier is one line per decision.
_LEVEL_DEFAULT: Final = "info"
_LEVELS: Final = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}
LEVELS: Final = tuple(_LEVELS)
#: Below the state directory. A level in it acts on every process that has this directory; without it, PEAJE_LOG_LEVEL does.
LEVEL_PATH: Final = "run/log-level"
_LOOK_EVERY_SECONDS: Final = 1.0


def configure(service: str) -> None:
    """
    Make every later log line of this process a JSON line that names *service*.

    The level comes from PEAJE_LOG_LEVEL, and from `LEVEL_PATH` while that is there. Call once, at the very start of
    a process.
    """
    gate = LevelGate(_level(os.environ.get("PEAJE_LOG_LEVEL", _LEVEL_DEFAULT)), Path(os.environ.get("PEAJE_HOME") or ".peaje") / LEVEL_PATH)
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _named(service),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        # Dropped by the gate and not by the class, which each logger keeps for its life.
        processors=[gate, *shared, structlog.processors.JSONRenderer()],
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, structlog.processors.JSONRenderer()],
        )
    )
    # Libraries are heard from "warning" up: their "info" is their own narration.
    logging.basicConfig(handlers=[handler], level=max(gate.level, logging.WARNING), force=True)
    gate.changed = lambda: logging.getLogger().setLevel(max(gate.level, logging.WARNING))
    threading.Thread(target=_watch, args=(gate,), name="log-level", daemon=True).start()


class LevelGate:
    """Lets events through that are as loud as the level in force; *first* holds while there is no file at *path*."""

    def __init__(self, first: int, path: Path) -> None:
        self._first = first
        self._path = path
        self._seen: tuple[int, int] | None = None
        self.level = first
        self.changed: Callable[[], None] = lambda: None

    def __call__(self, _logger: object, method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        """Drop what is too quiet, as a processor of structlog does."""
        if _LEVELS.get(method, logging.CRITICAL) < self.level:
            raise structlog.DropEvent
        return event

    def look(self) -> None:
        """Take a new level, if the file has one; what is none is told of and changes nothing."""
        seen = file_version(self._path)
        if seen == self._seen:
            return
        self._seen = seen
        try:
            level = self._first if seen is None else _level(self._path.read_text("utf-8").strip())
        except (OSError, UnicodeDecodeError, Invalid):
            structlog.get_logger().warning("log_level_refused")
            return
        if level != self.level:
            self.level = level
            self.changed()
            # Said at any level: whoever reads on must know that from here on there is more, or less.
            structlog.get_logger().error("log_level_changed", level=logging.getLevelName(level).lower())


def _watch(gate: LevelGate) -> None:
    pause = threading.Event()
    while True:
        gate.look()
        pause.wait(_LOOK_EVERY_SECONDS)


def logger() -> Any:
    """Return the process's logger; call it as `logger().info("event_name", key=value)`."""
    return structlog.get_logger()


def refuse_unknown_level(environ: Mapping[str, str]) -> None:
    """Raise `Invalid` for a PEAJE_LOG_LEVEL that no process would start with."""
    _level(environ.get("PEAJE_LOG_LEVEL", _LEVEL_DEFAULT))


def _level(name: str) -> int:
    if name.lower() not in _LEVELS:
        raise Invalid(f"The log level is {name[:20]!r}.", mend=f"Use one of {', '.join(_LEVELS)}.")
    return _LEVELS[name.lower()]


def _named(service: str) -> Processor:
    def add_service(_logger: object, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        event["service"] = service
        return event

    return add_service
