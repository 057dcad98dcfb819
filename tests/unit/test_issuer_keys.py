# SPDX-License-Identifier: Apache-2.0
"""An issuer's keys: fetched in the background, one malformed key costs one key, strangers cause few fetches."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from extauth.adapters import jwks
from extauth.adapters.jwks import KeySource, read_key, strict_object_of_keys
from extauth.core.claims import Unusable
from tests.provider import Provider, dump, public_jwk

PROVIDER = Provider(url="https://id.example.com")
PROVIDER.add("es", "ES256")
PROVIDER.add("rs", "RS256")
[GOOD, GOOD_RSA] = PROVIDER.jwks()["keys"]
ALGORITHMS = ("ES256", "RS256", "PS256", "EdDSA")


class Source:
    """A key set as a test wants it; counts how often it is asked for, and lets the test say when it answers."""

    def __init__(self, *keys: Any) -> None:
        self.keys = list(keys)
        self.fetches = 0
        #: Fetches whose answer is made, and cannot hold what comes later.
        self.answering = 0
        self.is_broken = False
        self.may_answer = threading.Event()
        self.may_answer.set()

    def __call__(self, _url: str) -> bytes:
        self.fetches += 1
        answer = dump({"keys": self.keys})
        self.answering += 1
        self.may_answer.wait(5)
        if self.is_broken:
            raise Unusable("status_not_200")
        return answer


class Clock:
    """A time that stands still until it is moved."""

    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def spin_until(is_so: Callable[[], bool]) -> None:
    """Wait for another thread; long enough for any machine."""
    deadline = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < deadline, "it did not come to pass"


def made(source: Source, clock: Clock | None = None) -> KeySource:
    """Keys of an issuer that pins two algorithms; nothing is fetched yet."""
    return KeySource(
        name="idp", url=f"{PROVIDER.url}/jwks", algorithms=("ES256", "RS256"), clock=clock or Clock(), fetch=source
    )


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., KeySource]]:
    """Make keys that fetch in their own thread; waiting is long enough for any machine."""
    monkeypatch.setattr(jwks, "WAIT_SECONDS_MAX", 5.0)
    running: list[KeySource] = []

    def start(source: Source, clock: Clock | None = None) -> KeySource:
        keys = made(source, clock)
        keys.start()
        running.append(keys)
        return keys

    yield start
    for keys in running:
        keys.close()


@pytest.mark.parametrize(
    "bad",
    [
        None, 7, [], "key", {}, {"kty": "RSA"}, {**GOOD_RSA, "kid": "x", "n": "AA"}, {**GOOD_RSA, "kid": "x", "n": 7},
        {**GOOD_RSA, "kid": "x", "e": "A"}, {**GOOD_RSA, "kid": "x", "e": None}, {**GOOD_RSA, "kid": "x", "n": "!!"},
        {**GOOD, "kid": "x", "x": "AA"}, {**GOOD, "kid": "x", "y": GOOD["x"]}, {**GOOD, "kid": 7}, {**GOOD, "kid": ""},
        {**GOOD, "kid": "a" * 257}, {**GOOD, "kid": "x", "d": "AA"}, {**GOOD, "kid": "x", "kty": ["EC"]},
        {"kty": "oct", "kid": "x", "k": "AAAA", "alg": "HS256"}, {**GOOD, "kid": "x", "kty": "RSA", "alg": "ES256"},
        {**GOOD, "kid": "x", "use": "enc"}, {**GOOD, "kid": "x", "key_ops": ["sign"]}, {**GOOD, "kid": "x", "key_ops": 7},
        {**GOOD, "kid": "x", "alg": "ES384"}, {**GOOD, "kid": "x", "crv": "P-384", "alg": "ES256"},
        {**GOOD, "kid": "x", "alg": ["ES256"]}, {**GOOD, "kid": "x", "crv": 7}, {**GOOD_RSA, "kid": "x", "alg": "RS512"},
        {**GOOD_RSA, "kid": "x", "alg": "HS256"},
    ],
    # Its keys are made anew each time, so they name no test.
    ids=lambda bad: type(bad).__name__,
)  # fmt: skip
def test_a_key_that_is_none_or_not_for_us_costs_that_key_only(bad: object) -> None:
    """CVE-2026-102274: one malformed key among good ones must not lose the others, nor end the fetching."""
    keys = made(Source(bad, GOOD, GOOD_RSA))

    assert keys.refresh()

    with pytest.raises(Unusable):
        read_key(bad, ALGORITHMS)
    assert keys.find("es") is not None
    assert keys.find("rs") is not None


def test_a_key_is_bound_to_one_algorithm() -> None:
    """By its own word, by its curve, or for RSA because its issuer pins no other."""
    bare_ec, bare_rsa = ({k: v for k, v in key.items() if k != "alg"} for key in (GOOD, GOOD_RSA))

    assert "ES256" == read_key(bare_ec, ALGORITHMS)[1].algorithm_name
    assert "PS256" == read_key(bare_rsa, ("ES256", "PS256"))[1].algorithm_name
    with pytest.raises(Unusable):
        read_key(bare_rsa, ALGORITHMS)  # RS256 or PS256: a guess


def test_two_keys_of_one_id_are_no_key() -> None:
    """Which of them signed would be a guess."""
    keys = made(Source(GOOD, {**GOOD_RSA, "kid": "es"}, GOOD_RSA))

    keys.refresh()

    assert {"rs"} == set(keys._current() or {})


def test_a_short_rsa_key_is_refused() -> None:
    """Below 2,048 bits."""
    with pytest.raises(Unusable):
        read_key(public_jwk(rsa.generate_private_key(65537, 1024), "weak", "RS256"), ALGORITHMS)  # noqa: S505 - it is to be refused


def test_a_set_has_a_bounded_number_of_keys() -> None:
    """Fifty, and not one more."""
    entries = [{"kid": f"k{number}"} for number in range(jwks.KEYS_MAX + 1)]

    assert jwks.KEYS_MAX == len(strict_object_of_keys(dump({"keys": entries[:-1]})))
    with pytest.raises(Unusable):
        strict_object_of_keys(dump({"keys": entries}))


def test_the_first_request_waits_for_the_first_set(started: Callable[..., KeySource]) -> None:
    """And no later one."""
    source = Source(GOOD)

    keys = started(source)

    assert keys.find("es") is not None
    assert 1 == source.fetches


def test_without_any_set_nobody_is_judged(started: Callable[..., KeySource], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither an allow nor "unknown"; and who comes after the first does not wait in vain as well."""
    source = Source(GOOD)
    source.may_answer.clear()
    monkeypatch.setattr(jwks, "WAIT_SECONDS_MAX", 0.01)

    keys = started(source)

    for _ in range(3):
        with pytest.raises(LookupError):
            keys.find("es")
    assert not keys._is_prompt
    source.may_answer.set()


def test_a_thousand_unknown_ids_cause_one_fetch(started: Callable[..., KeySource]) -> None:
    """Anybody can make up ids. Thirty seconds later there may be one more, but not for one that is known to be unknown."""
    source, clock = Source(GOOD), Clock()
    keys = started(source, clock)
    keys.find("es")

    found = {keys.find(f"made-up-{number}") for number in range(1000)}
    at_once = source.fetches
    clock.now += jwks.UNKNOWN_KEY_REFRESH_SECONDS
    found.add(keys.find("made-up-0"))
    after_known = source.fetches
    found.add(keys.find("another"))

    assert {None} == found
    assert (2, 2, 3) == (at_once, after_known, source.fetches)


def test_a_new_key_is_found_by_the_first_tokens_that_it_signed(started: Callable[..., KeySource]) -> None:
    """The request that brings it waits for the fetch that it causes, as do those beside it."""
    source = Source(GOOD)
    keys = started(source)
    keys.find("es")
    source.keys = [GOOD, GOOD_RSA]
    source.may_answer.clear()
    found: list[object] = []
    threads = [threading.Thread(target=lambda: found.append(keys.find("rs"))) for _ in range(8)]

    for thread in threads:
        thread.start()
    source.may_answer.set()
    for thread in threads:
        thread.join(10)

    assert 8 == len(found)
    assert None not in found
    assert 2 == source.fetches


def test_a_key_that_a_fetch_under_way_missed_may_be_asked_for_again(started: Callable[..., KeySource]) -> None:
    """Others caused that fetch before the key was there: the key is not known to be unknown."""
    source, clock = Source(GOOD), Clock()
    keys = started(source, clock)
    keys.find("es")
    source.may_answer.clear()
    stranger = threading.Thread(target=lambda: keys.find("made-up"))
    stranger.start()
    spin_until(lambda: source.answering == 2)
    source.keys = [GOOD, GOOD_RSA]
    found: list[object] = []
    owner = threading.Thread(target=lambda: found.append(keys.find("rs")))
    owner.start()
    spin_until(lambda: len(keys._condition._waiters) == 2)  # type: ignore[attr-defined] - both are in `find` now

    source.may_answer.set()
    stranger.join(10)
    owner.join(10)
    clock.now += jwks.UNKNOWN_KEY_REFRESH_SECONDS

    assert [None] == found
    assert ["made-up"] == list(keys._unknown)
    assert keys.find("rs") is not None


def test_an_issuer_that_fails_keeps_its_last_keys_for_a_day() -> None:
    """Then nobody knows whether they are still good."""
    source, clock = Source(GOOD), Clock()
    keys = made(source, clock)
    keys.refresh()
    source.is_broken = True
    clock.now += jwks.STALE_SECONDS

    assert not keys.refresh()
    assert keys.find("es") is not None
    clock.now += 1
    with pytest.raises(LookupError):
        keys.find("es")


@pytest.mark.parametrize("now", [[], [{"kty": "RSA"}], [GOOD] * (jwks.KEYS_MAX + 1)], ids=["none", "malformed", "many"])
def test_a_set_without_use_leaves_the_last_one_in_force(now: list[Any]) -> None:
    """An issuer that breaks its own set does not lock everybody out."""
    source = Source(GOOD)
    keys = made(source)
    keys.refresh()
    before = keys.generation

    source.keys = now

    assert not keys.refresh()
    assert keys.find("es") is not None
    assert before == keys.generation


def test_only_other_keys_are_another_generation() -> None:
    """What was verified with the same keys stays verified; what was with withdrawn ones does not."""
    source = Source(GOOD, GOOD_RSA)
    keys = made(source)
    keys.refresh()
    first = keys.generation
    keys.refresh()
    same = keys.generation

    source.keys = [GOOD_RSA]
    keys.refresh()

    assert first == same
    assert same < keys.generation
    assert {"rs"} == set(keys._current() or {})


def test_unknown_ids_are_remembered_in_bounded_memory() -> None:
    """The bound, and one more."""
    keys = made(Source(GOOD))

    for number in range(jwks.UNKNOWN_KEYS_MAX + 1):
        keys._remember_unknown(f"k{number}")

    assert jwks.UNKNOWN_KEYS_MAX == len(keys._unknown)
    assert "k0" not in keys._unknown


def test_the_instrument_publishes_what_it_signs_with() -> None:
    """A set that these tests could not read would make them all pass."""
    assert {"es", "rs"} == {entry["kid"] for entry in json.loads(dump(PROVIDER.jwks()))["keys"]}
