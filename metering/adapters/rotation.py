# SPDX-License-Identifier: Apache-2.0
"""
Rotate the journal, and remove old files that are read.

The collector rotates, because only it knows what has been read. It renames the live file and asks
Envoy to open it anew; the tap does so by itself every two seconds. Until they have, they write on
to the renamed file, which loses nothing: every file is read on for as long as it is there, and none
is removed before Envoy has confirmed, it is read to its end and it has been quiet.

The start records follow under the same number, once Envoy has let go of its own renamed file: then no
start of a newer file has its end in an older one, and old files can go together.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from metering.adapters.tail import JournalFile, Place, list_files, look, starts_of

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
    #: None: Envoy cannot be asked from here, so whoever can rotates, and removes what is old.
    reopen: Callable[[], bool] | None
    #: Envoy has confirmed since the last rename. At the start that is not known.
    released: bool = False
    _quiet: dict[str, Quiet] = field(default_factory=dict)

    def rotate(self) -> None:
        """Rename the live file if it has grown to its bound; have Envoy let go of renamed ones."""
        if self.reopen is None:
            return
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
        if self.released:
            self._rotate_starts()

    def done(self, monotonic: float) -> list[JournalFile]:
        """Old files that nobody writes to any more, oldest first; each may still have a torn tail."""
        old = [found for found in look(self.live) if found.path not in (self.live, starts_of(self.live))]
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
        """
        Of the *done* files those that are read to their end and need not stay.

        They are Envoy's beyond the *kept_files* newest, and the start records that belong to none that stays.
        """
        read = [f for f in done if f.file_id in places and places[f.file_id].offset == f.size]
        starts = {path.name for path in list_files(starts_of(self.live))}
        ends = [f for f in read if f.path.name not in starts]
        gone = ends[: max(0, len(ends) - kept_files)]
        staying = [_number(path) for path in self.old_files() if path not in {f.path for f in gone}]
        return gone + [
            f for f in read if f.path.name in starts and all(_number(f.path) < number for number in staying)
        ]

    def old_files(self) -> list[Path]:
        """Envoy's files but the live one."""
        return [path for path in list_files(self.live) if path != self.live]

    def _rotate_starts(self) -> None:
        starts = starts_of(self.live)
        number = _newest(self.old_files())
        if starts.exists() and number > _newest(list_files(starts)):
            starts.rename(_numbered(starts, number))

    def _next_name(self) -> Path:
        number = 1 + max(_newest(self.old_files()), _newest(list_files(starts_of(self.live))))
        return _numbered(self.live, number)


def _numbered(live: Path, number: int) -> Path:
    return live.with_name(f"{live.stem}-{number:06d}.jsonl")


def _newest(paths: list[Path]) -> int:
    return max(map(_number, paths), default=0)


def _number(path: Path) -> int:
    """Its number by our rotation; 0 for the live file and for names that somebody else gave."""
    found = re.search(r"-([0-9]+)\.jsonl$", path.name)
    return int(found[1]) if found else 0
