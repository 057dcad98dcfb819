# SPDX-License-Identifier: Apache-2.0
"""An issuer's keys: fetched in the background, one malformed key costs one key, strangers cause few fetches."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from chassis.errors import Unavailable
from extauth.adapters import jwks
from extauth.adapters.jose import KEYS_MAX, ParsedSet, parse_set
from extauth.adapters.jwks import FetchedKeys
from extauth.core.issuers import Issuer, parse
from tests.provider import Provider, public_jwk

NOW = datetime(2026, 11, 25, 12, tzinfo=UTC)
PROVIDER = Provider(url="https://id.example.com")
PROVIDER.add("es", "ES256")
PROVIDER.add("rs", "RS256")
[GOOD, GOOD_RSA] = PROVIDER.jwks()["keys"]
ALGORITHMS = ("ES256", "RS256", "PS256", "EdDSA")


def issuer() -> Issuer:
    """An issuer whose keys are fetched."""
    entry = {
        "kind": "jwt", "issuer": PROVIDER.url, "jwks_url": f"{PROVIDER.url}/jwks", "audiences": ["peaje"],
        "algorithms": ["ES256", "RS256"], "tenants": "every",
    }  # fmt: skip
    [one] = parse({"issuers": [entry]}, source="test").issuers
    assert isinstance(one, Issuer)
    return one


class Source:
    """A key set as a test wants it; counts how often it is asked for, and lets the test say when it answers."""

    def __init__(self, *keys: dict[str, Any]) -> None:
        self.keys = list(keys)
        self.fetches = 0
        self.is_broken = False
        self.may_answer = threading.Event()
        self.may_answer.set()

    def __call__(self) -> dict[str, Any]:
        self.fetches += 1
        self.may_answer.wait(5)
        if self.is_broken:
            raise Unavailable("it answers 500")
        return {"keys": self.keys}


class Clock:
    """A time that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture
def started() -> Iterator[Callable[..., FetchedKeys]]:
    """Make keys that fetch in their own thread; stopped at the end."""
    made: list[FetchedKeys] = []

    def start(source: Source, clock: Clock, *, wait_seconds: float = 5.0) -> FetchedKeys:
        keys = FetchedKeys(issuer(), source, clock=clock, wait_seconds=wait_seconds)
        keys.start()
        made.append(keys)
        return keys

    yield start
    for keys in made:
        keys.stop()


def parsed(*entries: Any) -> ParsedSet:
    """The set of these keys."""
    made = parse_set({"keys": list(entries)}, algorithms=ALGORITHMS)
    assert isinstance(made, ParsedSet)
    return made


@pytest.mark.parametrize(
    "bad",
    [
        None, 7, [], "key", {}, {"kty": "RSA"}, {**GOOD_RSA, "kid": "x", "n": "AA"}, {**GOOD_RSA, "kid": "x", "n": 7},
        {**GOOD_RSA, "kid": "x", "e": "A"}, {**GOOD_RSA, "kid": "x", "n": "!!"}, {**GOOD, "kid": "x", "x": "AA"},
        {**GOOD, "kid": "x", "y": GOOD["x"]}, {**GOOD, "kid": 7}, {**GOOD, "kid": ""}, {**GOOD, "kid": "a" * 257},
        {**GOOD, "kid": "x", "d": "AA"}, {"kty": "oct", "kid": "x", "k": "AAAA", "alg": "HS256"},
        {**GOOD, "kid": "x", "kty": "RSA", "alg": "ES256"},
    ],
    ids=str,
)  # fmt: skip
def test_a_malformed_key_costs_that_key_only(bad: object) -> None:
    """CVE-2026-102274: one malformed key among good ones must not lose the others."""
    made = parsed(bad, GOOD, GOOD_RSA)

    assert {"es", "rs"} == set(made.keys)
    assert 1 == len(made.faults)
    assert made.faults[0].startswith("keys[0]: ")


@pytest.mark.parametrize(
    "other",
    [
        {**GOOD, "kid": "x", "use": "enc"}, {**GOOD, "kid": "x", "key_ops": ["sign"]}, {**GOOD, "kid": "x", "key_ops": 7},
        {**GOOD, "kid": "x", "alg": "ES384"}, {**GOOD, "kid": "x", "crv": "P-384", "alg": "ES256"},
        {**GOOD_RSA, "kid": "x", "alg": "RS512"}, {**GOOD_RSA, "kid": "x", "alg": "HS256"},
    ],
    ids=str,
)  # fmt: skip
def test_a_key_for_something_else_is_passed_over(other: dict[str, Any]) -> None:
    """Encryption keys and algorithms that are not pinned are nobody's fault."""
    assert {"es"} == set(parsed(other, GOOD).keys)


def test_a_key_is_bound_to_one_algorithm() -> None:
    """By its own word, by its curve, or for RSA because its issuer pins no other."""
    bare_ec, bare_rsa = ({k: v for k, v in key.items() if k != "alg"} for key in (GOOD, GOOD_RSA))

    assert "ES256" == parsed(bare_ec).keys["es"].algorithm
    assert {} == parsed(bare_rsa).keys  # RS256 or PS256, who knows
    only = parse_set({"keys": [bare_rsa]}, algorithms=("ES256", "PS256"))
    assert isinstance(only, ParsedSet)
    assert "PS256" == only.keys["rs"].algorithm


def test_two_keys_of_one_id_are_no_key() -> None:
    """Which of them signed would be a guess."""
    made = parsed(GOOD, {**GOOD_RSA, "kid": "es"}, GOOD_RSA)

    assert {"rs"} == set(made.keys)


def test_a_short_rsa_key_is_refused() -> None:
    """Below 2,048 bits."""
    weak = public_jwk(rsa.generate_private_key(65537, 1024), "weak", "RS256")

    assert {"es"} == set(parsed(weak, GOOD).keys)


@pytest.mark.parametrize(("count", "is_set"), [(KEYS_MAX, True), (KEYS_MAX + 1, False)])
def test_a_set_has_a_bounded_number_of_keys(count: int, is_set: bool) -> None:  # noqa: FBT001
    """Fifty."""
    keys = [{**GOOD, "kid": f"k{number}"} for number in range(count)]

    assert is_set == isinstance(parse_set({"keys": keys}, algorithms=ALGORITHMS), ParsedSet)


def test_the_first_request_waits_for_the_first_set(started: Callable[..., FetchedKeys]) -> None:
    """And no later one."""
    source, clock = Source(GOOD), Clock()

    keys = started(source, clock)

    assert keys.find("es", NOW) is not None
    assert 1 == source.fetches


def test_without_any_set_nobody_is_judged(started: Callable[..., FetchedKeys]) -> None:
    """Unavailable, never an allow and never "unknown"."""
    source = Source(GOOD)
    source.may_answer.clear()

    keys = started(source, Clock(), wait_seconds=0.01)

    with pytest.raises(Unavailable):
        keys.find("es", NOW)
    source.may_answer.set()


def test_a_thousand_unknown_ids_cause_one_fetch(started: Callable[..., FetchedKeys]) -> None:
    """Anybody can make up ids; thirty seconds later one more, and known unknown ones are never asked for again."""
    source, clock = Source(GOOD), Clock()
    keys = started(source, clock)
    keys.find("es", NOW)

    found = [keys.find(f"made-up-{number}", NOW) for number in range(1000)]
    at_once = source.fetches
    later = NOW + jwks.UNKNOWN_KID_FETCH_EVERY
    again = keys.find("made-up-0", later)
    after_known = source.fetches
    keys.find("another", later)

    assert {None} == {*found, again}
    assert (2, 2, 3) == (at_once, after_known, source.fetches)


def test_a_new_key_of_the_issuer_is_found_by_its_first_token(started: Callable[..., FetchedKeys]) -> None:
    """The request that brings it waits for the fetch that it causes, as do those beside it."""
    source, clock = Source(GOOD), Clock()
    keys = started(source, clock)
    keys.find("es", NOW)
    source.keys = [GOOD, GOOD_RSA]
    source.may_answer.clear()
    found: list[object] = []
    threads = [threading.Thread(target=lambda: found.append(keys.find("rs", NOW))) for _ in range(8)]

    for thread in threads:
        thread.start()
    source.may_answer.set()
    for thread in threads:
        thread.join(10)

    assert 8 == len(found)
    assert None not in found
    assert 2 == source.fetches
    assert 2 == keys.generation


def test_an_issuer_that_fails_keeps_its_last_keys_for_a_day() -> None:
    """Then nobody knows whether they are still good."""
    source, clock = Source(GOOD), Clock()
    keys = FetchedKeys(issuer(), source, clock=clock)
    keys.refresh()
    source.is_broken = True
    keys.refresh()

    just_before = keys.find("es", NOW + jwks.STALE_FOR - timedelta(seconds=1))

    assert just_before is not None
    with pytest.raises(Unavailable):
        keys.find("es", NOW + jwks.STALE_FOR)
    assert 2 == keys.generation  # what was proven with them is proven no more


@pytest.mark.parametrize("keys_now", [[], [{"kty": "RSA"}], [GOOD] * (KEYS_MAX + 1)], ids=["none", "malformed", "many"])
def test_a_set_without_use_leaves_the_last_one_in_force(keys_now: list[dict[str, Any]]) -> None:
    """An issuer that breaks its own set does not lock everybody out."""
    source = Source(GOOD)
    keys = FetchedKeys(issuer(), source, clock=Clock())
    keys.refresh()

    source.keys = keys_now
    keys.refresh()

    assert keys.find("es", NOW) is not None
    assert 1 == keys.generation


def test_a_key_that_is_withdrawn_is_gone_with_the_next_fetch() -> None:
    """And whoever remembers proofs sees another generation."""
    source = Source(GOOD, GOOD_RSA)
    keys = FetchedKeys(issuer(), source, clock=Clock(), wait_seconds=0.0)
    keys.refresh()
    before = keys.generation

    source.keys = [GOOD_RSA]
    keys.refresh()

    assert keys.generation > before
    with pytest.raises(Unavailable):  # a fetch that may bring it is on its way
        keys.find("es", NOW)


def test_unknown_ids_are_remembered_in_bounded_memory() -> None:
    """The bound, and one more."""
    keys = FetchedKeys(issuer(), Source(GOOD), clock=Clock())

    for number in range(jwks.UNKNOWN_KIDS_MAX + 1):
        keys._remember_unknown(f"k{number}", NOW)

    assert jwks.UNKNOWN_KIDS_MAX == len(keys._unknown)
    assert "k0" not in keys._unknown
