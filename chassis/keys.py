# SPDX-License-Identifier: Apache-2.0
"""
Know the format of an API key: `peaje_<live|test>_<key id>_<secret><checksum>`, all base62.

Our other secrets have the same form and another kind: `op` for an operator's token, `sa` for a
service account's client secret, `boot` for the one-time bootstrap token.

The key id (12 characters) finds the stored row. The secret (32 characters, 190 bits) makes
guessing moot, so the stored form is one HMAC, not a slow password hash. The checksum (CRC-32
of everything before it, 6 characters) turns garbage away without any I/O; it is not a
security control. Pure: randomness and pepper are arguments.
"""

from __future__ import annotations

import hmac
import re
import string
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from chassis.errors import Invalid

ENVIRONMENTS: Final = ("live", "test")
OPERATOR_TOKEN: Final = "op"
CLIENT_SECRET: Final = "sa"
BOOTSTRAP_TOKEN: Final = "boot"
KEY_ID_LENGTH: Final = 12
SECRET_LENGTH: Final = 32
CHECKSUM_LENGTH: Final = 6
#: A longer credential is not looked at: hashing what a stranger sends must stay cheap.
CREDENTIAL_LENGTH_MAX: Final = 256

_ALPHABET: Final = string.digits + string.ascii_uppercase + string.ascii_lowercase
#: Two characters at a time: every request that brings a key pays for its checksum.
_PAIRS: Final = tuple(first + second for first in _ALPHABET for second in _ALPHABET)
#: The largest multiple of 62 that a byte holds: bytes from here on would favour the first characters.
_UNBIASED_BELOW: Final = 248
#: A working source passes in one or two; more means that the source is broken.
_DRAWS_MAX: Final = 64
_SHAPE: Final = re.compile(
    rf"peaje_(live|test|op|sa|boot)_([0-9A-Za-z]{{{KEY_ID_LENGTH}}})_[0-9A-Za-z]{{{SECRET_LENGTH + CHECKSUM_LENGTH}}}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MintedKey:
    """Hold a new key, the one time that it exists in clear; its `repr` does not show it."""

    key_id: str
    key: str = field(repr=False)
    last_four: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedKey:
    """Hold what a well-formed key says of itself. Nothing of it is proven yet; its `repr` hides the key."""

    key_id: str
    environment: str
    key: str = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class MintedToken:
    """Hold a new secret of any kind, the one time that it exists in clear; its `repr` does not show it."""

    token_id: str
    token: str = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedToken:
    """Hold what a well-formed secret says of itself. Nothing of it is proven yet; its `repr` hides the secret."""

    token_id: str
    kind: str
    token: str = field(repr=False)


def mint(environment: str, random_bytes: Callable[[int], bytes]) -> MintedKey:
    """Make a new key; *random_bytes* must be a cryptographic source such as `secrets.token_bytes`."""
    if environment not in ENVIRONMENTS:
        raise Invalid(f"The environment of a key is {environment!r}.", mend="Use live or test.")
    minted = mint_token(environment, random_bytes)
    return MintedKey(key_id=minted.token_id, key=minted.token, last_four=minted.token[-4:])


def mint_token(kind: str, random_bytes: Callable[[int], bytes], *, token_id: str | None = None) -> MintedToken:
    """Make a new secret of *kind*, in the form of a key; with *token_id*, another one of the same owner."""
    token_id = token_id or _draw(KEY_ID_LENGTH, random_bytes)
    body = f"peaje_{kind}_{token_id}_{_draw(SECRET_LENGTH, random_bytes)}"
    return MintedToken(token_id=token_id, token=body + checksum(body))


def parse(text: object) -> ParsedKey | None:
    """
    Read a credential's key id, or answer None for anything that no `mint` can have made.

    Cost is bounded whatever is sent, and there is no I/O, so garbage never reaches a store.

    >>> parse("peaje_live_0123456789AB_0123456789abcdefghijklmnopqrstuv1fTxeV")
    ParsedKey(key_id='0123456789AB', environment='live')
    >>> parse("peaje_live_0123456789AB_0123456789abcdefghijklmnopqrstuv1fTxeW") is None
    True
    """
    kind, key_id = _read(text)
    if kind not in ENVIRONMENTS:
        return None
    return ParsedKey(key_id=key_id, environment=kind, key=str(text))


def parse_token(text: object) -> ParsedToken | None:
    """Read the id and the kind of a secret of any kind, or answer None, as `parse` does."""
    kind, token_id = _read(text)
    return ParsedToken(token_id=token_id, kind=kind, token=str(text)) if kind else None


def hash_key(pepper: bytes, key: str) -> bytes:
    """Compute the only form in which a key is stored: HMAC-SHA-256 of the whole key."""
    return hmac.digest(pepper, key.encode("utf-8", "surrogatepass"), "sha256")


def verify(pepper: bytes, key: str, key_hash: bytes) -> bool:
    """Tell whether *key* is the one that *key_hash* was made of, in time that does not depend on either."""
    return hmac.compare_digest(hash_key(pepper, key), key_hash)


def checksum(body: str) -> str:
    """
    Encode the CRC-32 of *body* in six base62 characters.

    >>> checksum("peaje_live_0123456789AB_0123456789abcdefghijklmnopqrstuv")
    '1fTxeV'
    """
    rest, low = divmod(zlib.crc32(body.encode("ascii")), len(_PAIRS))
    high, middle = divmod(rest, len(_PAIRS))
    return _PAIRS[high] + _PAIRS[middle] + _PAIRS[low]


def _read(text: object) -> tuple[str, str]:
    """Kind and id of a well-formed secret; empty for anything else."""
    if not isinstance(text, str) or len(text) > CREDENTIAL_LENGTH_MAX:
        return "", ""
    shape = _SHAPE.fullmatch(text)
    # A checksum is no secret: how long it takes to compare tells nothing that its sender does not know.
    if shape is None or checksum(text[:-CHECKSUM_LENGTH]) != text[-CHECKSUM_LENGTH:]:
        return "", ""
    return shape[1], shape[2]


def _draw(count: int, random_bytes: Callable[[int], bytes]) -> str:
    characters: list[str] = []
    for _ in range(_DRAWS_MAX):
        unbiased = (byte for byte in random_bytes(count) if byte < _UNBIASED_BELOW)
        characters.extend(_ALPHABET[byte % len(_ALPHABET)] for byte in unbiased)
        if len(characters) >= count:
            return "".join(characters[:count])
    raise RuntimeError("the source of randomness keeps answering bytes that cannot be used")
