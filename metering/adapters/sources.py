# SPDX-License-Identifier: Apache-2.0
"""Which journals a collector reads: one of this installation's, some that are named, or all below a directory."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from chassis.contract import JOURNAL_PATH
from chassis.errors import Invalid

#: Each is a thread and a connection of its own.
JOURNALS_MAX: Final = 64
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_FILE: Final = Path(JOURNAL_PATH).name
_FORM: Final = "Write it as NAME=PATH[@ADMIN_PORT], separated by commas, or as one directory that has a directory per journal."


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One journal."""

    #: In the ledger; unique among all Envoys that share a Postgres.
    name: str
    #: Its live file.
    live: Path
    #: Envoy's admin interface on loopback, which is asked to reopen a renamed file. None: it cannot be
    #: asked, so whoever can rotates.
    admin_port: int | None = None


def read_sources(text: str) -> list[Source]:
    """
    Journals that are named in *text*; raises `Invalid`.

    >>> [(it.name, str(it.live), it.admin_port) for it in read_sources("a=/v/a/journal.jsonl@9901, b=/v/b/journal.jsonl")]
    [('a', '/v/a/journal.jsonl', 9901), ('b', '/v/b/journal.jsonl', None)]
    """
    found = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, rest = part.partition("=")
        path, at, port = rest.rpartition("@") if re.search(r"@[0-9]{1,5}$", rest) else (rest, "", "")
        if not equals or not _NAME.fullmatch(name) or not path or (at and not 0 < int(port) < 65536):
            raise Invalid(f"PEAJE_COLLECTOR_JOURNALS has {part!r}.", mend=_FORM)
        found.append(Source(name=name, live=Path(path).absolute(), admin_port=int(port) if at else None))
    names, files = {source.name for source in found}, {source.live for source in found}
    if not len(found) == len(names) == len(files):
        raise Invalid("PEAJE_COLLECTOR_JOURNALS has a name or a file twice.")
    if not 1 <= len(found) <= JOURNALS_MAX:
        raise Invalid(f"PEAJE_COLLECTOR_JOURNALS has {len(found)} journals.", mend=f"A collector reads 1 to {JOURNALS_MAX}.")
    return found


def find_sources(directory: Path) -> list[Source]:
    """A journal for each directory below *directory*, by its name; the first `JOURNALS_MAX` of them."""
    names = sorted(path.name for path in directory.iterdir() if path.is_dir() and _NAME.fullmatch(path.name))
    return [Source(name=name, live=directory / name / _FILE) for name in names[:JOURNALS_MAX]]
