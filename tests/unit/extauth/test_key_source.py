# SPDX-License-Identifier: Apache-2.0
"""An issuer's key set: how long it is used, how seldom it is asked for, what is in it."""

from __future__ import annotations

import json

import pytest
from jwt import get_algorithm_by_name

from extauth.adapters.jwks import (
    DOCUMENT_BYTES_MAX,
    KEYS_MAX,
    STALE_SECONDS,
    KeySource,
    read_key,
    strict_object_of_keys,
)
from extauth.core.claims import CONTAINERS_MAX, Unusable, strict_object
from tests.provider import Provider, dump


def _issuer() -> Provider:
    issuer = Provider(url="http://127.0.0.1:1")
    issuer.add("one", "ES256")
    return issuer


class Source:
    """A key source whose time and fetches are the test's; it is not started, so only `refresh` fetches."""

    def __init__(self) -> None:
        self.issuer = _issuer()
        self.now = 1000.0
        self.is_away = False
        self.keys = KeySource(
            name="idp", url="u", algorithms=("ES256",), clock=lambda: self.now, fetch=self._fetch
        )  # fmt: skip

    def _fetch(self, _url: str) -> bytes:
        if self.is_away:
            raise OSError("away")
        return dump(self.issuer.jwks())


def test_a_set_that_cannot_be_renewed_is_used_for_a_day() -> None:
    """At the bound, and not after."""
    source = Source()
    assert source.keys.refresh()
    source.is_away = True
    assert not source.keys.refresh()

    source.now += STALE_SECONDS
    assert source.keys.find("one") is not None
    source.now += 1
    with pytest.raises(LookupError):
        source.keys.find("one")


def test_two_keys_with_one_id_are_neither() -> None:
    """Which one counts would be the parser's choice."""
    source = Source()
    entries = source.issuer.jwks()["keys"]
    other = _issuer().jwks()["keys"]
    good = {**other[0], "kid": "two"}
    document = json.dumps({"keys": [*entries, *other, good]}).encode()
    source.keys = KeySource(name="idp", url="u", algorithms=("ES256",), clock=lambda: 0.0, fetch=lambda _: document)

    assert source.keys.refresh()
    assert source.keys.find("one") is None
    assert source.keys.find("two") is not None


@pytest.mark.parametrize(
    "change",
    [
        {"kid": None}, {"kid": ""}, {"use": "enc"}, {"key_ops": ["sign"]}, {"alg": "HS256"}, {"alg": "RS256"}, {"alg": "ES384"},
        {"crv": "P-384"}, {"x": "AAAA"}, {"kty": "oct", "k": "AAAA"}, {"kty": "RSA"}, {"alg": 1}, {"x": None},
    ],
)  # fmt: skip
def test_a_key_that_is_not_for_this_is_ignored(change: dict[str, object]) -> None:
    """Symmetric, for another use, of another curve or algorithm, malformed."""
    (entry,) = _issuer().jwks()["keys"]
    assert "one" == read_key(entry, ("ES256", "RS256"))[0]

    with pytest.raises(Unusable):
        read_key({**entry, **change}, ("ES256",))


def test_a_short_rsa_key_is_ignored() -> None:
    """Factored in a day is no key."""
    from cryptography.hazmat.primitives.asymmetric import rsa  # noqa: PLC0415

    short = rsa.generate_private_key(public_exponent=65537, key_size=1024).public_key()  # noqa: S505 - that it is short is the point
    entry = get_algorithm_by_name("RS256").to_jwk(short, as_dict=True) | {"kid": "short"}

    with pytest.raises(Unusable, match="rsa_too_short"):
        read_key(entry, ("RS256",))


def test_a_set_is_bounded() -> None:
    """At the bound, and one above."""
    assert KEYS_MAX == len(strict_object_of_keys(json.dumps({"keys": [{}] * KEYS_MAX}).encode()))
    with pytest.raises(Unusable):
        strict_object_of_keys(json.dumps({"keys": [{}] * (KEYS_MAX + 1)}).encode())
    assert DOCUMENT_BYTES_MAX == 256 * 1024


def test_depth_is_bounded_before_parsing() -> None:
    """At the bound, and one above."""
    inside = CONTAINERS_MAX - 1
    assert strict_object(b'{"a":' + b"[" * inside + b"]" * inside + b"}")
    with pytest.raises(Unusable, match="too_deep"):
        strict_object(b'{"a":' + b"[" * (inside + 1) + b"]" * (inside + 1) + b"}")
