# SPDX-License-Identifier: Apache-2.0
"""
What is wrong with the settings in the environment, before anything is started by them.

Values are never said: some are secrets. A name that no setting has is told of only where it is nearly another's, for the
environment may have names of others that begin alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any, Final

from pydantic import ValidationError
from pydantic_settings import BaseSettings

from chassis.errors import PeajeError
from chassis.telemetry.log import refuse_unknown_level
from control.laptop.places import read_ports
from control.laptop.scale import SERVICES, read_scale

#: Variables of `./peaje` itself and of what it starts, which no class of settings has.
_OF_THE_FRONT_DOOR: Final = (
    "PEAJE_ENV", "PEAJE_PYTHON", "PEAJE_HOME", "PEAJE_PORT", "PEAJE_CONTROL_PORT", "PEAJE_ADMIN_PORT", "PEAJE_CONTROL_URL",
    "PEAJE_OPERATOR_TOKEN_FILE", "PEAJE_MODELS", "PEAJE_IDENTITY", "PEAJE_EXPRESS", "PEAJE_LOG_LEVEL", "PEAJE_SECRET_SCANNING_KEYS",
    "PEAJE_ENVOY_SOURCE", "PEAJE_ENVOY_BIN", "PEAJE_ENVOY_EPOCH", "PEAJE_ENVOY_OLD_SERVES_SECONDS", "PEAJE_POSTGRES_BIN",
    "PEAJE_VALKEY_BIN", *(f"PEAJE_{service.upper()}_PROCESSES" for service in SERVICES),
)  # fmt: skip
#: Of 1; a letter too few or two that changed places.
_NEARLY: Final = 0.9


def faults(environ: Mapping[str, str], kinds: list[type[BaseSettings]]) -> list[str]:
    """One sentence for each setting of *kinds* or of the front door that no part would start with, or that nobody reads."""
    return [*_values(environ, kinds), *_names(environ, kinds)]


def _values(environ: Mapping[str, str], kinds: list[type[BaseSettings]]) -> Iterator[str]:
    told = set()
    for kind in kinds:
        try:
            kind()
        except ValidationError as exc:
            for fault in exc.errors():
                # What only a pod has to say is not said here.
                sentence = f"{_variable(kind, fault['loc'])}: {fault['msg']}."
                if fault["type"] != "missing" and sentence not in told:
                    told.add(sentence)
                    yield sentence
        except PeajeError as exc:
            yield str(exc)
    for read in (read_scale, refuse_unknown_level, lambda it: read_ports(it, tenants=None, control=None, admin=None)):
        try:
            read(environ)
        except PeajeError as exc:
            yield str(exc)


def _names(environ: Mapping[str, str], kinds: list[type[BaseSettings]]) -> Iterator[str]:
    known = {variable(kind, field) for kind in kinds for field in kind.model_fields} | set(_OF_THE_FRONT_DOOR)
    for name in sorted(environ):
        if name.startswith("PEAJE_") and name not in known:
            for meant in get_close_matches(name, known, n=1, cutoff=_NEARLY):
                yield f"{name} is no setting, and does nothing. Is {meant} meant?"


def variable(kind: type[BaseSettings], field: str) -> str:
    """The environment variable that *field* of *kind* is read from."""
    return str(kind.model_fields[field].validation_alias or f"{kind.model_config.get('env_prefix', '')}{field}").upper()


def _variable(kind: type[BaseSettings], place: tuple[Any, ...]) -> str:
    name = str(place[0]) if place else ""
    return variable(kind, name) if name in kind.model_fields else name.upper() or kind.__module__
