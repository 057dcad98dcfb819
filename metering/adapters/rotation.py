# SPDX-License-Identifier: Apache-2.0
"""
Rotate the journal, and remove old files that are read.

The collector rotates, because only it knows what has been read. It renames the live file and asks
Envoy to open it anew; the tap does so by itself every two seconds. Until they have, they write on
to the renamed file, which loses nothing: every file is read on for as long as it is there, and none
is removed before Envoy has confirmed, it is read to its end and it has been quiet.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from metering.adapters.tail import JournalFile, Place, list_files, look

log = structlog.get_logger()

#: Far above the two seconds after which the tap lets go of a renamed file.
QUIET_SECONDS = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Quiet:
    """An old file and since when (monotonic seconds) it has had this size."""

    size: int
    since: float


@dataclass(slots=True, kw_only=True)
class Rotation:
    """The files of one journal; *reopen* asks Envoy to let go of renamed files and says whether it did."""

    live: Path
    bytes_max: int
    reopen: Callable[[], bool]
    #: Envoy has confirmed since the last rename. At the start that is not known.
    released: bool = False
    _quiet: dict[str, Quiet] = field(default_factory=dict)

    def rotate(self) -> None:
        """Rename the live file if it has grown to its bound; have Envoy let go of renamed ones."""
        size = self.live.stat().st_size if self.live.exists() else 0
        if size >= self.bytes_max:
            target = self._next_name()
            self.live.rename(target)
            self.released = False
            log.info("journal_rotated", file=target.name, byte_count=size)
        if not self.released and self.old_files():
            self.released = self.reopen()
            if not self.released:
                log.warning("journal_not_reopened")

    def done(self, monotonic: float) -> list[JournalFile]:
        """Old files that nobody writes to any more, oldest first; each may still have a torn tail."""
        old = [found for found in look(self.live) if found.path != self.live]
        for found in old:
            known = self._quiet.get(found.file_id)
            if known is None or known.size != found.size:
                self._quiet[found.file_id] = Quiet(size=found.size, since=monotonic)
        self._quiet = {found.file_id: self._quiet[found.file_id] for found in old}
        return [
            found for found in old
            if self.released and monotonic - self._quiet[found.file_id].since >= QUIET_SECONDS
        ]

    def superfluous(self, done: list[JournalFile], places: Mapping[str, Place], *, kept_files: int) -> list[JournalFile]:
        """Of the *done* files those that are read to their end, beyond the *kept_files* newest."""
        read = [f for f in done if f.file_id in places and places[f.file_id].offset == f.size]
        return read[: max(0, len(read) - kept_files)]

    def old_files(self) -> list[Path]:
        """All files but the live one."""
        return [path for path in list_files(self.live) if path != self.live]

    def _next_name(self) -> Path:
        numbers = [int(found[1]) for path in self.old_files() if (found := re.search(r"-([0-9]+)\.jsonl$", path.name))]
        return self.live.with_name(f"{self.live.stem}-{max(numbers, default=0) + 1:06d}.jsonl")
