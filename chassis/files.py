# SPDX-License-Identifier: Apache-2.0
"""Read a file that somebody named, and never more of it than such a file can have: a wrong path may name anything."""

from __future__ import annotations

from pathlib import Path

from chassis.errors import Invalid


def read_bounded(path: Path, *, bytes_max: int) -> bytes:
    """All of the file at *path*, at most *bytes_max* (≤); raises `Invalid`, which names it, for a larger one or none."""
    try:
        with path.open("rb") as file:
            data = file.read(bytes_max + 1)
    except OSError as exc:
        raise Invalid(f"{path}: cannot be read: {exc.strerror}.") from exc
    if len(data) > bytes_max:
        raise Invalid(f"{path}: larger than {bytes_max} bytes.")
    return data


def read_text_bounded(path: Path, *, bytes_max: int) -> str:
    """The same as text; raises `Invalid` for what is not UTF-8, too."""
    try:
        return read_bounded(path, bytes_max=bytes_max).decode("utf-8")
    except UnicodeDecodeError as exc:
        raise Invalid(f"{path}: not UTF-8.") from exc
