# SPDX-License-Identifier: Apache-2.0
"""
Phase 1, credential: the one well-formed credential of a request, or why there is none.

Looks at shape only: nothing found here is proven, and nothing costs I/O or a signature.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from chassis import keys
from chassis.contract import API_KEY_HEADER, AUTHORIZATION_HEADER
from chassis.refusals import Refusal
from extauth.core.identity import Denial, Phase

#: Longest key that is looked at; a key has 61 characters. Longer ones are refused unread.
KEY_BYTES_MAX: Final = keys.CREDENTIAL_LENGTH_MAX
#: Longest token that is parsed. Larger ones are refused before any of it is decoded.
TOKEN_BYTES_MAX: Final = 8192
#: Longest certificate name; a SPIFFE id has at most 2048 bytes.
NAME_LENGTH_MAX: Final = 2048
#: Names of one certificate that are looked at; one with more is refused whole.
NAMES_MAX: Final = 100

_KEY_PREFIX: Final = b"peaje_"
_JWT: Final = re.compile(rb"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")
#: RFC 6750's b64token.
_OPAQUE: Final = re.compile(rb"[A-Za-z0-9._~+/-]+=*")

INVALID_KEY: Final = Refusal(status=401, code="invalid_api_key", message="The API key is not valid.")
MISSING: Final = Refusal(
    status=401,
    code="missing_credential",
    message='No API key was sent. Send it as "authorization: Bearer KEY" or "x-api-key: KEY".',
)
CONFLICT: Final = Refusal(
    status=400,
    code="conflicting_credentials",
    message="The request holds different credentials; send one.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """A token from an issuer, unproven; its `repr` hides it."""

    text: str = field(repr=False)
    #: It has the three parts of a JWT; otherwise only its issuer can read it.
    is_jwt: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """The names in a client certificate that Envoy has verified."""

    names: tuple[str, ...]


Credential = keys.ParsedKey | Token | Certificate


def find_credential(headers: Iterable[tuple[str, bytes]], *, names: Sequence[str] = ()) -> Credential | Denial:
    """
    Find the credential among *headers*; *names* are those of the peer's verified certificate, if it has one.

    No precedence between headers and none between repeated ones: two that differ are refused,
    because "the last one wins" is how a proxy and its policy come to disagree. A certificate is
    the credential only where no header holds one.
    """
    bearer: list[bytes] = []
    plain: list[bytes] = []
    for name, value in headers:
        if name == AUTHORIZATION_HEADER:
            bearer.append(value)
        elif name == API_KEY_HEADER:
            plain.append(value)
    if len(bearer) > 1 or len(plain) > 1:
        return _denied("repeated_header", INVALID_KEY)
    found: list[bytes] = []
    if bearer:
        scheme, _, token = bearer[0].partition(b" ")
        if scheme.lower() != b"bearer":
            return _denied("unknown_scheme", INVALID_KEY)
        found.append(token.lstrip(b" "))
    found += plain
    if not found:
        if names:
            return _certificate(names)
        return _denied("missing", MISSING)
    if found[0] != found[-1]:
        return _denied("conflicting_headers", CONFLICT)
    return _read(found[0], may_be_token=bool(bearer))


def _read(credential: bytes, *, may_be_token: bool) -> Credential | Denial:
    if len(credential) > TOKEN_BYTES_MAX:
        return _denied("too_long", INVALID_KEY)
    if may_be_token and not credential.startswith(_KEY_PREFIX):
        if _JWT.fullmatch(credential):
            return Token(text=credential.decode("ascii"), is_jwt=True)
        if _OPAQUE.fullmatch(credential):
            return Token(text=credential.decode("ascii"), is_jwt=False)
    if len(credential) > KEY_BYTES_MAX:
        return _denied("too_long", INVALID_KEY)
    try:
        parsed = keys.parse(credential.decode("ascii"))
    except UnicodeDecodeError:
        parsed = None
    return parsed or _denied("malformed", INVALID_KEY)


def _certificate(names: Sequence[str]) -> Certificate | Denial:
    if len(names) > NAMES_MAX or max(map(len, names)) > NAME_LENGTH_MAX:
        return _denied("too_long", INVALID_KEY)
    return Certificate(names=tuple(names))


def _denied(rule: str, refusal: Refusal) -> Denial:
    return Denial(phase=Phase.CREDENTIAL, rule=rule, refusal=refusal)
