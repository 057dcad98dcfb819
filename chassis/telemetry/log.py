# SPDX-License-Identifier: Apache-2.0
"""
Write one JSON line per event to stderr: an event name and key/values, UTC.

Never given credentials, prompts, bodies or claims: there is no redaction here to rely on.
Libraries that use the standard `logging` come out in the same form.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Any, Final

import structlog
from structlog.typing import Processor

from chassis.errors import Invalid

#: Quieter hides a refused reload or a dropped row; noisier is one line per decision.
_LEVEL_DEFAULT: Final = "info"
_LEVELS: Final = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}


def configure(service: str) -> None:
    """
    Make every later log line of this process a JSON line that names *service*.

    The level comes from PEAJE_LOG_LEVEL. Call once, at the very start of a process.
    """
    level = _level(os.environ.get("PEAJE_LOG_LEVEL", _LEVEL_DEFAULT))
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _named(service),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[*shared, structlog.processors.JSONRenderer()],
        wrapper_class=structlog.make_filtering_bound_logger(level),
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
    logging.basicConfig(handlers=[handler], level=max(level, logging.WARNING), force=True)


def logger() -> Any:
    """Return the process's logger; call it as `logger().info("event_name", key=value)`."""
    return structlog.get_logger()


def _level(name: str) -> int:
    if name.lower() not in _LEVELS:
        raise Invalid(f"PEAJE_LOG_LEVEL is {name!r}.", mend=f"Use one of {', '.join(_LEVELS)}.")
    return _LEVELS[name.lower()]


def _named(service: str) -> Processor:
    def add_service(_logger: object, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        event["service"] = service
        return event

    return add_service
