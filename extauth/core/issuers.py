# SPDX-License-Identifier: Apache-2.0
"""
The identity document: whose word is taken for who is calling, and for which tenants.

    issuers:
    - kind: jwt                             # tokens that we verify ourselves
      issuer: https://id.example.com        # exactly as in `iss`
      jwks_url: https://id.example.com/keys # or `jwks: {keys: [...]}`
      audiences: [peaje]                    # `aud` must hold one of them
      algorithms: [ES256]                   # asymmetric ones only
      types: [at+jwt]                       # `typ`; an ID token has JWT
      claims: {tenant: org, scopes: scope}  # a name, a path [realm, roles] or {value: acme}
      tenants: [acme]                       # the fence; `every` takes its word for any tenant
    - kind: introspection                   # opaque tokens, asked about one at a time (RFC 7662)
      name: corp
      url: https://id.example.com/introspect
      client_id: peaje
      client_secret_file: secrets/corp
      tenants: [globex]
    certificates:                           # client certificates that Envoy has validated
    - uri: spiffe://example.com/ns/prod/sa/*
      tenant: acme

Values only; `parse` reports every fault of a document at once, each with the path of its field.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from chassis.errors import Invalid

#: Asymmetric only: with a symmetric one whoever can check tokens can make them.
ALGORITHMS: Final = (
    "ES256", "ES384", "ES512", "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "EdDSA",
)  # fmt: skip
#: RFC 9068 2.1.
ACCESS_TOKEN_TYPE: Final = "at+jwt"
DEFAULT_PROJECT: Final = "default"
EVERY_TENANT: Final = "every"
ISSUERS_MAX: Final = 50
CERTIFICATES_MAX: Final = 10_000
_TENANTS_MAX: Final = 100_000
#: Faults that are told; a document with more is not one.
_FAULTS_TOLD_MAX: Final = 50

_SLUG: Final = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"
_Slug = Annotated[str, StringConstraints(pattern=_SLUG)]
_Text = Annotated[str, StringConstraints(min_length=1, max_length=500, pattern=r"^[\x21-\x7e]+$")]
_Name = Annotated[str, StringConstraints(min_length=1, max_length=100, pattern=r"^[A-Za-z0-9._-]+$")]
_Word = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[\x21-\x7e]+$")]


class _Value(BaseModel):
    """A part of the document: immutable, nothing converted, nothing unknown let through."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)


class Mapped(_Value):
    """Where one fact is found in the claims: by a path of names, or as a value that the document gives."""

    path: tuple[_Text, ...] = ()
    value: str | None = None
    default: str | None = None


def _read_mapped(value: object) -> object:
    if isinstance(value, str):
        return {"path": (value,)}
    if isinstance(value, list) and 1 <= len(value) <= 8:
        return {"path": tuple(value)}
    if isinstance(value, dict) and set(value) == {"value"}:
        return value
    if isinstance(value, Mapped):
        return value
    raise ValueError("write the name of a claim, a list of names that leads to it, or {value: ...}")


def _with_project_default(value: object) -> object:
    read = _read_mapped(value)
    return {**read, "default": DEFAULT_PROJECT} if isinstance(read, dict) and "path" in read else read


_Mapped = Annotated[Mapped, BeforeValidator(_read_mapped)]
_MappedProject = Annotated[Mapped, BeforeValidator(_with_project_default)]


class ClaimMapping(_Value):
    """Which claim says what."""

    tenant: _Mapped = Mapped(path=("tenant",))
    #: A token without the claim is for the project that every tenant has.
    project: _MappedProject = Mapped(path=("project",), default=DEFAULT_PROJECT)
    subject: _Mapped = Mapped(path=("sub",))
    scopes: _Mapped = Mapped(path=("scope",))
    models: _Mapped = Mapped(path=("models",))


def _read_fence(value: object) -> object:
    if value == EVERY_TENANT:
        return value
    if isinstance(value, list):
        return frozenset(value) if all(isinstance(one, str) for one in value) else value
    raise ValueError(f"list the tenants that its tokens may name, or write {EVERY_TENANT}")


_Fence = Annotated[
    Literal["every"] | Annotated[frozenset[_Slug], Field(min_length=1, max_length=_TENANTS_MAX)],
    BeforeValidator(_read_fence),
]


class Source(_Value):
    """What issuers of both kinds have in common: how claims are read, and the fence."""

    claims: ClaimMapping = ClaimMapping()
    tenants: _Fence
    #: What a token without scopes may do. `every` only for who leaves them out when they are all meant.
    without_scope: Literal["none", "every"] = "none"
    #: `service_accounts`: subjects are ids of our own, whose state counts too.
    subjects: Literal["foreign", "service_accounts"] = "foreign"

    @property
    def name(self) -> str:
        """Tells subjects of one source from those of another."""
        raise NotImplementedError

    def may_name(self, tenant_id: str) -> bool:
        """Whether the fence has a place for *tenant_id*."""
        return self.tenants == EVERY_TENANT or tenant_id in self.tenants


def is_loopback(host: str) -> bool:
    """
    Whether *host* can only be this machine.

    >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("127.0.0.1.example.com")
    (True, True, False)
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise ValueError("not a URL") from None
    if parts.scheme not in ("http", "https") or not host:
        raise ValueError("not a URL")
    if parts.username is not None or parts.password is not None or parts.fragment:
        raise ValueError("a URL here has no user and no fragment")
    if parts.scheme == "http" and not is_loopback(host):
        raise ValueError("must be https (http only to this machine)")
    return url


_Url = Annotated[_Text, AfterValidator(_check_url)]


def _as_set(value: object) -> object:
    return frozenset(value) if isinstance(value, list) and all(isinstance(one, str) for one in value) else value


def _as_types(value: object) -> object:
    values = [value] if isinstance(value, str) else value
    if isinstance(values, list) and all(isinstance(one, str) for one in values):
        return frozenset(one.lower().removeprefix("application/") for one in values)
    return values


class Issuer(Source):
    """An issuer of signed tokens."""

    kind: Literal["jwt"]
    issuer: _Text
    jwks_url: _Url | None = None
    jwks: dict[str, Any] | None = None
    audiences: Annotated[frozenset[_Text], BeforeValidator(_as_set), Field(min_length=1, max_length=20)]
    algorithms: Annotated[
        frozenset[Literal[ALGORITHMS]], BeforeValidator(_as_set), Field(min_length=1)  # type: ignore[valid-type]
    ]
    types: Annotated[frozenset[_Text], BeforeValidator(_as_types), Field(min_length=1)] = frozenset({ACCESS_TOKEN_TYPE})

    @property
    def name(self) -> str:
        """Its `iss`."""
        return self.issuer

    @model_validator(mode="after")
    def _has_one_set_of_keys(self) -> Issuer:
        if (self.jwks_url is None) == (self.jwks is None):
            raise ValueError("give jwks_url or jwks, one of them")
        return self


class Introspector(Source):
    """A server that is asked whether an opaque token is active."""

    kind: Literal["introspection"]
    name_: _Name = Field(alias="name")
    url: _Url
    client_id: _Text
    #: Relative to the state directory.
    client_secret_file: _Text
    #: Signed tokens that name this issuer are asked about as well, instead of being verified here.
    issuer: _Text | None = None
    #: Where given, the answer's `aud` must hold one of them.
    audiences: Annotated[frozenset[_Text], BeforeValidator(_as_set), Field(max_length=20)] = frozenset()
    #: Asked only about opaque tokens that begin so. Empty: about any.
    prefix: Annotated[str, StringConstraints(max_length=100, pattern=r"^[\x21-\x7e]*$")] = ""

    @property
    def name(self) -> str:
        """As the document names it."""
        return self.name_


_PATTERN: Final = re.compile(r"[a-z][a-z0-9+.-]*://[A-Za-z0-9._~%!$&'()+,;=:@*-]+(/[A-Za-z0-9._~%!$&'()+,;=:@*-]+)*")


def _check_pattern(pattern: str) -> str:
    if not _PATTERN.fullmatch(pattern):
        raise ValueError("write a URI such as spiffe://example.com/ns/prod/sa/chat; * stands for anything but /")
    if "*" in pattern.split("/")[2]:
        raise ValueError("the trust domain (what follows ://) is written out, without *")
    return pattern


class Certificate(_Value):
    """Whom the holder of a validated client certificate stands for, by the first URI in its subject alternative name."""

    uri: Annotated[_Text, AfterValidator(_check_pattern)]
    tenant: _Slug
    project: _Slug = DEFAULT_PROJECT
    #: Left out: every scope, every model.
    scopes: tuple[_Word, ...] | None = None
    models: tuple[_Word, ...] | None = None

    def matches(self, uri: str) -> bool:
        """Whether *uri* is one of those meant; `*` is any text within one segment, never none."""
        return re.fullmatch(re.escape(self.uri).replace(r"\*", "[^/]+"), uri) is not None


class IdentityDocument(_Value):
    """The whole document; without one, API keys are the only credential."""

    issuers: Annotated[
        tuple[Annotated[Issuer | Introspector, Field(discriminator="kind")], ...], Field(max_length=ISSUERS_MAX)
    ] = ()
    certificates: Annotated[tuple[Certificate, ...], Field(max_length=CERTIFICATES_MAX)] = ()

    def verifiers(self) -> dict[str, Issuer]:
        """Issuers of signed tokens, by `iss`."""
        return {one.issuer: one for one in self.issuers if isinstance(one, Issuer)}

    def introspectors(self) -> list[Introspector]:
        """Those who are asked, the longest prefix first."""
        found = [one for one in self.issuers if isinstance(one, Introspector)]
        return sorted(found, key=lambda one: -len(one.prefix))


def parse(document: object, *, source: str) -> IdentityDocument:
    """Check a document; raises `IdentityFaults` that names every fault. An empty document is one without entries."""
    try:
        # Lists of YAML become tuples: values of the document do not change.
        parsed = IdentityDocument.model_validate(_frozen_lists({} if document is None else document))
    except ValidationError as exc:
        raise IdentityFaults(source, [_told(error) for error in exc.errors(include_input=False, include_url=False)]) from None
    faults = list(_contradictions(parsed))
    if faults:
        raise IdentityFaults(source, faults)
    return parsed


class IdentityFaults(Invalid):
    """Refuse an identity document; `faults` has one line each."""

    def __init__(self, source: str, faults: list[str]) -> None:
        told = faults[:_FAULTS_TOLD_MAX]
        super().__init__(f"{source}: " + "; ".join(told) + ".")
        self.faults = told


def _contradictions(document: IdentityDocument) -> list[str]:
    faults = []
    seen: dict[tuple[str, str], int] = {}
    for index, one in enumerate(document.issuers):
        names = [("issuer", one.issuer)] if one.issuer else []
        if isinstance(one, Introspector):
            names += [("name", one.name), ("prefix", one.prefix)]
        for field, value in names:
            first = seen.setdefault((field, value), index)
            if first != index:
                faults.append(f"issuers[{index}].{field}: the same as issuers[{first}].{field}")
    uris: dict[str, int] = {}
    for index, rule in enumerate(document.certificates):
        first = uris.setdefault(rule.uri, index)
        if first != index:
            faults.append(f"certificates[{index}].uri: the same as certificates[{first}].uri")
    return faults


def _frozen_lists(value: object) -> object:
    if not isinstance(value, Mapping):
        return value
    return {
        name: tuple(_frozen_entry(one) for one in entry) if name in ("issuers", "certificates") and isinstance(entry, list) else entry
        for name, entry in value.items()
    }


def _frozen_entry(entry: object) -> object:
    if not isinstance(entry, Mapping):
        return entry
    return {
        name: tuple(value) if name in ("scopes", "models") and isinstance(value, list) else value
        for name, value in entry.items()
    }


def _told(error: Mapping[str, Any]) -> str:
    path = ""
    for step in error["loc"]:
        if isinstance(step, int):
            path += f"[{step}]"
        elif step not in ("jwt", "introspection"):  # pydantic's name for the kind of an entry
            path += f".{step}" if path else str(step)
    what = str(error["msg"]).removeprefix("Value error, ")
    return f"{path or 'the document'}: {what[:1].lower()}{what[1:]}"
