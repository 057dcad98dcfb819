# SPDX-License-Identifier: Apache-2.0
"""
Seal secrets that must be used again, such as what a webhook is signed with: a hash would not do.

AES-256-GCM under a key derived from the installation's newest pepper, which is outside the database;
bound to the name of what it belongs to, so that one row's secret does not open in another's place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from chassis.errors import Unavailable

_PURPOSE: Final = b"peaje sealed secret"
_KEY_BYTES: Final = 32
#: As NIST SP 800-38D recommends; random ones are safe for 2^32 secrets under one pepper.
_NONCE_BYTES: Final = 12
_VERSION_BYTES: Final = 4


def seal(peppers: Mapping[int, bytes], secret: str, *, owner: str, random_bytes: Callable[[int], bytes]) -> bytes:
    """Seal *secret* for *owner*; *random_bytes* must be a cryptographic source."""
    version, nonce = max(peppers), random_bytes(_NONCE_BYTES)
    box = AESGCM(_key(peppers[version])).encrypt(nonce, secret.encode(), owner.encode())
    return version.to_bytes(_VERSION_BYTES, "big") + nonce + box


def unseal(peppers: Mapping[int, bytes], sealed: bytes, *, owner: str) -> str:
    """
    Open what `seal` made for *owner*; raises `Unavailable` if its pepper is gone or it is another's.

    >>> sealed = seal({1: bytes(32)}, "s3cret", owner="wh_1", random_bytes=bytes)
    >>> unseal({1: bytes(32), 2: bytes(range(32))}, sealed, owner="wh_1")
    's3cret'
    """
    version = int.from_bytes(sealed[:_VERSION_BYTES], "big")
    nonce, box = sealed[_VERSION_BYTES : _VERSION_BYTES + _NONCE_BYTES], sealed[_VERSION_BYTES + _NONCE_BYTES :]
    if version not in peppers:
        raise Unavailable(f"The pepper {version} that sealed a secret of {owner} is not here.")
    try:
        return AESGCM(_key(peppers[version])).decrypt(nonce, box, owner.encode()).decode()
    except (InvalidTag, ValueError) as exc:
        raise Unavailable(f"A sealed secret of {owner} does not open.") from exc


def _key(pepper: bytes) -> bytes:
    return HKDF(algorithm=SHA256(), length=_KEY_BYTES, salt=None, info=_PURPOSE).derive(pepper)
