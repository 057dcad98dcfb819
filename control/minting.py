# SPDX-License-Identifier: Apache-2.0
"""Make and check secrets of every kind with the peppers of this installation; the newest pepper hashes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import structlog

from chassis import keys
from chassis.errors import Unavailable

log = structlog.get_logger()

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

    def match(self, secret: str, *stored: Hashed | None) -> Hashed | None:
        """
        The first of *stored* that was made of *secret*; None stands for one that is not there, and takes as long.

        Raises `Unavailable` where the answer may lie behind a pepper that this process does not have.
        """
        matching: Hashed | None = None
        is_sure = True
        for one in stored:
            pepper = self.peppers.get(one.pepper_version) if one is not None else None
            is_right = keys.verify(pepper or self.peppers[max(self.peppers)], secret, one.hash if one is not None else _NO_HASH)
            if one is not None and pepper is None:
                is_sure = False
            elif is_right and matching is None:
                matching = one
        if matching is None and not is_sure:
            log.error("pepper_missing", versions=[one.pepper_version for one in stored if one is not None])
            raise Unavailable("A pepper is missing.", mend="Put the file back into secrets/.")
        return matching

    def is_outdated(self, stored: Hashed) -> bool:
        """Whether *stored* was made with a pepper that is not the newest."""
        return stored.pepper_version != max(self.peppers)
