# SPDX-License-Identifier: Apache-2.0
"""
The keys that sign tokens: files in `secrets/`, one a key, named by when it was made; ES256.

A new key is published before it signs, an old one after it has stopped (`control.core.tokens`
says when), so a rotation costs no request. The files are looked at on each use: whoever shares
them sees a rotation at once.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm

from chassis.errors import Conflict, Invalid, Unavailable
from chassis.secrets import read_private, write_private
from control import audit
from control.act import Act
from control.core import tokens
from control.store import Store

ALGORITHM: Final = "ES256"
#: RFC 9068 2.1: tells an access token from any other JWT.
TOKEN_TYPE: Final = "at+jwt"

_MOMENT: Final = "%Y%m%dT%H%M%S%fZ"
_NAME: Final = re.compile(r"signing-key-([0-9]{8}T[0-9]{12}Z)\.pem")


@dataclass(frozen=True, slots=True, kw_only=True)
class SigningKey:
    """One key pair; `kid` is the thumbprint of its public half (RFC 7638)."""

    created_at: datetime
    kid: str
    public: Mapping[str, Any]
    private: ec.EllipticCurvePrivateKey = field(repr=False)


class SigningKeys:
    """The keys in one directory; safe to use from several threads."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock = threading.Lock()
        self._names: list[str] = []
        self._keys: list[SigningKey] = []

    def sign(self, claims: Mapping[str, Any], *, now: datetime) -> str:
        """The token that says *claims*, signed with the key whose turn it is; makes the first key."""
        keys = self.all(now=now)
        key = keys[tokens.signer([one.created_at for one in keys], now=now)]
        return jwt.encode(
            dict(claims), key.private, algorithm=ALGORITHM, headers={"kid": key.kid, "typ": TOKEN_TYPE}
        )

    def document(self, *, now: datetime) -> dict[str, Any]:
        """The public keys as a JWK set (RFC 7517)."""
        keys = self.all(now=now)
        return {"keys": [dict(keys[index].public) for index in tokens.published([one.created_at for one in keys], now=now)]}

    def all(self, *, now: datetime) -> Sequence[SigningKey]:
        """Every key on disk, oldest first; makes the first one."""
        with self._lock:
            names = self._look()
            if not names:
                self._make(now)
                names = self._look()
            if names != self._names:
                self._keys = [_load(self._directory / name) for name in names]
                self._names = names
            return list(self._keys)

    def add(self, *, now: datetime) -> SigningKey:
        """Make a new key and remove those that no token can need any more."""
        keys = self.all(now=now)
        wanted = tokens.published([one.created_at for one in keys], now=now)
        with self._lock:
            made = self._make(now)
            for index in set(range(len(keys))) - set(wanted):
                self._remove(keys[index])
        return made

    def replace(self, *, now: datetime) -> SigningKey:
        """Make a new key that signs at once and remove every other: tokens that they signed stop working."""
        keys = self.all(now=now)
        with self._lock:
            made = self._make(now)
            for key in keys:
                self._remove(key)
        return made

    def _look(self) -> list[str]:
        try:
            return sorted(entry.name for entry in self._directory.iterdir() if _NAME.fullmatch(entry.name))
        except OSError as exc:
            raise Unavailable(f"The signing keys in {self._directory} cannot be read: {exc.strerror}.") from exc

    def _make(self, now: datetime) -> SigningKey:
        private = ec.generate_private_key(ec.SECP256R1())
        text = private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ).decode("ascii")
        # Two in one microsecond would be one file: the second is made a microsecond later.
        taken = [_moment(name) for name in self._look()]
        created_at = max([now.astimezone(UTC), *(moment + timedelta(microseconds=1) for moment in taken)])
        path = self._directory / f"signing-key-{created_at.strftime(_MOMENT)}.pem"
        try:
            write_private(path, text)
        except OSError as exc:
            raise Unavailable(f"The signing key {path} cannot be written: {exc.strerror}.") from exc
        return _load(path)

    def _remove(self, key: SigningKey) -> None:
        (self._directory / f"signing-key-{key.created_at.strftime(_MOMENT)}.pem").unlink(missing_ok=True)


def rotate(store: Store, act: Act, keys: SigningKeys, *, at_once: bool) -> dict[str, Any]:
    """
    Make the next signing key. *at_once* is for a key that was stolen: the old ones go, and every token with them.

    A second rotation must wait for the first one's key to sign: verifiers may not have heard of it.
    """
    known = keys.all(now=act.now)
    waiting = known[-1].created_at if len(known) > 1 else None
    if not at_once and waiting is not None and act.now < waiting + tokens.PUBLISH_AHEAD:
        raise Conflict("A new signing key is waiting for its turn already.", mend="Wait ten minutes, or use --at-once.")
    # The transaction first: while Postgres is away there would be no entry, so there is no rotation.
    with store.transaction(act.scope) as connection:
        made = keys.replace(now=act.now) if at_once else keys.add(now=act.now)
        listed = describe(keys, now=act.now)
        audit.append(
            connection, act, "signing_key.replaced" if at_once else "signing_key.rotated", made.kid, tenant_id=None,
            after={"keys": listed},
        )
    return {"kid": made.kid, "keys": listed}


def describe(keys: SigningKeys, *, now: datetime) -> list[dict[str, Any]]:
    """Every key with its state: waiting, signing, or retired (published for tokens that it signed); never the secret."""
    known = keys.all(now=now)
    created = [one.created_at for one in known]
    signing, wanted = tokens.signer(created, now=now), tokens.published(created, now=now)
    return [
        {
            "kid": key.kid, "created_at": key.created_at, "is_published": index in wanted,
            "state": "signing" if index == signing else "waiting" if index > signing else "retired",
        }
        for index, key in enumerate(known)
    ]


def _load(path: Path) -> SigningKey:
    try:
        private = serialization.load_pem_private_key(read_private(path).encode("ascii"), password=None)
    except ValueError as exc:
        raise Invalid(f"The signing key {path} is not a private key in PEM.") from exc
    if not isinstance(private, ec.EllipticCurvePrivateKey) or not isinstance(private.curve, ec.SECP256R1):
        raise Invalid(f"The signing key {path} is not for ES256.", mend="Remove it and run peaje signing-keys rotate.")
    public = json.loads(ECAlgorithm.to_jwk(private.public_key()))
    kid = _thumbprint(public)
    return SigningKey(
        created_at=_moment(path.name), kid=kid, private=private,
        public=public | {"kid": kid, "use": "sig", "alg": ALGORITHM},
    )


def _moment(name: str) -> datetime:
    matched = _NAME.fullmatch(name)
    assert matched is not None
    return datetime.strptime(matched[1], _MOMENT).replace(tzinfo=UTC)


def _thumbprint(public: Mapping[str, Any]) -> str:
    required = {name: public[name] for name in ("crv", "kty", "x", "y")}
    digest = hashlib.sha256(json.dumps(required, sort_keys=True, separators=(",", ":")).encode("ascii")).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode("ascii")
