# SPDX-License-Identifier: Apache-2.0
"""
Name each life of Envoy, and let the next one take over from the one that serves (Envoy's hot restart).

The new process asks the old one for its listening sockets, so no connection is refused, and once it is ready the old one
goes on with what it has and takes nothing new. Both write the journal meanwhile, each record whole: Envoy holds a lock that
the two share. Their names are one family (contract.EPOCH_HEIR), or the collector would take the old one for dead.

The new one asks the old one for its counts all the while, and dies if nobody answers: only it may end the old one.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import httpx

from chassis.contract import EPOCH_ENVIRONMENT, EPOCH_HEIR
from control.laptop import envoy_files
from control.laptop.errors import Trouble
from control.laptop.parts import Heir
from control.laptop.places import Places
from control.laptop.probes import Probe, http_client

#: Where a first life writes by which number its heirs find it, relative to the state directory.
BASE_ID: Final = "run/envoy.base-id"
#: Seconds after which the old one is ended whatever it still has.
_OLD_SERVES_SETTING: Final = "PEAJE_ENVOY_OLD_SERVES_SECONDS"
_OLD_SERVES_DEFAULT: Final = 300
_OLD_SERVES_MAX: Final = 86_400


def read_old_serves_seconds(environ: Mapping[str, str]) -> int:
    """How long a process that was taken over from goes on with its streams; raises `Trouble` if that is no number of seconds."""
    text = environ.get(_OLD_SERVES_SETTING, str(_OLD_SERVES_DEFAULT))
    if not text.isdecimal() or not 1 <= int(text) <= _OLD_SERVES_MAX:
        raise Trouble(f"{_OLD_SERVES_SETTING} is {text[:20]!r}.", mend=f"Use whole seconds from 1 to {_OLD_SERVES_MAX}.")
    return int(text)


class EnvoyLives:
    """Lives of one installation's Envoy since `up`."""

    def __init__(self, argv: tuple[str, ...], env: Mapping[str, str], admin: str, refresh: Callable[[], None]) -> None:
        self._argv = argv
        self._env = env
        self._admin = admin
        self._refresh = refresh
        self._family = ""
        self._number = 0

    @property
    def first_argv(self) -> tuple[str, ...]:
        """How a life without a forerunner is started."""
        # Shared memory of two installations, or of a life before this one, must not meet.
        return (*self._argv, "--use-dynamic-base-id", "--base-id-path", BASE_ID)

    def first(self) -> Mapping[str, str]:
        """Begin a family: the collector tells by its name which streams died with the last one."""
        self._family, self._number = uuid.uuid4().hex, 0
        # The supervisor's working directory is the state directory.
        envoy_files.started(Places(Path.cwd()))
        return {EPOCH_ENVIRONMENT: self._family}

    def heir(self) -> Heir:
        """The next life, which takes over from this one, with the files as they are now."""
        self._refresh()
        try:
            base_id = Path(BASE_ID).read_text().strip()
        except OSError as exc:
            raise Trouble(f"{BASE_ID} cannot be read: {exc.strerror}.", mend="./peaje down and ./peaje up start it anew.") from exc
        self._number += 1
        envoy_files.started(Places(Path.cwd()))
        return Heir(
            argv=(*self._argv, "--base-id", base_id, "--restart-epoch", str(self._number)),
            env={**self._env, EPOCH_ENVIRONMENT: f"{self._family}{EPOCH_HEIR}{self._number}"},
        )

    def lost(self) -> None:
        """An heir has not come to serve; its number is free again."""
        self._number -= 1

    def ready(self) -> Probe:
        """Ready when it is this life that answers, and it has seen every service healthy once."""

        async def probe() -> str | None:
            try:
                async with http_client() as client:
                    ready = await client.get(f"{self._admin}/ready")
                    info = (await client.get(f"{self._admin}/server_info")).json()
                    number = int(info["command_line_options"]["restart_epoch"])
            except (httpx.HTTPError, ValueError, KeyError) as exc:
                return f"{self._admin}: {type(exc).__name__}"
            if number != self._number:
                return "the one before it still answers"
            return None if ready.status_code == httpx.codes.OK else f"{self._admin}/ready answers {ready.status_code}"

        return probe
