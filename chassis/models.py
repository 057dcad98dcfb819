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
from typing import Final

import structlog

from chassis import models_document
from chassis.errors import Invalid
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
    """The catalogue at a path, read again when the file is replaced; a bad file keeps the last good one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._identity = file_version(self._path)
        self._catalogue = ModelCatalogue.load(path)
        self._looked_at = time.monotonic()

    def current(self) -> ModelCatalogue:
        """The newest good catalogue."""
        now = time.monotonic()
        if now - self._looked_at < LOOK_EVERY_SECONDS:
            return self._catalogue
        with self._lock:
            self._looked_at = now
            identity = file_version(self._path)
            if identity is not None and identity != self._identity:
                self._identity = identity
                try:
                    self._catalogue = ModelCatalogue.load(self._path)
                    metrics.MODELS_REFUSED.set(0)
                    log.info("models_reloaded", count=len(self._catalogue.models))
                except Invalid as exc:
                    metrics.MODELS_REFUSED.set(1)
                    log.error("models_refused", reason=exc.message)
        return self._catalogue
