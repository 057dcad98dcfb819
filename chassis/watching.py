# SPDX-License-Identifier: Apache-2.0
"""Tell whether a file has been replaced, for whoever reads it again then; one stat() a look."""

from __future__ import annotations

from pathlib import Path


def file_version(path: Path) -> tuple[int, int] | None:
    """When the file at *path* was written and which one it is (a renamed one is another); None if it cannot be seen."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino
