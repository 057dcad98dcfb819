# SPDX-License-Identifier: Apache-2.0
"""
Read the identity document and notice when it is replaced: build, validate, swap.

A bad one keeps the last good one in force. Before there was a good one, nobody knows whose tokens are
good: API keys work, tokens are answered with 503.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

import structlog
import yaml

from chassis.errors import Invalid, PeajeError
from chassis.secrets import read_secret
from extauth.adapters.jose import ParsedSet, parse_set
from extauth.core.issuers import IdentityDocument, IdentityFaults, Introspector, Issuer, parse

log = structlog.get_logger()

Built = TypeVar("Built")

#: Ten thousand certificates have about a megabyte.
DOCUMENT_BYTES_MAX: Final = 8 << 20
#: How often the document is looked at; one stat() each.
LOOK_EVERY_SECONDS: Final = 0.5


def load(path: Path, *, home: Path) -> IdentityDocument:
    """
    Read and check the document at *path*, the key sets in it and the secret files that it names below *home*.

    Raises `IdentityFaults` that names every fault, or `Invalid` if there is nothing to look for faults in.
    """
    document = parse(_read(path), source=str(path))
    faults = [fault for index, one in enumerate(document.issuers) for fault in _faults(one, f"issuers[{index}]", home)]
    if faults:
        raise IdentityFaults(str(path), faults)
    return document


def secret_of(introspector: Introspector, home: Path) -> str:
    """The client secret that *introspector* names; raises `PeajeError` if the file is not fit to hold one."""
    return read_secret(home / introspector.client_secret_file)


class Watched(Generic[Built]):
    """What *build* makes of the document at a path, made anew when the file is replaced; no file is an empty document."""

    def __init__(
        self,
        path: Path,
        *,
        home: Path,
        build: Callable[[IdentityDocument, Built | None], Built],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = path
        self._home = home
        self._build = build
        self._clock = clock
        self._lock = threading.Lock()
        self._built: Built | None = None
        self._identity: object = None
        self._looked_at = clock()
        self._load(self._look())

    def current(self) -> Built | None:
        """What the newest good document became; None while there was none."""
        if self._clock() - self._looked_at >= LOOK_EVERY_SECONDS:
            with self._lock:
                self._looked_at = self._clock()
                identity = self._look()
                if identity != self._identity:
                    self._load(identity)
        return self._built

    def _load(self, identity: object) -> None:
        self._identity = identity
        try:
            document = IdentityDocument() if identity is None else load(self._path, home=self._home)
            self._built = self._build(document, self._built)
        except PeajeError as exc:
            log.error("identity_refused", reason=exc.message)
            return
        log.info("identity_loaded", issuers=len(document.issuers), certificates=len(document.certificates))

    def _look(self) -> object:
        try:
            status = os.stat(self._path)
        except FileNotFoundError:
            return None
        except OSError as exc:
            return exc.errno
        return status.st_mtime_ns, status.st_ino, status.st_size


def _faults(one: Issuer | Introspector, path: str, home: Path) -> Iterator[str]:
    if isinstance(one, Introspector):
        try:
            secret_of(one, home)
        except PeajeError as exc:
            yield f"{path}.client_secret_file: {exc.message.rstrip('.')}"
    elif one.jwks is not None:
        parsed = parse_set(one.jwks, algorithms=one.algorithms)
        if isinstance(parsed, str):
            yield f"{path}.jwks: {parsed}"
        else:
            yield from _key_faults(parsed, f"{path}.jwks")


def _key_faults(parsed: ParsedSet, path: str) -> Iterator[str]:
    for fault in parsed.faults:
        yield f"{path}.{fault}"
    if not parsed.keys and not parsed.faults:
        yield f"{path}: no key for an algorithm of the list"


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a name given twice: readers differ in which one counts."""


def _construct(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    loader.flatten_mapping(node)
    names = [loader.construct_object(key, deep=True) for key, _ in node.value]
    for name, (key, _) in zip(names, node.value, strict=True):
        if not isinstance(name, str) or names.count(name) > 1:
            raise yaml.constructor.ConstructorError(None, None, f"{name!r} is no name or given twice", key.start_mark)
    return {name: loader.construct_object(value, deep=True) for name, (_, value) in zip(names, node.value, strict=True)}


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct)


def _read(path: Path) -> object:
    try:
        if path.stat().st_size > DOCUMENT_BYTES_MAX:
            raise Invalid(f"{path}: larger than {DOCUMENT_BYTES_MAX} bytes.")
        return yaml.load(path.read_text("utf-8"), _Loader)  # noqa: S506 - a SafeLoader
    except OSError as exc:
        raise Invalid(f"{path}: cannot read the identity document: {exc.strerror}.") from exc
    except UnicodeDecodeError as exc:
        raise Invalid(f"{path}: not UTF-8.") from exc
    except yaml.YAMLError as exc:
        mark = getattr(exc, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark is not None else str(path)
        raise Invalid(f"{where}: not YAML: {getattr(exc, 'problem', None) or 'unreadable'}.") from exc
    except RecursionError as exc:
        raise Invalid(f"{path}: nested too deep.") from exc
