# SPDX-License-Identifier: Apache-2.0
"""Make and check secrets of every kind with the peppers of this installation; the newest pepper hashes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from chassis import keys

#: Compared with when nothing was found, so that an unknown id takes as long as a wrong secret.
_NO_HASH = bytes(32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hashed:
    """The only form of a secret that is stored."""

    hash: bytes
    pepper_version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Mint:
    """The peppers, by version, and a cryptographic source of randomness."""

    peppers: Mapping[int, bytes] = field(repr=False)
    random_bytes: Callable[[int], bytes]

    def key(self, environment: str) -> tuple[keys.MintedKey, Hashed]:
        """A new API key and what is stored of it."""
        minted = keys.mint(environment, self.random_bytes)
        return minted, self.hashed(minted.key)

    def token(self, kind: str, *, token_id: str | None = None) -> tuple[keys.MintedToken, Hashed]:
        """A new secret of *kind* and what is stored of it; with *token_id*, another one of the same owner."""
        minted = keys.mint_token(kind, self.random_bytes, token_id=token_id)
        return minted, self.hashed(minted.token)

    def hashed(self, secret: str) -> Hashed:
        """What is stored of *secret* from now on."""
        version = max(self.peppers)
        return Hashed(hash=keys.hash_key(self.peppers[version], secret), pepper_version=version)

    def holds(self, secret: str, stored: Hashed | None) -> bool:
        """Whether *secret* is the one that *stored* was made of; takes equally long if there is none."""
        pepper = self.peppers.get(stored.pepper_version) if stored is not None else None
        if stored is None or pepper is None:
            keys.verify(self.peppers[max(self.peppers)], secret, _NO_HASH)
            return False
        return keys.verify(pepper, secret, stored.hash)

    def is_outdated(self, stored: Hashed) -> bool:
        """Whether *stored* was made with a pepper that is not the newest."""
        return stored.pepper_version != max(self.peppers)
