# SPDX-License-Identifier: Apache-2.0
"""
The models that are served: one document (`envoy/models.yaml`) that every part reads.

    models:
    - {name: tiny, engine: dynamo, endpoints: ["127.0.0.1:8000"], tokenizer: /srv/models/tiny/tokenizer.json}

A model whose servers are of more than one kind or release has `pools`; `chassis/models_document.py` knows how all
of it is written, `chassis/served.py` what it means.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

import structlog

from chassis import models_document
from chassis.contract import MODELS_PATH, MODELS_READ_PATH
from chassis.errors import Invalid
from chassis.marks import Mark, digest
from chassis.served import Model
from chassis.telemetry import metrics
from chassis.watching import file_version

log = structlog.get_logger()

#: How often a watched document is looked at; one stat() each.
LOOK_EVERY_SECONDS: Final = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCatalogue:
    """All served models, immutable; a changed document makes a new one."""

    models: tuple[Model, ...]
    served: frozenset[str] = field(init=False)
    #: Alias → the name of its model.
    aliases: Mapping[str, str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "served", frozenset(model.name for model in self.models))
        object.__setattr__(self, "aliases", {alias: model.name for model in self.models for alias in model.aliases})

    @property
    def names(self) -> list[str]:
        """Served names, sorted."""
        return sorted(self.served)

    def sends_running_usage(self, name: str) -> bool:
        """Whether every engine behind *name* sends running usage when asked; False if it is not served."""
        return any(model.sends_running_usage for model in self.models if model.name == name)

    @classmethod
    def load(cls, path: Path) -> ModelCatalogue:
        """Read and check the document at *path*; raises `Faulty` with every fault and its line."""
        return cls(models=models_document.load(path))

    @classmethod
    def parse(cls, document: object, *, source: str) -> ModelCatalogue:
        """Check a parsed document; *source* names it in messages."""
        return cls(models=models_document.parse(document, source=source))


class WatchedCatalogue:
    """
    The catalogue of one installation, read again when its document is replaced; a bad one keeps the last good one.

    Each process that serves by it also says so (`chassis/marks.py`): `apply` waits for all of them.
    """

    def __init__(self, home: Path, *, process: str) -> None:
        self._path = home / MODELS_PATH
        # Before the document is read: a process that `apply` does not see yet reads what `apply` has written.
        self._mark = _mark(home, process)
        self._identity = file_version(self._path)
        self._catalogue = self._read()

    def current(self) -> ModelCatalogue:
        """The newest good catalogue."""
        return self._catalogue

    def watch(self) -> Self:
        """Look for a new document from now on, for as long as the process lives."""
        threading.Thread(target=self._look_for_ever, name="models", daemon=True).start()
        return self

    def look(self) -> None:
        """Read the document again if it was replaced since the last look."""
        identity = file_version(self._path)
        if identity is None or identity == self._identity:
            return
        self._identity = identity
        try:
            self._catalogue = self._read()
        except Invalid as exc:
            metrics.MODELS_REFUSED.set(1)
            log.error("models_refused", reason=exc.message)
        else:
            metrics.MODELS_REFUSED.set(0)
            log.info("models_reloaded", count=len(self._catalogue.models))

    def _read(self) -> ModelCatalogue:
        text = models_document.text_of(self._path)
        catalogue = ModelCatalogue(models=models_document.read(text, source=str(self._path)))
        # Nobody is answered by the one before once this is said.
        self._catalogue = catalogue
        if self._mark is not None:
            self._mark.say(digest(text.encode()))
        return catalogue

    def _look_for_ever(self) -> None:
        while True:
            time.sleep(LOOK_EVERY_SECONDS)
            self.look()


def _mark(home: Path, process: str) -> Mark | None:
    try:
        return Mark(home / MODELS_READ_PATH, process=process)
    except OSError as exc:
        log.error("models_unmarked", reason=exc.strerror)  # serves all the same; `apply` does not wait for it
        return None
