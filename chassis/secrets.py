# SPDX-License-Identifier: Apache-2.0
"""
Read and write the secrets of an installation in files that only their owner can read.

A secret that others can read, that is missing or that came with an example is a refusal to
start, in one line that names the file and never its content.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import Final

from chassis.errors import Invalid, Unavailable

#: Below this a secret can be guessed; what `up` makes is longer.
SECRET_LENGTH_MIN: Final = 32
#: Bytes. An HMAC key shorter than its hash weakens it.
PEPPER_BYTES_MIN: Final = 32
#: No secret of ours is longer; a wrong path may name a very large file.
_FILE_BYTES_MAX: Final = 4096
#: Fewer distinct characters than this is a placeholder, not randomness.
_DISTINCT_MIN: Final = 8

#: Names below `secrets/`: the first operator's token, and the one-time token that it is exchanged for.
ADMIN_TOKEN_NAME: Final = "admin-token"
BOOTSTRAP_TOKEN_NAME: Final = "bootstrap-token"

_PEPPER_NAME: Final = re.compile(r"pepper-([1-9][0-9]{0,8})")
_SAMPLE: Final = re.compile(
    r"change.?me|sample|example|placeholder|insecure|password|replace|your.?(secret|token|key)|deadbeef|1234567|0123456789abcdef",
    re.IGNORECASE,
)


def load_peppers(home: Path) -> dict[int, bytes]:
    """
    Read every `secrets/pepper-<version>` below *home*, by version. The highest one signs new keys.

    Refuses when there is none: without a pepper no key can be checked.
    """
    directory = home / "secrets"
    try:
        names = sorted(entry.name for entry in directory.iterdir())
    except OSError as exc:
        raise Invalid(f"The secrets in {directory} cannot be read: {exc.strerror}.", mend=_MEND_MISSING) from exc
    versions = {name: int(match[1]) for name in names if (match := _PEPPER_NAME.fullmatch(name))}
    if not versions:
        raise Invalid(f"There is no pepper in {directory}.", mend=_MEND_MISSING)
    return {version: _pepper(directory / name) for name, version in versions.items()}


def read_secret(path: Path) -> str:
    """Read one secret as text, without surrounding white space, or refuse a file that is not fit to hold one."""
    text = read_private(path)
    if len(text) < SECRET_LENGTH_MIN:
        raise Invalid(f"The secret {path} has fewer than {SECRET_LENGTH_MIN} characters.", mend=_MEND_WEAK)
    if _SAMPLE.search(text) or len(set(text)) < _DISTINCT_MIN:
        raise Invalid(f"The secret {path} is a sample value.", mend=_MEND_WEAK)
    return text


def read_private(path: Path) -> str:
    """Read a small text that only its owner may read, whatever it says: the file of a signing key, for one."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise Invalid(f"The secret {path} is not a regular file.")
        if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise Invalid(f"The secret {path} is open to others (mode {stat.S_IMODE(status.st_mode):04o}).", mend=f"Run chmod 600 {path}.")
        if status.st_size > _FILE_BYTES_MAX:
            raise Invalid(f"The secret {path} is larger than {_FILE_BYTES_MAX} bytes.")
        text = path.read_text("ascii").strip()
    except FileNotFoundError as exc:
        raise Invalid(f"The secret {path} is missing.", mend=_MEND_MISSING) from exc
    except UnicodeDecodeError as exc:
        raise Invalid(f"The secret {path} is not plain text.") from exc
    except OSError as exc:
        raise Unavailable(f"The secret {path} cannot be read: {exc.strerror}.") from exc
    return text


def write_private(path: Path, text: str) -> None:
    """Write *text* so that a reader sees the old or the new, and only the owner sees any."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        os.fchmod(descriptor, 0o600)
        file.write(text)
    os.replace(temporary, path)


def _pepper(path: Path) -> bytes:
    text = read_secret(path)
    try:
        pepper = bytes.fromhex(text)
    except ValueError as exc:
        raise Invalid(f"The pepper {path} is not hexadecimal.", mend=_MEND_WEAK) from exc
    if len(pepper) < PEPPER_BYTES_MIN:
        raise Invalid(f"The pepper {path} has fewer than {PEPPER_BYTES_MIN} bytes.", mend=_MEND_WEAK)
    return pepper


_MEND_MISSING: Final = "Start once with ./peaje up, which makes the secrets."
_MEND_WEAK: Final = "Write one with: python -c 'import secrets; print(secrets.token_hex(32))'."
