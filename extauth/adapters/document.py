# SPDX-License-Identifier: Apache-2.0
"""
The identity document: who else than a key may call, and the operator's policies.

    issuers:
    - {name: control, kind: service_accounts}
    - name: acme
      kind: jwt
      issuer: https://login.acme.example/
      jwks_url: https://login.acme.example/keys
      audiences: [peaje]
      algorithms: [RS256]
      type: at+jwt
      tenants: [acme]
      claims: {tenant: org}
    certificates:
    - {name: batch, san: "spiffe://acme.example/batch", tenant: acme}
    policies:
    - {name: office-hours, deny: "labels.tier == 'dev' && time.getHours() < 6"}

Checked whole: one fault refuses all of it.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from chassis.contract import SERVICE_ACCOUNT_AUDIENCE
from chassis.errors import Invalid, PeajeError
from chassis.files import read_text_bounded
from chassis.secrets import read_secret
from extauth.core.claims import ClaimMap, Expected
from extauth.core.policy import MESSAGE_DEFAULT, MESSAGE_LENGTH_MAX, Policy, compile_policy

BYTES_MAX: Final = 1 << 20
ISSUERS_MAX: Final = 50
CERTIFICATES_MAX: Final = 10_000
POLICIES_MAX: Final = 100
#: A document with more faults is not one.
_FAULTS_TOLD_MAX: Final = 50
_KINDS: Final = frozenset({"jwt", "service_accounts", "introspection"})

_ASYMMETRIC = Literal["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]
_Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$")]
_Slug = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]
_Text = Annotated[str, Field(min_length=1, max_length=2048)]
_ClaimPath = _Text | Annotated[list[_Text], Field(min_length=1, max_length=8)]
_Scope = Literal["embeddings", "images", "inference", "models", "rerank", "speech"]
#: Would make a certificate's callers look like an issuer's.
_RESERVED: Final = frozenset({"cert"})


def _safe_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        _ = parts.port
    except ValueError as exc:
        raise ValueError("not a URL") from exc
    if not host or parts.username is not None or parts.fragment:
        raise ValueError("not a URL with a host and without credentials")
    if parts.scheme != "https" and not (parts.scheme == "http" and _is_loopback(host)):
        raise ValueError("must be https, or http on this machine")
    return url


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


_Url = Annotated[_Text, AfterValidator(_safe_url)]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Claims(_Entry):
    """Where an issuer's claims say what we need; a list is the way to a nested one."""

    subject: _ClaimPath = "sub"
    tenant: _ClaimPath | None = None
    project: _ClaimPath | None = None
    scopes: _ClaimPath | None = "scope"
    models: _ClaimPath | None = None


class _Issuer(_Entry):
    name: _Name
    #: The fence: a valid token that names another tenant is refused.
    tenants: Annotated[list[_Slug], Field(min_length=1, max_length=10_000)]
    #: Fixed values, for issuers whose tokens do not name them.
    tenant: _Slug | None = None
    project: _Slug = "default"
    scopes: list[_Scope] | None = None
    claims: Claims = Claims()

    @property
    def fence(self) -> frozenset[str] | None:
        """The tenants it may speak for; None is every."""
        return frozenset(self.tenants)

    @property
    def places(self) -> ClaimMap:
        """How its claims are read."""
        return ClaimMap(
            subject=_path(self.claims.subject) or ("sub",),
            tenant=_path(self.claims.tenant),
            fixed_tenant=self.tenant,
            project=_path(self.claims.project),
            fixed_project=self.project,
            scopes=_path(self.claims.scopes),
            default_scopes=None if self.scopes is None else frozenset(self.scopes),
            models=_path(self.claims.models),
        )

    @model_validator(mode="after")
    def _check(self) -> _Issuer:
        if self.name in _RESERVED:
            raise ValueError(f"the name {self.name} is reserved")
        if (self.tenant is None) == (self.claims.tenant is None):
            raise ValueError("name either tenant or claims.tenant")
        return self


class JwtIssuer(_Issuer):
    """An issuer of signed tokens, with its own key set."""

    kind: Literal["jwt"]
    issuer: _Text
    jwks_url: _Url
    #: Hosts that the key set may come from besides the issuer's own.
    jwks_hosts: list[_Text] = []
    audiences: Annotated[list[_Text], Field(min_length=1, max_length=20)]
    algorithms: Annotated[list[_ASYMMETRIC], Field(min_length=1)]
    type: _Text | None = "at+jwt"

    @model_validator(mode="after")
    def _check_urls(self) -> JwtIssuer:
        host = urlsplit(self.jwks_url).hostname
        if host not in {urlsplit(self.issuer).hostname, *self.jwks_hosts}:
            raise ValueError(f"jwks_url is on {host}; list it in jwks_hosts")
        return self

    @property
    def expected(self) -> Expected:
        """What its tokens must say."""
        return Expected(
            issuer=self.issuer,
            audiences=frozenset(self.audiences),
            type=None if self.type is None else self.type.lower().removeprefix("application/"),
            algorithms=tuple(self.algorithms),
        )


class ServiceAccounts(_Entry):
    """The control API as an issuer: tokens of service accounts, which the directory knows."""

    kind: Literal["service_accounts"]
    name: _Name
    #: Where the control API is; this machine's own if left out.
    issuer: _Url | None = None


class IntrospectionIssuer(_Issuer):
    """An issuer of opaque tokens that answers what they are (RFC 7662)."""

    kind: Literal["introspection"]
    url: _Url
    client_id: _Text
    #: Relative to the state directory.
    client_secret_file: _Text
    #: Tokens that start so are this issuer's; empty takes all that no other one claims.
    token_prefix: Annotated[str, Field(max_length=64)] = ""
    issuer: _Text | None = None
    audiences: list[_Text] | None = None


class CertificateEntry(_Entry):
    """A client certificate's name, and whom it stands for."""

    name: _Name
    #: One of the certificate's URI or DNS names, to the letter.
    san: _Text
    tenant: _Slug
    project: _Slug = "default"
    scopes: list[_Scope] | None = None
    models: list[_Text] | None = None


class PolicyEntry(_Entry):
    """One policy, not yet compiled."""

    name: _Name
    deny: str | None = None
    allow: str | None = None
    message: Annotated[str, Field(min_length=1, max_length=MESSAGE_LENGTH_MAX)] = MESSAGE_DEFAULT

    @model_validator(mode="after")
    def _check(self) -> PolicyEntry:
        if (self.deny is None) == (self.allow is None):
            raise ValueError("write either deny or allow")
        return self


_AnyIssuer = Annotated[JwtIssuer | ServiceAccounts | IntrospectionIssuer, Field(discriminator="kind")]


class _Document(_Entry):
    issuers: Annotated[list[_AnyIssuer], Field(max_length=ISSUERS_MAX)] = []
    certificates: Annotated[list[CertificateEntry], Field(max_length=CERTIFICATES_MAX)] = []
    policies: Annotated[list[PolicyEntry], Field(max_length=POLICIES_MAX)] = []


@dataclass(frozen=True, slots=True, kw_only=True)
class IdentityDocument:
    """The document, checked; a changed one makes a new one."""

    issuers: tuple[JwtIssuer | ServiceAccounts | IntrospectionIssuer, ...] = ()
    certificates: tuple[CertificateEntry, ...] = ()
    policies: tuple[Policy, ...] = ()


#: What holds where there is no document: keys, and nothing else.
KEYS_ONLY: Final = IdentityDocument()

#: What `up` writes where there is none.
DEFAULT_TEXT: Final = """\
# Who else than an API key may call: issuers of tokens, client certificates, attribute policies.
# Checked by `./peaje check`, taken over within a second; a faulty edit changes nothing.
issuers:
- {name: control, kind: service_accounts}   # tokens that the control API mints for service accounts
"""


def load(path: Path) -> IdentityDocument:
    """Read and check the document at *path*; raises `Invalid` with one line."""
    text = read_text_bounded(path, bytes_max=BYTES_MAX)
    try:
        return parse(yaml.load(text, _Loader))  # noqa: S506 - a SafeLoader
    except Invalid as exc:
        raise Invalid(f"{path}: {exc.message}", mend=exc.mend) from exc
    except RecursionError as exc:
        raise Invalid(f"{path}: not YAML.") from exc
    except yaml.YAMLError as exc:
        mark = getattr(exc, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark is not None else str(path)
        raise Invalid(f"{where}: not YAML: {getattr(exc, 'problem', None) or 'unreadable'}.") from exc


def parse(value: object) -> IdentityDocument:
    """Check a parsed document; raises `Invalid` that names every fault of it, each with the path of its field."""
    try:
        document = _Document.model_validate({} if value is None else value)
    except ValidationError as exc:
        faults = [_told(error) for error in exc.errors(include_input=False, include_url=False)]
        raise Invalid(f"{'; '.join(faults[:_FAULTS_TOLD_MAX])}.") from exc
    faults = _doubles(document)
    policies = []
    for index, entry in enumerate(document.policies):
        try:
            policies.append(
                compile_policy(
                    name=entry.name,
                    expression=entry.deny if entry.deny is not None else entry.allow or "",
                    refuses_when=entry.deny is not None,
                    message=entry.message,
                )
            )
        except Invalid as exc:
            faults.append(f"policies[{index}]: {exc.message.rstrip('.')}")
    if faults:
        raise Invalid(f"{'; '.join(faults[:_FAULTS_TOLD_MAX])}.")
    return IdentityDocument(
        issuers=tuple(document.issuers), certificates=tuple(document.certificates), policies=tuple(policies)
    )


def load_whole(path: Path, *, home: Path) -> IdentityDocument:
    """The same as `load`, and the secret files that the document names below *home* are there and fit to hold one."""
    document = load(path)
    faults = []
    for index, entry in enumerate(document.issuers):
        if isinstance(entry, IntrospectionIssuer):
            try:
                read_secret(home / entry.client_secret_file)
            except PeajeError as exc:
                faults.append(f"issuers[{index}].client_secret_file: {exc.message.rstrip('.')}")
    if faults:
        raise Invalid(f"{path}: {'; '.join(faults)}.")
    return document


def service_accounts_issuer(entry: ServiceAccounts, *, control_url: str) -> JwtIssuer:
    """Spell out what *entry* means where the control API is at *control_url*."""
    issuer = entry.issuer or control_url
    return JwtIssuer.model_construct(
        name=entry.name, kind="jwt", issuer=issuer, jwks_url=f"{issuer.rstrip('/')}/.well-known/jwks.json",
        jwks_hosts=[], audiences=[SERVICE_ACCOUNT_AUDIENCE], algorithms=["ES256"], type="at+jwt", tenants=[],
        tenant=None, project="default", scopes=None, claims=Claims(tenant="tenant", project="project"),
    )  # fmt: skip


def _path(value: str | list[str] | None) -> tuple[str, ...] | None:
    if value is None:
        return None
    return (value,) if isinstance(value, str) else tuple(value)


def _doubles(document: _Document) -> list[str]:
    """What may be there once only: names, and whatever decides who is asked about a credential."""
    marks = [
        (f"issuers[{index}].{field}", ("issuers", field, value))
        for index, issuer in enumerate(document.issuers)
        for field, value in _marks(issuer)
    ]
    marks += [
        (f"certificates[{index}].{field}", ("certificates", field, getattr(entry, field)))
        for index, entry in enumerate(document.certificates)
        for field in ("name", "san")
    ]
    marks += [(f"policies[{index}].name", ("policies", "name", one.name)) for index, one in enumerate(document.policies)]
    first: dict[object, str] = {}
    return [
        f"{place}: the same as {first[mark]}" for place, mark in marks if first.setdefault(mark, place) != place
    ]


def _marks(issuer: JwtIssuer | ServiceAccounts | IntrospectionIssuer) -> list[tuple[str, str]]:
    match issuer:
        case JwtIssuer():
            return [("name", issuer.name), ("issuer", issuer.issuer)]
        case ServiceAccounts():
            return [("name", issuer.name), ("kind", issuer.kind)]
        case IntrospectionIssuer():
            return [("name", issuer.name), ("token_prefix", issuer.token_prefix)]


def _told(error: Any) -> str:
    path = ""
    for step in error["loc"]:
        if isinstance(step, int):
            path += f"[{step}]"
        elif step not in _KINDS:  # pydantic's name for the kind of an entry, which is no field
            path += f".{step}" if path else str(step)
    what = str(error["msg"]).removeprefix("Value error, ")
    return f"{path or 'the document'}: {what[:1].lower()}{what[1:]}"


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a name given twice: parsers differ in which one counts."""


def _construct(loader: _Loader, node: yaml.MappingNode) -> dict[Hashable, Any]:
    names = [loader.construct_object(key, deep=True) for key, _ in node.value]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise yaml.constructor.ConstructorError(None, None, f"{name} is given twice", node.start_mark)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct)
