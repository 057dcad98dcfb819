# SPDX-License-Identifier: Apache-2.0
"""
From a token or a client certificate to an identity: whose word it is, whether it is good, and what we know of it.

The order is from cheap to dear: form, who issued it, what this process has proven already, the key, the
signature, the claims, and last our own record of the tenant. The signature of a token that comes again
is not checked again, for a minute at most and only while its issuer's keys are the same.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final, Literal

from chassis.errors import Unavailable
from chassis.refusals import Refusal
from extauth.adapters import identity_document, jose
from extauth.adapters.accounts import Accounts
from extauth.adapters.fetching import Fetcher
from extauth.adapters.identity_document import Watched
from extauth.adapters.introspection import WAIT_SECONDS, Introspection
from extauth.adapters.jwks import FETCH_SECONDS, FetchedKeys, FixedKeys, Keys
from extauth.core import token
from extauth.core.issuers import Certificate, IdentityDocument, Introspector, Issuer
from extauth.core.token import Bearer, Caller

#: Tokens whose signature need not be checked again; about 2 KiB each.
PROVEN_MAX: Final = 10_000
PROVEN_FOR: Final = timedelta(seconds=60)

CANNOT_DECIDE: Final = Refusal(
    status=503, code="service_unavailable", message="The gateway cannot decide right now. Try again."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Proven:
    bearer: Bearer
    until: datetime
    #: Of the keys that it was proven with.
    generation: int


class Verifiers:
    """What one identity document became; replaced as a whole when the document is."""

    def __init__(
        self,
        document: IdentityDocument,
        *,
        keys: Mapping[str, Keys],
        introspections: list[Introspection],
        proven_max: int = PROVEN_MAX,
    ) -> None:
        self.document = document
        self._issuers = document.verifiers()
        self._keys = keys
        self._introspections = introspections
        self._proven_max = proven_max
        self._lock = threading.Lock()
        self._proven: OrderedDict[bytes, tuple[str, _Proven]] = OrderedDict()

    @property
    def certificates(self) -> tuple[Certificate, ...]:
        """The document's rules, in its order."""
        return self.document.certificates

    def keys_of(self, issuer: Issuer) -> Keys | None:
        """The keys of an issuer that has not changed, so that a new document need not fetch them again."""
        return self._keys[issuer.issuer] if self._issuers.get(issuer.issuer) == issuer else None

    def bearer(self, text: str, now: datetime) -> tuple[Bearer, bool] | Refusal:
        """Whom *text* stands for, and whether Envoy may remember it; raises `Unavailable`."""
        if not token.is_compact(text):
            return self._introspect(text, now, issuer=None)
        digest = hashlib.sha256(text.encode("ascii")).digest()
        known = self._find_proven(digest, now)
        if known is not None:
            return known.bearer, True
        unproven = token.read(text)
        if unproven is None or unproven.issuer is None:
            return token.INVALID
        issuer = self._issuers.get(unproven.issuer)
        if issuer is None:
            return self._introspect(text, now, issuer=unproven.issuer)
        if not token.may_be_verified(unproven, issuer):
            return token.INVALID
        return self._verify(unproven, issuer, digest, now)

    def stop(self, *, kept: Verifiers | None = None) -> None:
        """End what goes on in the background, except for what *kept* goes on with."""
        still_used = set() if kept is None else {id(one) for one in kept._keys.values()}
        for keys in self._keys.values():
            if id(keys) not in still_used:
                keys.stop()
        for introspection in self._introspections:
            introspection.stop()

    def _verify(
        self, unproven: token.Unproven, issuer: Issuer, digest: bytes, now: datetime
    ) -> tuple[Bearer, bool] | Refusal:
        keys = self._keys[issuer.issuer]
        # Before the look-up: what is proven with a key of the last set must not pass for one of the next.
        generation = keys.generation
        key = keys.find(unproven.kid or "", now)
        if key is None or not jose.is_signed_by(unproven, key):
            return token.INVALID
        bearer = token.check(unproven.claims, issuer, now=now)
        if isinstance(bearer, Refusal):
            return bearer
        until = now + PROVEN_FOR
        proven = _Proven(
            bearer=bearer,
            until=until if bearer.expires_at is None else min(until, bearer.expires_at),
            generation=generation,
        )
        with self._lock:
            self._proven[digest] = (issuer.issuer, proven)
            while len(self._proven) > self._proven_max:
                self._proven.popitem(last=False)
        return bearer, True

    def _find_proven(self, digest: bytes, now: datetime) -> _Proven | None:
        with self._lock:
            found = self._proven.get(digest)
            if found is None:
                return None
            issuer, proven = found
            if now < proven.until and self._keys[issuer].generation == proven.generation:
                self._proven.move_to_end(digest)
                return proven
            del self._proven[digest]
            return None

    def _introspect(self, text: str, now: datetime, *, issuer: str | None) -> tuple[Bearer, bool] | Refusal:
        for introspection in self._introspections:
            one = introspection.introspector
            if (one.issuer == issuer) if issuer is not None else text.startswith(one.prefix):
                answer = introspection.find(text, now)
                # Not in Envoy's memory too: the two times would add up.
                return answer if isinstance(answer, Refusal) else (answer, False)
        return token.NOBODYS if issuer is None else token.INVALID


class Tokens:
    """The port that the decision uses; safe to call from several threads."""

    def __init__(self, verifiers: Callable[[], Verifiers | None], accounts: Accounts) -> None:
        self._verifiers = verifiers
        self._accounts = accounts

    def identify(self, text: str, now: datetime) -> Caller | Refusal:
        """Who presents the token *text* (printable ASCII), or why nobody does."""
        verifiers = self._verifiers()
        if verifiers is None:
            return CANNOT_DECIDE
        try:
            found = verifiers.bearer(text, now)
            if isinstance(found, Refusal):
                return found
            bearer, is_cacheable = found
            return self._known(bearer, kind="token", is_cacheable=is_cacheable)
        except Unavailable:
            return CANNOT_DECIDE

    def identify_certificate(self, uri: str) -> Caller | Refusal:
        """Whom a client certificate stands for that Envoy has validated; *uri* as Envoy names its subject."""
        verifiers = self._verifiers()
        if verifiers is None:
            return CANNOT_DECIDE
        bearer = token.bearer_of(uri, verifiers.certificates)
        if isinstance(bearer, Refusal):
            return bearer
        try:
            return self._known(bearer, kind="certificate", is_cacheable=True)
        except Unavailable:
            return CANNOT_DECIDE

    def _known(
        self, bearer: Bearer, *, kind: Literal["token", "certificate"], is_cacheable: bool
    ) -> Caller | Refusal:
        account = self._accounts.find(bearer.tenant_id, bearer.project_id, bearer.service_account_id)
        if account is None:
            return token.FOREIGN_TENANT if bearer.service_account_id is None else token.INVALID
        return Caller(bearer=bearer, account=account, kind=kind, is_cacheable=is_cacheable)


def watch(path: Path, *, home: Path, clock: Callable[[], datetime]) -> Watched[Verifiers]:
    """The verifiers of the document at *path*, with threads that fetch keys; secret files are below *home*."""

    def build(document: IdentityDocument, last: Verifiers | None) -> Verifiers:
        keys = {
            issuer.issuer: (last and last.keys_of(issuer)) or _keys(issuer, clock)
            for issuer in document.verifiers().values()
        }
        made = Verifiers(
            document,
            keys=keys,
            introspections=[_introspection(one, home) for one in document.introspectors()],
        )
        if last is not None:
            last.stop(kept=made)
        return made

    return Watched(path, home=home, build=build)


def _keys(issuer: Issuer, clock: Callable[[], datetime]) -> Keys:
    if issuer.jwks_url is None:
        parsed = jose.parse_set(issuer.jwks or {}, algorithms=issuer.algorithms)
        return FixedKeys({} if isinstance(parsed, str) else parsed.keys)
    keys = FetchedKeys(issuer, Fetcher(issuer.jwks_url, timeout_seconds=FETCH_SECONDS).get, clock=clock)
    keys.start()
    return keys


def _introspection(introspector: Introspector, home: Path) -> Introspection:
    fetcher = Fetcher(introspector.url, timeout_seconds=WAIT_SECONDS)
    secret = identity_document.secret_of(introspector, home)

    def ask(text: str) -> dict[str, Any]:
        form = {"token": text, "token_type_hint": "access_token"}
        return fetcher.post(form, user=introspector.client_id, password=secret)

    return Introspection(introspector, ask)

