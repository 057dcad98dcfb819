# SPDX-License-Identifier: Apache-2.0
"""Wait for what comes about by itself: for the condition, never for a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

#: As long as a busy machine may take for what takes a moment.
WAIT_SECONDS: Final = 30.0
_LOOK_EVERY_SECONDS: Final = 0.05
#: Of what is told about a condition that did not come about; it may be a log.
_TOLD_LENGTH: Final = 3000


def until(condition: Callable[[], object], what: str | Callable[[], str] = "it did not come about", *, seconds: float = WAIT_SECONDS) -> None:
    """Wait until *condition* holds; if it does not within *seconds*, fail with *what*, which is only then asked."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            told = what if isinstance(what, str) else what()
            raise AssertionError(f"not within {seconds:.0f} s: {told[-_TOLD_LENGTH:]}")
        time.sleep(_LOOK_EVERY_SECONDS)
