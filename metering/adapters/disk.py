# SPDX-License-Identifier: Apache-2.0
"""Watch the journal's disk, and close the road to new requests when it is nearly full."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import structlog

from metering.core.watermark import Level, WhenFull, level

log = structlog.get_logger()


@dataclass(slots=True, kw_only=True)
class Disk:
    """The disk that holds the journal in *directory*; *closed_mark* is what the tap looks for."""

    directory: Path
    closed_mark: Path
    when_full: WhenFull
    level: Level = Level.FINE
    used_percent: float = 0.0

    def look(self) -> Level:
        """Measure, tell of a change, and make or remove the mark."""
        self.used_percent = measure(self.directory)
        now = level(self.used_percent, self.level)
        if now is not self.level:
            log.warning("journal_disk", level=now.value, used_percent=round(self.used_percent, 1))
        self.level = now
        try:
            if now is Level.ACT and self.when_full is WhenFull.REFUSE:
                self.closed_mark.touch(mode=0o600)
            else:
                self.closed_mark.unlink(missing_ok=True)
        except OSError as exc:
            # Where no mark can be made no start can be written either, and the tap refuses by itself. What frees the
            # disk must go on.
            log.error("journal_mark_failed", reason=exc.strerror)
        return now


def measure(directory: Path) -> float:
    """Percent of the disk's space that is not to be had by us."""
    status = os.statvfs(directory)
    return 100.0 * (1 - status.f_bavail / status.f_blocks) if status.f_blocks else 0.0
