# SPDX-License-Identifier: Apache-2.0
"""
Judge what a token says of itself: its parts, its header, its claims, and whom they name.

No cryptography here, and no trust: a header is judged before its signature is looked at, claims
only after it was verified. Stricter than JSON and JWT allow, because what two parsers can read
in two ways is refused.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

#: Seconds by which clocks may differ.
LEEWAY_SECONDS: Final = 30
#: Objects and arrays in one part of a token: bounds the depth, and so the parser's stack, before it is parsed.
CONTAINERS_MAX: Final = 256
KEY_ID_LENGTH_MAX: Final = 256
SUBJECT_LENGTH_MAX: Final = 256
LIST_COUNT_MAX: Final = 200

#: Each would let a token say how it is to be verified, or be read by rules that are not ours.
_REFUSED_HEADERS: Final = frozenset({"jku", "x5u", "jwk", "x5c", "crit", "b64", "zip", "enc", "epk", "p2c", "p2s"})
_BASE64URL: Final = re.compile(r"[A-Za-z0-9_-]+")
#: The year 10000: what no time of this world is.
_SECONDS_END: Final = 253_402_300_800
_SLUG: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")

#: A claim's place: one name, or the names on the way to it.
Path = tuple[str, ...]


class Unusable(Exception):
    """This token cannot be used; the text is a rule's name, for operators."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What an issuer's tokens must say."""

    issuer: str
    audiences: frozenset[str]
    #: Lower case, without `application/`; None leaves it open.
    type: str | None
    algorithms: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimMap:
    """Where an issuer's claims name tenant, project and rights; a fixed tenant or project needs no claim."""

    subject: Path = ("sub",)
    tenant: Path | None = None
    fixed_tenant: str | None = None
    project: Path | None = None
    fixed_project: str = "default"
    scopes: Path | None = ("scope",)
    #: For tokens that say nothing of scopes; None is every.
    default_scopes: frozenset[str] | None = None
    models: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """Whom a token names."""

    subject: str
    tenant_id: str
    project_id: str
    scopes: frozenset[str] | None
    models: tuple[str, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """A JWT taken apart, unverified."""

    header: Mapping[str, Any]
    payload: Mapping[str, Any]


def take_apart(token: str) -> Parts:
    """Decode a JWT's header and payload; raises `Unusable` for anything that is not both strictly."""
    header, payload, _ = token.split(".")
    return Parts(header=_object(header), payload=_object(payload))


def check_header(header: Mapping[str, Any], expected: Expected) -> tuple[str, str]:
    """Return the algorithm and the key id that *header* names; raises `Unusable`."""
    if _REFUSED_HEADERS & header.keys():
        raise Unusable("header_refused")
    algorithm, kid, kind = header.get("alg"), header.get("kid"), header.get("typ")
    if not isinstance(algorithm, str) or algorithm not in expected.algorithms:
        raise Unusable("algorithm_refused")
    if not isinstance(kid, str) or not 0 < len(kid) <= KEY_ID_LENGTH_MAX:
        raise Unusable("kid_missing")
    if expected.type is not None and (
        not isinstance(kind, str) or kind.lower().removeprefix("application/") != expected.type
    ):
        raise Unusable("type_refused")
    return algorithm, kid


def check_claims(claims: Mapping[str, Any], expected: Expected, now: datetime) -> float:
    """
    Check issuer, audience and times of verified *claims*; raises `Unusable`.

    Returns until when they hold, in seconds since 1970: usable while `now` is earlier.
    """
    if claims.get("iss") != expected.issuer:
        raise Unusable("issuer_wrong")
    audience = claims.get("aud")
    audiences = [audience] if isinstance(audience, str) else audience
    if not isinstance(audiences, list) or not any(
        isinstance(one, str) and one in expected.audiences for one in audiences
    ):
        raise Unusable("audience_wrong")
    return check_times(claims, now)


def check_times(claims: Mapping[str, Any], now: datetime) -> float:
    """Check exp (required), nbf and iat; returns until when they hold."""
    seconds = now.timestamp()
    expires = _moment(claims, "exp")
    if expires is None:
        raise Unusable("expiry_missing")
    if seconds >= expires + LEEWAY_SECONDS:
        raise Unusable("expired")
    for name in ("nbf", "iat"):
        moment = _moment(claims, name)
        if moment is not None and seconds < moment - LEEWAY_SECONDS:
            raise Unusable("not_yet_valid")
    return float(expires + LEEWAY_SECONDS)


def read_subject(claims: Mapping[str, Any], places: ClaimMap, known_scopes: frozenset[str]) -> Subject:
    """Read whom *claims* name; raises `Unusable`. Scopes that are not ours are somebody else's business."""
    if "cnf" in claims:
        # Bound to a key that its holder was to show (RFC 8705, 9449): worth nothing by itself.
        raise Unusable("bound_to_a_key")
    subject = _at(claims, places.subject)
    if not isinstance(subject, str) or not 0 < len(subject) <= SUBJECT_LENGTH_MAX or not subject.isprintable():
        raise Unusable("subject_missing")
    tenant = places.fixed_tenant if places.tenant is None else _at(claims, places.tenant)
    project = None if places.project is None else _at(claims, places.project)
    project = places.fixed_project if project is None else project
    if not isinstance(tenant, str) or not isinstance(project, str) or not _SLUG.fullmatch(tenant) or not _SLUG.fullmatch(project):
        raise Unusable("tenant_missing")
    scopes = _words(None if places.scopes is None else _at(claims, places.scopes))
    models = _words(None if places.models is None else _at(claims, places.models))
    return Subject(
        subject=subject,
        tenant_id=tenant,
        project_id=project,
        scopes=places.default_scopes if scopes is None else known_scopes.intersection(scopes),
        models=models,
    )


def strict_object(data: bytes) -> dict[str, Any]:
    """Parse a JSON object in which no name occurs twice, every number is finite, and depth is bounded."""
    if data.count(b"{") + data.count(b"[") > CONTAINERS_MAX:
        raise Unusable("too_deep")
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_constant, parse_float=_finite
        )
        # Half of a surrogate pair is no text: whoever writes it somewhere would fail.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as exc:
        raise Unusable("not_json") from exc
    if not isinstance(value, dict):
        raise Unusable("not_an_object")
    return value


def _object(segment: str) -> dict[str, Any]:
    if not _BASE64URL.fullmatch(segment):
        raise Unusable("not_base64url")
    try:
        return strict_object(base64.urlsafe_b64decode(segment + "=" * (-len(segment) % 4)))
    except binascii.Error as exc:
        raise Unusable("not_base64url") from exc


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a name occurs twice")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("too large")
    return value


def _no_constant(_text: str) -> None:
    raise ValueError("not a number")


def _moment(claims: Mapping[str, Any], name: str) -> int | None:
    value = claims.get(name)
    if value is None and name not in claims:
        return None
    # JSON's true is an int to Python. RFC 7519 2 allows fractions, and some libraries write them.
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < _SECONDS_END:
        raise Unusable("time_malformed")
    return int(value)


def _at(claims: Mapping[str, Any], path: Path) -> Any:
    value: Any = claims
    for step in path:
        value = value.get(step) if isinstance(value, Mapping) else None
    return value


def _words(value: object) -> tuple[str, ...] | None:
    if value is None:
        return None
    words = value.split() if isinstance(value, str) else value
    if not isinstance(words, list) or len(words) > LIST_COUNT_MAX or not all(isinstance(word, str) for word in words):
        raise Unusable("list_malformed")
    return tuple(words)
