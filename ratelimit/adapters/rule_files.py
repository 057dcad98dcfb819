# SPDX-License-Identifier: Apache-2.0
"""
The rules in force: read from a directory, read again when a file in it changes, swapped as one.

All files or none. While one has a fault the last good rules stay in force, and the first time there
are none, so that a mistake in somebody's file never stops Peaje's own limits.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

from chassis.watching import file_version
from ratelimit.adapters import rule_metrics as metrics
from ratelimit.core.rls.document import Document, all_remarks, combine, read
from ratelimit.core.rls.fields import Remark
from ratelimit.core.rls.rules import Rules

log = structlog.get_logger()

DIRECTORY: Final = "ratelimit.d"
#: A change acts within a second: half of it until it is seen, the rest to read it.
LOOK_EVERY_SECONDS: Final = 0.5
#: Of one file; a wrong link may lead to anything.
BYTES_MAX: Final = 4 << 20
FILES_MAX: Final = 1_000
_SUFFIXES: Final = (".yaml", ".yml")
#: Faults that one refusal logs; `peaje check` has all of them.
_LOGGED_MAX: Final = 10

Seen = tuple[tuple[str, tuple[int, int] | None], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """All files of a directory as they are now; with *faults*, *rules* are not to be used."""

    rules: Rules
    faults: tuple[Remark, ...]
    remarks: tuple[Remark, ...]


def load(directory: Path) -> Loaded:
    """Read every YAML file in *directory*."""
    try:
        files, others = _files(directory)
    except OSError as exc:
        fault = Remark(file=str(directory), line=0, what=f"{exc.strerror}.", mend="Make the directory, or name another.")
        return Loaded(rules=Rules({}), faults=(fault,), remarks=())
    if len(files) > FILES_MAX:
        fault = Remark(file=str(directory), line=0, what=f"{len(files)} files.", mend=f"Keep to {FILES_MAX}.")
        return Loaded(rules=Rules({}), faults=(fault,), remarks=())
    documents: list[Document] = []
    unread: list[Remark] = []
    for path in files:
        text = _text(path)
        if isinstance(text, Remark):
            unread.append(text)
        else:
            documents.append(read(text, file=str(path)))
    rules, faults = combine(documents)
    ignored = [
        Remark(file=str(path), line=0, what="is not read:", mend=f"only {' and '.join(_SUFFIXES)} are.") for path in others
    ]
    return Loaded(rules=rules, faults=(*unread, *faults), remarks=(*all_remarks(documents), *ignored))


class RuleFiles:
    """Whoever asks gets rules that were whole and good at one moment."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.current = Rules({})
        #: None: there is no directory, which at first means that nobody wants rules.
        self._seen: Seen | None = None
        metrics.RULES_CURRENT.set(1)
        self.reload_if_changed()

    def watch(self) -> None:
        """Take over whatever changes, from a thread of its own."""

        def run() -> None:
            pause = threading.Event()
            while not pause.wait(LOOK_EVERY_SECONDS):
                self.reload_if_changed()

        threading.Thread(target=run, name="rules", daemon=True).start()

    def reload_if_changed(self) -> None:
        """Build, validate, swap; a fault anywhere, or a directory that is gone, keeps all that was."""
        seen = _look(self._directory)
        if seen == self._seen:
            return
        # Noted first: what changes while it is read is seen again with the next look.
        self._seen = seen
        loaded = load(self._directory)
        if loaded.faults:
            metrics.RULE_RELOADS.labels("refused").inc()
            metrics.RULES_CURRENT.set(0)
            log.error("rules_refused", faults=[str(fault) for fault in loaded.faults[:_LOGGED_MAX]], count=len(loaded.faults))
            return
        self.current = loaded.rules
        metrics.RULE_RELOADS.labels("taken").inc()
        metrics.RULES_CURRENT.set(1)
        log.info("rules_taken", domains=len(loaded.rules.domains), remarks=len(loaded.remarks))


def _look(directory: Path) -> Seen | None:
    try:
        files, _ = _files(directory)
    except OSError:
        return None
    return tuple((path.name, file_version(path)) for path in files[: FILES_MAX + 1])


def _files(directory: Path) -> tuple[list[Path], list[Path]]:
    """Files that are read, and others; what begins with a dot is the tools' that put files there."""
    found = sorted(path for path in directory.iterdir() if not path.name.startswith("."))
    return [path for path in found if path.suffix in _SUFFIXES], [path for path in found if path.suffix not in _SUFFIXES]


def _text(path: Path) -> str | Remark:
    try:
        if path.stat().st_size > BYTES_MAX:
            return Remark(file=str(path), line=0, what=f"larger than {BYTES_MAX} bytes.", mend="Split it by domain.")
        return path.read_bytes().decode("utf-8-sig")
    except OSError as exc:
        return Remark(file=str(path), line=0, what=f"{exc.strerror}.", mend="Let ratelimit's user read it, or remove it.")
    except UnicodeDecodeError:
        return Remark(file=str(path), line=0, what="not UTF-8.", mend="Save it as UTF-8.")
