# SPDX-License-Identifier: Apache-2.0
"""
Keys that check signatures, and the check itself: the only module that knows PyJWT.

A key is bound to one algorithm when it is read. What a token's header says can only agree with it.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import jwt
from cryptography.hazmat.primitives.asymmetric import rsa
from jwt.exceptions import PyJWTError

from extauth.core.token import KID_LENGTH_MAX, Unproven

KEYS_MAX: Final = 50
RSA_BITS_MIN: Final = 2048
#: Checking costs with the square of it; nobody signs with more.
RSA_BITS_MAX: Final = 8192
_RSA_EXPONENT_MAX: Final = 2**32
#: The one algorithm of each curve.
_BY_CURVE: Final = {"P-256": "ES256", "P-384": "ES384", "P-521": "ES512", "Ed25519": "EdDSA"}
_KEY_TYPE: Final = {"ES": "EC", "RS": "RSA", "PS": "RSA", "Ed": "OKP"}
#: Members of a private or a symmetric key. Whoever publishes one has lost it.
_SECRET_MEMBERS: Final = frozenset({"d", "p", "q", "dp", "dq", "qi", "k", "oth"})

_JWS: Final = jwt.PyJWS()


@dataclass(frozen=True, slots=True, kw_only=True)
class VerificationKey:
    """A public key with its id and the one algorithm that it checks."""

    kid: str
    algorithm: str
    #: Equal for equal keys.
    fingerprint: bytes = field(repr=False)
    key: jwt.PyJWK = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedSet:
    """The usable keys of a set, by id, and what was wrong with the others."""

    keys: Mapping[str, VerificationKey]
    faults: tuple[str, ...]


def parse_set(document: Mapping[str, Any], *, algorithms: Collection[str]) -> ParsedSet | str:
    """
    Read a JWK set (RFC 7517); a fault in one key costs that key only. A string says why it is no set.

    Keys for other purposes (encryption, algorithms that the issuer does not sign with) are passed over.
    """
    entries = document.get("keys")
    if not isinstance(entries, list):
        return "it has no list `keys`"
    if len(entries) > KEYS_MAX:
        return f"it has more than {KEYS_MAX} keys"
    keys: dict[str, VerificationKey] = {}
    doubled: set[str] = set()
    faults = []
    for index, entry in enumerate(entries):
        found = _parse_key(entry, algorithms)
        if isinstance(found, str):
            faults.append(f"keys[{index}]: {found}")
        elif found is not None:
            if found.kid in keys:
                doubled.add(found.kid)
                faults.append(f"keys[{index}]: its kid is another's as well")
            keys[found.kid] = found
    # Which of the two signed is anybody's guess, so neither did.
    return ParsedSet(keys={kid: key for kid, key in keys.items() if kid not in doubled}, faults=tuple(faults))


def is_signed_by(token: Unproven, key: VerificationKey) -> bool:
    """Whether *key* made the signature, with the algorithm that it is bound to and the header names."""
    if token.algorithm != key.algorithm:
        return False
    try:
        _JWS.decode_complete(token.text, key.key, algorithms=[key.algorithm])
    except (PyJWTError, ValueError):
        return False
    return True


def _parse_key(entry: object, algorithms: Collection[str]) -> VerificationKey | str | None:
    if not isinstance(entry, dict):
        return "not an object"
    operations = entry.get("key_ops", ["verify"])
    if entry.get("use", "sig") != "sig" or not isinstance(operations, list) or "verify" not in operations:
        return None
    if not _SECRET_MEMBERS.isdisjoint(entry):
        return "a private or symmetric key"
    kid = entry.get("kid")
    if not isinstance(kid, str) or not 1 <= len(kid) <= KID_LENGTH_MAX:
        return "no usable kid"
    algorithm = _algorithm(entry, algorithms)
    if algorithm is None:
        return None
    if _KEY_TYPE[algorithm[:2]] != entry.get("kty") or not _has_texts(entry):
        return f"not a key for {algorithm}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            key = jwt.PyJWK(dict(entry), algorithm)
    except (PyJWTError, ValueError, TypeError, KeyError, AttributeError, OverflowError, Warning):
        return f"not a usable key for {algorithm}"
    if isinstance(key.key, rsa.RSAPublicKey) and not _is_sound(key.key):
        return f"an RSA key must have {RSA_BITS_MIN} to {RSA_BITS_MAX} bits"
    fingerprint = hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).digest()
    return VerificationKey(kid=kid, algorithm=algorithm, fingerprint=fingerprint, key=key)


def _algorithm(entry: Mapping[str, Any], algorithms: Collection[str]) -> str | None:
    """The one that the key names or that its curve allows; for RSA without either, the only one pinned."""
    named, curve = entry.get("alg"), entry.get("crv")
    if entry.get("kty") == "RSA":
        of_rsa = [name for name in algorithms if _KEY_TYPE[name[:2]] == "RSA"]
        bound = of_rsa[0] if named is None and len(of_rsa) == 1 else named
    else:
        bound = _BY_CURVE.get(curve) if isinstance(curve, str) else None
        bound = bound if named in (None, bound) else None
    return bound if isinstance(bound, str) and bound in algorithms else None


def _has_texts(entry: Mapping[str, Any]) -> bool:
    needed = {"EC": ("crv", "x", "y"), "RSA": ("n", "e"), "OKP": ("crv", "x")}[entry["kty"]]
    return all(isinstance(entry.get(name), str) for name in needed)


def _is_sound(key: rsa.RSAPublicKey) -> bool:
    return RSA_BITS_MIN <= key.key_size <= RSA_BITS_MAX and key.public_numbers().e < _RSA_EXPONENT_MAX
