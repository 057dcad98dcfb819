# SPDX-License-Identifier: Apache-2.0
"""
`python -m chassis.beacon`: tell the Envoy beside us which keys and tenants have changed.

Envoy's workers remember decisions (envoy/lua/lane.lua) and look at one small file ten times a second.
This process writes it: a sequence, and who changed at which. What has not been heard for sure (after a
lost connection, a restart, too many changes at once) is a gap, and a gap makes a worker forget everything.

If this process or Postgres is away, what a worker remembers still ends by its own time (at most five
seconds): the beacon makes revocation fast, it is not what makes it certain.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import structlog
from prometheus_client import Counter
from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from chassis import contract
from chassis.serving import run
from chassis.settings import StoreSettings
from chassis.stores.postgres import listen
from chassis.telemetry import metrics
from chassis.telemetry.log import configure
from chassis.watching import file_version

log = structlog.get_logger()

#: Changes that a worker which looks every 100 ms can catch up with; more are a gap.
CHANGES_MAX: Final = 256
CHANNELS: Final = ("peaje_tenant", "peaje_project", "peaje_api_key", "peaje_service_account", "peaje_rate_limit")
#: A service may hear of a change a little later than Envoy and answer with the old state meanwhile;
#: so each change is said a second time, when every service has surely heard of it.
SAID_AGAIN_AFTER_SECONDS: Final = 0.3
#: The same for a new document, at which services look twice a second: by then each has read it.
DOCUMENT_READ_AFTER_SECONDS: Final = 1.5
#: Documents of the state directory that decisions depend on as well; a new one makes everything stale.
DOCUMENTS: Final = (contract.MODELS_PATH, contract.IDENTITY_PATH)
_TICK_SECONDS: Final = 0.05

_WRITE_FAILURES: Final = Counter(
    "peaje_beacon_write_failures_total", "Times that what Envoy's workers read could not be written; tried again at once."
)


class Settings(BaseSettings):
    """The beacon's own settings; the stores' are in `StoreSettings`."""

    model_config = SettingsConfigDict(env_prefix="PEAJE_BEACON_", frozen=True)

    #: Loopback port for Prometheus; 0 shows no metrics.
    metrics_port: int = Field(default=0, ge=0, le=65535)


@dataclass(slots=True)
class News:
    """What the file says. Sequences only grow, also from one life of this process to the next."""

    sequence: int
    _changes: deque[tuple[int, str]] = field(default_factory=lambda: deque(maxlen=CHANGES_MAX))

    def change(self, who: str) -> None:
        """Say that the key or tenant *who* changed."""
        self.sequence += 1
        self._changes.append((self.sequence, who))

    def forget(self) -> None:
        """Say that anything may have changed: a sequence whose predecessors nobody can be told."""
        self.sequence += 2
        self._changes.clear()

    def text(self) -> str:
        r"""
        Write the news as envoy/lua/lane.lua reads it.

        >>> news = News(sequence=7)
        >>> news.change("acme")
        >>> news.text()
        '8\n8 acme\n'
        """
        return f"{self.sequence}\n" + "".join(f"{sequence} {who}\n" for sequence, who in self._changes)


@dataclass(slots=True)
class Beacon:
    """Gathers changes from the listening thread and publishes them; `step` is its whole work."""

    path: Path
    documents: tuple[Path, ...]
    news: News
    _heard: deque[str] = field(default_factory=deque)
    _again: deque[tuple[float, str]] = field(default_factory=deque)
    _seen: tuple[object, ...] = ()
    _read_at: float | None = None
    _published: int = -1

    def heard(self, channel: str, payload: str) -> None:
        """Take a notification; an empty payload means that some may have been lost."""
        del channel
        self._heard.append(payload)

    def step(self, now: float) -> None:
        """Publish what was heard since the last step; *now* in seconds of any steady clock."""
        due = []
        while self._again and self._again[0][0] <= now:
            due.append(self._again.popleft()[1])
        while self._heard:
            who = self._heard.popleft()
            due.append(who)
            self._again.append((now + SAID_AGAIN_AFTER_SECONDS, who))
        seen = tuple(map(file_version, self.documents))
        if seen != self._seen:
            self._seen, self._read_at = seen, now + DOCUMENT_READ_AFTER_SECONDS
            due.append("")
        elif self._read_at is not None and self._read_at <= now:
            self._read_at = None
            due.append("")
        if "" in due or len(due) > CHANGES_MAX:
            self.news.forget()
        else:
            for who in dict.fromkeys(due):
                self.news.change(who)
        if self.news.sequence != self._published:
            self._write()

    def _write(self) -> None:
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(self.news.text())
            os.replace(temporary, self.path)
        except OSError as exc:
            # Tried again at the next step; until then entries end by their own time.
            log.error("beacon_cannot_write", reason=exc.strerror)
            _WRITE_FAILURES.inc()
            return
        self._published = self.news.sequence


def main() -> None:
    """Publish until SIGTERM."""
    configure("beacon")
    stores, settings = StoreSettings(), Settings()
    if settings.metrics_port:
        metrics.serve(settings.metrics_port, host=stores.metrics_host)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    path = stores.home / contract.CHANGES_PATH
    path.parent.mkdir(parents=True, exist_ok=True)
    beacon = Beacon(
        path=path,
        documents=tuple(stores.home / document for document in DOCUMENTS),
        # Later than any sequence of an earlier life, which grew slower than a million a second.
        news=News(sequence=time.time_ns() // 1000),
    )
    beacon.step(time.monotonic())
    listen(stores.require_postgres(), CHANNELS, beacon.heard, name="beacon")
    log.info("beacon_lit", path=str(path.relative_to(stores.home)))
    while not stop.wait(_TICK_SECONDS):
        beacon.step(time.monotonic())


if __name__ == "__main__":
    run(main)
