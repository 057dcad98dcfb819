# SPDX-License-Identifier: Apache-2.0
"""
Judge a signed token (RFC 7519, 8725, 9068) without its signature: the header, the claims, whom they name.

Knows texts and values. Must not know cryptography, the network or the time. `read` trusts nothing;
what it returns is proven only after the signature was checked with the key that `kid` names in the
issuer's own set, and only then does `check` look at the claims.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal, TypeGuard

from chassis.refusals import Refusal
from extauth.core import strict_json
from extauth.core.issuers import Certificate, Introspector, Issuer, Mapped, Source

#: Longer ones are refused before anything of them is read. Envoy takes headers of 60 KiB together.
TOKEN_BYTES_MAX: Final = 8192
#: A key id is looked up and nothing else; it is remembered when unknown, so it is bounded.
KID_LENGTH_MAX: Final = 256
#: How far an issuer's clock and ours may be apart.
LEEWAY: Final = timedelta(seconds=30)
#: Seconds since 1970 beyond this (the year 9999) are no time.
_SECONDS_MAX: Final = 253_402_300_799
SCOPES_MAX: Final = 100
MODELS_MAX: Final = 200
#: Audiences in one token.
_AUDIENCES_MAX: Final = 50
_WORD_LENGTH_MAX: Final = 200
#: SPIFFE allows 2,048.
_URI_LENGTH_MAX: Final = 2048
#: Nothing of a header with one of these is believed: they name keys from elsewhere (`jku`, `x5u`, `jwk`,
#: `x5c`), change what is signed (`b64`), or must be understood and are not (`crit`, `zip`).
_FORBIDDEN_HEADERS: Final = frozenset({"jku", "x5u", "jwk", "x5c", "crit", "b64", "zip", "enc", "p2c", "p2s", "epk"})

_SEGMENT: Final = re.compile(r"[A-Za-z0-9_-]+")
_COMPACT: Final = re.compile(r"[A-Za-z0-9_-]*\.[A-Za-z0-9_-]*\.[A-Za-z0-9_.-]*")
#: As in the tables `tenant` and `project`.
_SLUG: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_WORD: Final = re.compile(rf"[\x21-\x7e]{{1,{_WORD_LENGTH_MAX}}}")
#: Hexadecimal digits of a subject's hash: 96 bits, so that two never meet.
_SUBJECT_DIGITS: Final = 24

#: Nobody who is known issues tokens of this form: most likely a mistyped key.
NOBODYS: Final = Refusal(status=401, code="invalid_api_key", message="The API key is not valid.")
INVALID: Final = Refusal(status=401, code="invalid_token", message="The token is not valid.")
EXPIRED: Final = Refusal(status=401, code="token_expired", message="The token has expired.")
UNKNOWN_CERTIFICATE: Final = Refusal(
    status=401, code="invalid_certificate", message="The client certificate stands for nobody here."
)
FOREIGN_TENANT: Final = Refusal(
    status=403, code="tenant_not_allowed", message="This token may not act for that tenant or project."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unproven:
    """A well-formed token; nothing of it is proven. Its `repr` shows nothing of it."""

    text: str = field(repr=False)
    algorithm: str
    type: str | None
    kid: str | None
    #: As the token says it; decides only whose keys are tried.
    issuer: str | None
    claims: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bearer:
    """Whom a proven token, an active introspection or a validated certificate stands for."""

    tenant_id: str
    project_id: str
    #: Stands where a key's id stands: descriptors, journal, rows. Never a name of a person.
    principal_id: str
    #: Set when the subject is one of our service accounts, whose state is ours to know.
    service_account_id: str | None
    #: None for every scope.
    scopes: frozenset[str] | None
    #: Patterns of models; None for every model.
    models: tuple[str, ...] | None
    claims: Mapping[str, Any] = field(repr=False)
    #: First moment at which it is not good any more; None for what does not end by itself.
    expires_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """What our own record says of a tenant, a project and, where one is named, a service account in it."""

    tenant_active: bool
    project_active: bool
    account_active: bool
    labels: Mapping[str, str] = field(default_factory=dict)
    #: What the service account may do now; None for everything.
    scopes: frozenset[str] | None = None
    models: tuple[str, ...] | None = None
    denied_models: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who calls by a token or a certificate, as its source and our own record say together."""

    bearer: Bearer
    account: Account
    kind: Literal["token", "certificate"]
    #: Whether Envoy may remember the decision.
    is_cacheable: bool

    @property
    def scopes(self) -> frozenset[str] | None:
        """What both allow; None allows everything."""
        ours, theirs = self.account.scopes, self.bearer.scopes
        if ours is None or theirs is None:
            return theirs if ours is None else ours
        return ours & theirs


def is_compact(text: str) -> bool:
    """
    Whether *text* has the form of a signed (or encrypted) token, whatever is in it.

    >>> is_compact("eyJhbGciOiJFUzI1NiJ9.e30.c2ln"), is_compact("opaque-token")
    (True, False)
    """
    return text.startswith("eyJ") and _COMPACT.fullmatch(text) is not None


def read(text: str) -> Unproven | None:
    """Take a token apart; None for what is not one, is too long, or could be read two ways."""
    if len(text) > TOKEN_BYTES_MAX:
        return None
    segments = text.split(".")
    if len(segments) != 3:  # five would be an encrypted one, which nobody was asked to send
        return None
    header_bytes, claims_bytes, signature = (_decode(segment) for segment in segments)
    if header_bytes is None or claims_bytes is None or signature is None:
        return None
    header, claims = strict_json.read_object(header_bytes), strict_json.read_object(claims_bytes)
    if header is None or claims is None or not _FORBIDDEN_HEADERS.isdisjoint(header):
        return None
    algorithm, kind, kid, issuer = header.get("alg"), header.get("typ"), header.get("kid"), claims.get("iss")
    if not isinstance(algorithm, str) or not isinstance(kind, str | None) or not isinstance(issuer, str | None):
        return None
    if kid is not None and (not isinstance(kid, str) or not 1 <= len(kid) <= KID_LENGTH_MAX):
        return None
    return Unproven(text=text, algorithm=algorithm, type=kind, kid=kid, issuer=issuer, claims=claims)


def may_be_verified(token: Unproven, issuer: Issuer) -> bool:
    """Whether the header is one that *issuer* signs with: its algorithm, its type, the id of a key."""
    # RFC 7515 4.1.9: "application/" may be left out, and case does not count.
    kind = (token.type or "").lower().removeprefix("application/")
    return token.kid is not None and token.algorithm in issuer.algorithms and kind in issuer.types


def check(claims: Mapping[str, Any], issuer: Issuer, *, now: datetime) -> Bearer | Refusal:
    """Judge the claims of a token whose signature is good. Good until `exp` and the leeway after it, exclusive."""
    if claims.get("iss") != issuer.issuer or not _is_for_us(claims.get("aud"), issuer.audiences):
        return INVALID
    moments = [_moment(claims, name) for name in ("exp", "nbf", "iat")]
    if any(moment is _NO_TIME for moment in moments):
        return INVALID
    expires_at, not_before, issued_at = moments
    if not isinstance(expires_at, datetime):
        return INVALID
    for begins_at in (not_before, issued_at):
        if isinstance(begins_at, datetime) and begins_at > now + LEEWAY:
            return INVALID
    if now >= expires_at + LEEWAY:
        return EXPIRED
    return name_bearer(claims, issuer, expires_at=expires_at + LEEWAY)


def check_introspection(
    answer: Mapping[str, Any], introspector: Introspector, *, now: datetime
) -> Bearer | Refusal | None:
    """
    Judge what an introspection endpoint answered (RFC 7662 2.2); None if it is no answer.

    Only JSON `true` is active. The text "true" says that its author and we read two specifications.
    """
    is_active = answer.get("active")
    if not isinstance(is_active, bool):
        return None
    if not is_active:
        return INVALID
    expires_at, not_before = _moment(answer, "exp"), _moment(answer, "nbf")
    if expires_at is _NO_TIME or not_before is _NO_TIME:
        return None
    if isinstance(expires_at, datetime) and now >= expires_at:
        return EXPIRED
    if isinstance(not_before, datetime) and not_before > now + LEEWAY:
        return INVALID
    if introspector.audiences and not _is_for_us(answer.get("aud"), introspector.audiences):
        return INVALID
    if introspector.issuer is not None and answer.get("iss", introspector.issuer) != introspector.issuer:
        return INVALID
    return name_bearer(answer, introspector, expires_at=expires_at if isinstance(expires_at, datetime) else None)


def name_bearer(claims: Mapping[str, Any], source: Source, *, expires_at: datetime | None) -> Bearer | Refusal:
    """Read tenant, project, subject, scopes and models as *source* maps them; its fence holds the tenant."""
    if "cnf" in claims:
        return INVALID  # bound to a key that its holder was to show (RFC 8705, 9449): worth nothing by itself
    mapping = source.claims
    tenant_id = _find(claims, mapping.tenant)
    project_id = _find(claims, mapping.project)
    subject = _find(claims, mapping.subject)
    if not _is_slug(tenant_id) or not _is_slug(project_id) or not _is_subject(subject):
        return INVALID
    scopes = _words(_find(claims, mapping.scopes), most=SCOPES_MAX)
    models = _words(_find(claims, mapping.models), most=MODELS_MAX)
    if scopes is _NO_WORDS or models is _NO_WORDS:
        return INVALID
    if scopes is None and source.without_scope == "none":
        scopes = ()
    if not source.may_name(tenant_id):
        return FOREIGN_TENANT
    is_account = source.subjects == "service_accounts"
    return Bearer(
        tenant_id=tenant_id,
        project_id=project_id,
        principal_id=subject if is_account else principal_id(source.name, subject),
        service_account_id=subject if is_account else None,
        scopes=None if scopes is None else frozenset(scopes),
        models=models,
        claims=claims,
        expires_at=expires_at,
    )


def bearer_of(uri: str, rules: Sequence[Certificate]) -> Bearer | Refusal:
    """Whom a validated certificate stands for: the first of *rules* that fits its URI."""
    if len(uri) <= _URI_LENGTH_MAX:
        for rule in rules:
            if rule.matches(uri):
                return Bearer(
                    tenant_id=rule.tenant,
                    project_id=rule.project,
                    principal_id=principal_id("certificate", uri),
                    service_account_id=None,
                    scopes=None if rule.scopes is None else frozenset(rule.scopes),
                    models=rule.models,
                    claims={},
                    expires_at=None,
                )
    return UNKNOWN_CERTIFICATE


def principal_id(source: str, subject: str) -> str:
    """
    A stable id for a subject of a foreign source: safe in a descriptor, and nobody's mail address.

    >>> principal_id("https://id.example.com", "user-7")
    'sub_bac6fb68bff98b4eb0ddc303'
    """
    digest = hashlib.sha256(f"{source}\n{subject}".encode()).hexdigest()
    return f"sub_{digest[:_SUBJECT_DIGITS]}"


class _NoTime:
    """What stands where a time should."""


_NO_TIME: Final = _NoTime()
#: What stands where words should: never equal to a real tuple, which may be empty.
_NO_WORDS: Final = ("",)


def _decode(segment: str) -> bytes | None:
    # Strict: one text only for each value, so that nothing passes under two names.
    if not _SEGMENT.fullmatch(segment):
        return None
    try:
        decoded = base64.urlsafe_b64decode(segment + "=" * (-len(segment) % 4))
    except (binascii.Error, ValueError):
        return None
    return decoded if base64.urlsafe_b64encode(decoded).rstrip(b"=").decode("ascii") == segment else None


def _is_for_us(audience: object, ours: frozenset[str]) -> bool:
    if isinstance(audience, str):
        return audience in ours
    if not isinstance(audience, list) or len(audience) > _AUDIENCES_MAX:
        return False
    return all(isinstance(one, str) for one in audience) and not ours.isdisjoint(audience)


def _moment(claims: Mapping[str, Any], name: str) -> datetime | None | _NoTime:
    value = claims.get(name)
    if value is None:
        return _NO_TIME if name in claims else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _SECONDS_MAX:
        return _NO_TIME
    return datetime.fromtimestamp(value, UTC)


def _find(claims: Mapping[str, Any], mapped: Mapped) -> object:
    if mapped.value is not None:
        return mapped.value
    found: object = claims
    for name in mapped.path:
        found = found.get(name) if isinstance(found, dict) else None
    return mapped.default if found is None else found


def _is_slug(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and _SLUG.fullmatch(value) is not None


def _is_subject(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and 1 <= len(value) <= _WORD_LENGTH_MAX and value.isprintable()


def _words(value: object, *, most: int) -> tuple[str, ...] | None:
    """A list, or a text of words between single spaces (RFC 6749 3.3); None if it is not there."""
    if value is None:
        return None
    words: Sequence[object]
    if isinstance(value, str):
        words = value.split(" ") if value else ()
    elif isinstance(value, list):
        words = value
    else:
        return _NO_WORDS
    if len(words) > most or not all(isinstance(word, str) and _WORD.fullmatch(word) for word in words):
        return _NO_WORDS
    return tuple(str(word) for word in words)
