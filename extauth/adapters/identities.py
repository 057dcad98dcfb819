# SPDX-License-Identifier: Apache-2.0
"""
Phase 2, identity: from a credential to whoever it stands for, whatever its kind.

Keys come from the directory; tokens and certificates from the identity document, which is
watched: a new one is built whole and swapped in, a faulty one changes nothing.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Final

import structlog

from chassis import contract, keys
from chassis.errors import Invalid, PeajeError, Unavailable
from chassis.refusals import Refusal
from chassis.secrets import read_secret
from chassis.watching import file_version
from extauth.adapters import document as documents
from extauth.adapters import metrics
from extauth.adapters.directory import Directory
from extauth.adapters.introspection import Introspection, over_http
from extauth.adapters.jwks import KeySource, fetch_document
from extauth.adapters.key_writes import KeyWrites
from extauth.adapters.tokens import TokenVerifier
from extauth.core.claims import ClaimMap, Expected, Subject, Unusable, read_subject
from extauth.core.credential import CONFLICT, INVALID_KEY, Certificate, Credential, Token
from extauth.core.decision import CANNOT_DECIDE, INVALID_TOKEN, prove_key
from extauth.core.identity import Ask, Denial, Identity, Phase, Standing
from extauth.core.patterns import Patterns
from extauth.core.policy import Policy
from extauth.core.strangers import Strangers

log = structlog.get_logger()

#: How often the document is looked at; one stat() each.
LOOK_EVERY_SECONDS: Final = 0.5
#: How often it is read though it does not look changed: not every file system tells, and a secret that it names is
#: a file of its own.
READ_EVERY_SECONDS: Final = 30.0

_TENANT_NOT_ALLOWED: Final = Refusal(
    status=403, code="tenant_not_allowed", message="This credential may not be used for that tenant or project."
)
_UNKNOWN_CERTIFICATE: Final = Refusal(
    status=401, code="unknown_certificate", message="The client certificate is valid but not known here."
)
_KNOWN_SCOPES: Final = frozenset(contract.SCOPES)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Issuer:
    """What is needed of an issuer once its token was verified."""

    name: str
    places: ClaimMap
    #: None: every tenant, because the directory vouches for the account.
    fence: frozenset[str] | None
    is_service_accounts: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Built:
    """An identity document at work."""

    verifier: TokenVerifier
    issuers: Mapping[str, _Issuer] = field(default_factory=dict)
    #: Longest prefix first.
    introspections: tuple[tuple[str, str, Introspection], ...] = ()
    certificates: Mapping[str, documents.CertificateEntry] = field(default_factory=dict)
    policies: tuple[Policy, ...] = ()
    sources: Mapping[str, KeySource] = field(default_factory=dict)


class Identities:
    """Everybody who may call; safe to use from several threads."""

    def __init__(
        self,
        directory: Directory,
        *,
        peppers: Mapping[int, bytes],
        writes: KeyWrites | None,
        home: Path,
        control_url: str,
        control_authority: Path | None = None,
        strangers: Strangers | None = None,
    ) -> None:
        """Raise `Invalid` for a faulty document: policies that are not understood must not be left out."""
        self._directory = directory
        self._peppers = peppers
        self._newest_pepper = max(peppers)
        self._writes = writes
        self._home = home
        self._control_url = control_url
        self._control_authority = control_authority
        self._strangers = Strangers() if strangers is None else strangers
        self._strangers_lock = threading.Lock()
        self._path = home / contract.IDENTITY_PATH
        self._seen = file_version(self._path)
        self._digests = self._digest()
        loaded = documents.load(self._path) if self._seen is not None else documents.KEYS_ONLY
        self._built = self._build(loaded, {})
        self._digests += self._digest_secrets(loaded)

    @property
    def policies(self) -> tuple[Policy, ...]:
        """The operator's policies, in order."""
        return self._built.policies

    def watch(self) -> None:
        """Take over the document whenever it changes, from a thread of its own."""

        def run() -> None:
            pause = threading.Event()
            looks = 0
            while not pause.wait(LOOK_EVERY_SECONDS):
                looks += 1
                self.reload_if_changed(anyway=looks % round(READ_EVERY_SECONDS / LOOK_EVERY_SECONDS) == 0)

        threading.Thread(target=run, name="identity", daemon=True).start()

    def reload_if_changed(self, *, anyway: bool = False) -> None:
        """
        Build, validate, swap; a faulty or missing document keeps the last good one.

        With *anyway* it is read whatever its file looks like.
        """
        seen = file_version(self._path)
        is_same = seen == self._seen
        # Where there never was one, there is nothing to read.
        if is_same and not (anyway and seen is not None):
            return
        self._seen = seen
        try:
            # Before it is loaded: what is written in between is then read again.
            read = self._digest()
            loaded = documents.load(self._path)
            read += self._digest_secrets(loaded)
            if is_same and read == self._digests:
                return
            new = self._build(loaded, self._built.sources)
        except PeajeError as exc:
            metrics.IDENTITY_RELOADS.labels("refused").inc()
            log.error("identity_refused", reason=exc.message)
            return
        self._digests = read
        old, self._built = self._built, new
        _close(old, keep=new.sources)
        metrics.IDENTITY_RELOADS.labels("taken").inc()
        log.info("identity_reloaded", issuers=len(new.issuers), policies=len(new.policies))

    def _digest(self) -> bytes:
        try:
            return hashlib.sha256(self._path.read_bytes()).digest()
        except OSError:
            return b""  # `load` says why

    def _digest_secrets(self, document: documents.IdentityDocument) -> bytes:
        files = (one.client_secret_file for one in document.issuers if isinstance(one, documents.IntrospectionIssuer))
        return b"".join(hashlib.sha256(read_secret(self._home / file).encode()).digest() for file in files)

    def close(self) -> None:
        """Ask issuers nothing any more."""
        _close(self._built, keep={})

    def identify(self, credential: Credential, ask: Ask, *, names: Sequence[str] = ()) -> Identity | Denial:
        """Whose *credential* it is; *names* are those in the peer's certificate, if Envoy verified one."""
        try:
            match credential:
                case keys.ParsedKey():
                    identity = self._key(credential, ask)
                case Token():
                    identity = self._token(credential, ask)
                case Certificate():
                    identity = self._certificate(credential.names)
        except Unusable as exc:
            return _denied(str(exc), INVALID_TOKEN)
        except Unavailable:
            return _denied("unavailable", CANNOT_DECIDE)
        if isinstance(identity, Identity) and any(one.tenant != identity.tenant_id for one in self._holders(names)):
            return _denied("certificate_of_another_tenant", CONFLICT)
        return identity

    def admitted(self, credential: Credential, identity: Identity, now: datetime) -> None:
        """Take note of a use."""
        if self._writes is not None and isinstance(credential, keys.ParsedKey):
            self._writes.used(identity.key_id, now, is_rotated=identity.is_rotated)

    def _key(self, parsed: keys.ParsedKey, ask: Ask) -> Identity | Denial:
        is_stranger = not self._directory.remembers(parsed.key_id)
        if is_stranger and (denial := self._refused(ask)):
            return denial
        state = self._directory.find(parsed.key_id)
        if is_stranger and state is None:
            self._turn_away(ask)
        identity = prove_key(parsed, state, self._peppers)
        if isinstance(identity, Denial) or state is None or self._writes is None:
            return identity
        if state.pepper_version < self._newest_pepper:
            new = keys.hash_key(self._peppers[self._newest_pepper], parsed.key)
            self._writes.rehash(parsed.key_id, old=state.key_hash, new=new)
        return identity

    def _token(self, token: Token, ask: Ask) -> Identity | Denial:
        built = self._built
        if token.is_jwt:
            if not built.issuers:
                return _denied("no_issuers", INVALID_TOKEN)
            name, claims = built.verifier.verify(token.text, ask.now)
        else:
            found = next((one for one in built.introspections if token.text.startswith(one[0])), None)
            if found is None:
                return _denied("malformed", INVALID_KEY)
            asked = self._introspect(found[2], token.text, ask)
            if isinstance(asked, Denial):
                return asked
            name, claims = found[1], asked
        issuer = built.issuers[name]
        subject = read_subject(claims, issuer.places, _KNOWN_SCOPES)
        if issuer.fence is not None and subject.tenant_id not in issuer.fence:
            return _denied("tenant_outside_fence", _TENANT_NOT_ALLOWED)
        if issuer.is_service_accounts:
            return self._account(subject, claims)
        standing = self._directory.find_project(subject.tenant_id, subject.project_id)
        if standing is None:
            return _denied("project_unknown", _TENANT_NOT_ALLOWED)
        digest = hashlib.sha256(subject.subject.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        return _of_token(subject, claims, key_id=f"{issuer.name}:{digest}", standing=standing)

    def _introspect(self, introspection: Introspection, token: str, ask: Ask) -> Mapping[str, Any] | Denial:
        is_stranger = not introspection.remembers(token, ask.now)
        if is_stranger and (denial := self._refused(ask)):
            return denial
        try:
            return introspection.claims(token, ask.now)
        except Unusable:
            if is_stranger:
                self._turn_away(ask)
            raise

    def _refused(self, ask: Ask) -> Denial | None:
        """A no to what would have to be looked up, if too much of it from the same address turned out to be unknown."""
        with self._strangers_lock:
            refusal = self._strangers.refusal(ask.address, ask.now)
        return None if refusal is None else _denied("too_many_unknown", refusal)

    def _turn_away(self, ask: Ask) -> None:
        with self._strangers_lock:
            self._strangers.turned_away(ask.address, ask.now)

    def _account(self, subject: Subject, claims: Mapping[str, Any]) -> Identity | Denial:
        account = self._directory.find_account(subject.subject)
        if account is None:
            return _denied("service_account_unknown", INVALID_TOKEN)
        if (account.tenant_id, account.project_id) != (subject.tenant_id, subject.project_id):
            return _denied("service_account_of_another_project", _TENANT_NOT_ALLOWED)
        identity = _of_token(subject, claims, key_id=subject.subject, standing=account.standing)
        return replace(
            identity,
            account_active=account.is_active,
            scopes=_both(identity.scopes, account.scopes),
            models=account.models,
            denied_models=account.denied_models,
        )

    def _holders(self, names: Sequence[str]) -> list[documents.CertificateEntry]:
        """Whom the document knows by one of *names*, each once."""
        if not names:
            return []
        known = self._built.certificates
        return list({entry.name: entry for name in names if (entry := known.get(name)) is not None}.values())

    def _certificate(self, names: Sequence[str]) -> Identity | Denial:
        holders = self._holders(names)
        if not holders:
            return _denied("certificate_unknown", _UNKNOWN_CERTIFICATE)
        if len(holders) > 1:
            # Taking the first would let whoever orders the names choose who pays.
            return _denied("certificate_of_several", CONFLICT)
        [entry] = holders
        standing = self._directory.find_project(entry.tenant, entry.project)
        if standing is None:
            return _denied("project_unknown", _TENANT_NOT_ALLOWED)
        return Identity(
            tenant_id=entry.tenant,
            project_id=entry.project,
            key_id=f"cert:{entry.name}",
            standing=standing,
            scopes=None if entry.scopes is None else frozenset(entry.scopes),
            models=None if entry.models is None else Patterns.of(entry.models),
        )

    def _build(self, document: documents.IdentityDocument, running: Mapping[str, KeySource]) -> _Built:
        issuers: dict[str, _Issuer] = {}
        trusted: dict[str, tuple[str, Expected, KeySource]] = {}
        introspections: list[tuple[str, str, Introspection]] = []
        sources: dict[str, KeySource] = {}
        for entry in document.issuers:
            if isinstance(entry, documents.IntrospectionIssuer):
                introspections.append((entry.token_prefix, entry.name, self._introspection(entry)))
                issuers[entry.name] = _Issuer(name=entry.name, places=entry.places, fence=entry.fence)
                continue
            is_ours = isinstance(entry, documents.ServiceAccounts)
            issuer = self._spelled_out(entry)
            expected = issuer.expected
            if expected.issuer in trusted:
                raise Invalid(f"iss {expected.issuer!r} is given twice.")
            source = running.get(issuer.name)
            if source is None or source.identity != (issuer.jwks_url, expected.algorithms):
                fetch = partial(fetch_document, authority=self._control_authority if is_ours else None)
                source = KeySource(name=issuer.name, url=issuer.jwks_url, algorithms=expected.algorithms, fetch=fetch)
            sources[issuer.name] = source
            trusted[expected.issuer] = (issuer.name, expected, source)
            issuers[issuer.name] = _Issuer(
                name=issuer.name,
                places=issuer.places,
                fence=None if is_ours else issuer.fence,
                is_service_accounts=is_ours,
            )
        # Only now: a document that is refused half-way must not leave threads behind.
        for name, source in sources.items():
            if running.get(name) is not source:
                source.start()
        return _Built(
            verifier=TokenVerifier(trusted),
            issuers=issuers,
            introspections=tuple(sorted(introspections, key=lambda one: -len(one[0]))),
            certificates={entry.san: entry for entry in document.certificates},
            policies=document.policies,
            sources=sources,
        )

    def _spelled_out(self, entry: documents.JwtIssuer | documents.ServiceAccounts) -> documents.JwtIssuer:
        if isinstance(entry, documents.JwtIssuer):
            return entry
        return documents.service_accounts_issuer(entry, control_url=self._control_url)

    def _introspection(self, entry: documents.IntrospectionIssuer) -> Introspection:
        secret = read_secret(self._home / entry.client_secret_file)
        return Introspection(
            over_http(entry.url, client_id=entry.client_id, client_secret=secret),
            issuer=entry.issuer,
            audiences=None if entry.audiences is None else frozenset(entry.audiences),
        )


def _of_token(subject: Subject, claims: Mapping[str, Any], *, key_id: str, standing: Standing) -> Identity:
    return Identity(
        tenant_id=subject.tenant_id,
        project_id=subject.project_id,
        key_id=key_id,
        standing=standing,
        scopes=subject.scopes,
        models=None if subject.models is None else Patterns.of(subject.models),
        claims=claims,
    )


def _both(one: frozenset[str] | None, other: frozenset[str] | None) -> frozenset[str] | None:
    if one is None or other is None:
        return other if one is None else one
    return one & other


def _close(built: _Built, *, keep: Mapping[str, KeySource]) -> None:
    for name, source in built.sources.items():
        if keep.get(name) is not source:
            source.close()
    for _, _, introspection in built.introspections:
        introspection.close()


def _denied(rule: str, refusal: Refusal) -> Denial:
    return Denial(phase=Phase.IDENTITY, rule=rule, refusal=refusal)
