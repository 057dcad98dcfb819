# SPDX-License-Identifier: Apache-2.0
"""
The models that are served: one document (`envoy/models.yaml`) that every part reads.

    models:
    - {name: tiny, engine: dynamo, endpoints: ["127.0.0.1:8000"], tokenizer: /srv/models/tiny/tokenizer.json}
"""

from __future__ import annotations

import ipaddress
import re
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import structlog
import yaml

from chassis.errors import Invalid
from chassis.watching import file_version

log = structlog.get_logger()

#: Engine kinds that are known, and whether each sends running usage when asked
#: (`stream_options.continuous_usage_stats`). "openai" stands for any other compatible server,
#: which may refuse a field it does not know.
ENGINES = {"vllm": True, "dynamo": True, "trtllm": True, "openai": False}

_NAME = re.compile(r"[\x21-\x7e]{1,200}")
_ENDPOINT = re.compile(
    r"(?:(?P<scheme>https?)://)?(?P<host>\[[0-9A-Fa-f:]+\]|[A-Za-z0-9._-]+)(?::(?P<port>[0-9]{1,5}))?/?"
)
_NUMERIC = re.compile(r"[0-9.]+")
_LABEL = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")
_DEFAULT_PORTS = {"http": 80, "https": 443}
#: How often a watched document is looked at; one stat() each.
_LOOK_EVERY_SECONDS = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where a model server listens."""

    scheme: str
    host: str
    port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A served model: its name, the engine behind it, where that listens."""

    name: str
    engine: str
    endpoints: tuple[Endpoint, ...]
    #: The model's own tokenizer.json, where ratelimit runs; None: prompts are estimated by their bytes alone.
    tokenizer: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCatalogue:
    """All served models, immutable; a changed document makes a new one."""

    models: tuple[Model, ...]
    served: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "served", frozenset(model.name for model in self.models))

    @property
    def names(self) -> list[str]:
        """Served names, sorted."""
        return sorted(self.served)

    def engine_of(self, name: str) -> str | None:
        """The engine kind behind *name*, None if it is not served."""
        return next((model.engine for model in self.models if model.name == name), None)

    @classmethod
    def load(cls, path: Path) -> ModelCatalogue:
        """Read and check the document at *path*; raises `Invalid` with one line."""
        try:
            document = yaml.safe_load(path.read_text("utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as exc:
            reason = exc.strerror if isinstance(exc, OSError) else "it is not YAML"
            raise Invalid(f"{path}: cannot read the models document: {reason}.") from exc
        return cls.parse(document, source=str(path))

    @classmethod
    def parse(cls, document: object, *, source: str) -> ModelCatalogue:
        """Check a parsed document; *source* names it in messages."""
        entries = document.get("models") if isinstance(document, dict) else None
        if not isinstance(entries, list) or not entries:
            raise Invalid(f"{source}: `models` must be a list with at least one model.")
        models = tuple(_model(entry, source) for entry in entries)
        names = [model.name for model in models]
        for name in names:
            if names.count(name) > 1:
                raise Invalid(f"{source}: model {name!r} is listed twice.")
        return cls(models=models)


def supports_continuous_usage(engine: str) -> bool:
    """Whether *engine* sends running usage in each chunk when asked."""
    return ENGINES.get(engine, False)


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
        if now - self._looked_at < _LOOK_EVERY_SECONDS:
            return self._catalogue
        with self._lock:
            self._looked_at = now
            identity = file_version(self._path)
            if identity is not None and identity != self._identity:
                self._identity = identity
                try:
                    self._catalogue = ModelCatalogue.load(self._path)
                    log.info("models_reloaded", count=len(self._catalogue.models))
                except Invalid as exc:
                    log.error("models_refused", reason=exc.message)
        return self._catalogue


def _model(entry: object, source: str) -> Model:
    if not isinstance(entry, dict):
        raise Invalid(f"{source}: each model is a mapping with name, engine and endpoints.")
    unknown = set(entry) - {"name", "engine", "endpoints", "tokenizer"}
    if unknown:
        raise Invalid(f"{source}: unknown field {min(map(str, unknown))!r} in a model.")
    name, engine, endpoints = entry.get("name"), entry.get("engine"), entry.get("endpoints")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise Invalid(f"{source}: a model's name has 1 to 200 printable ASCII characters without spaces.")
    if not isinstance(engine, str) or engine not in ENGINES:
        raise Invalid(f"{source}: model {name!r}: engine must be one of {', '.join(ENGINES)}.")
    if not isinstance(endpoints, list) or not endpoints:
        raise Invalid(f"{source}: model {name!r}: endpoints must be a list with at least one.")
    read = tuple(_endpoint(text, name, source) for text in endpoints)
    if len(set(read)) < len(read):
        raise Invalid(f"{source}: model {name!r}: an endpoint is listed twice.")
    if len({endpoint.scheme for endpoint in read}) > 1:
        # One pool is one Envoy cluster, and a cluster either speaks TLS or does not.
        raise Invalid(f"{source}: model {name!r}: endpoints must be all http or all https.")
    tokenizer = entry.get("tokenizer")
    if tokenizer is not None and not (isinstance(tokenizer, str) and Path(tokenizer).is_absolute()):
        raise Invalid(f"{source}: model {name!r}: tokenizer is the absolute path of a tokenizer.json.")
    return Model(name=name, engine=engine, endpoints=read, tokenizer=Path(tokenizer) if tokenizer is not None else None)


def _endpoint(text: object, name: str, source: str) -> Endpoint:
    matched = _ENDPOINT.fullmatch(text) if isinstance(text, str) else None
    if matched is None or (matched["scheme"] is None and matched["port"] is None):
        raise Invalid(f"{source}: model {name!r}: an endpoint is host:port or http(s)://host[:port].")
    scheme = matched["scheme"] or "http"
    port = int(matched["port"] or _DEFAULT_PORTS[scheme])
    if not 0 < port < 65536:
        raise Invalid(f"{source}: model {name!r}: {port} is not a port.")
    host = matched["host"].strip("[]")
    if not _is_host(host, is_bracketed=matched["host"].startswith("[")):
        raise Invalid(f"{source}: model {name!r}: {host!r} is not a host.")
    return Endpoint(scheme=scheme, host=host, port=port)


def _is_host(host: str, *, is_bracketed: bool) -> bool:
    # Envoy refuses the whole resource for one bad address, and every pool with it.
    if is_bracketed or _NUMERIC.fullmatch(host):
        try:
            return ipaddress.ip_address(host).version == (6 if is_bracketed else 4)
        except ValueError:
            return False
    return len(host) <= 253 and all(_LABEL.fullmatch(label) for label in host.removesuffix(".").split("."))
