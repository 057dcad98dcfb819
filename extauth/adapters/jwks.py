# SPDX-License-Identifier: Apache-2.0
"""
An issuer's key set: fetched in the background, kept while the issuer is away.

A request waits for a fetch in two cases only, each bounded: nothing has been fetched yet, and a
key id that nobody has seen, which may be a new key. The second causes one fetch per 30 seconds
and issuer, however many such ids arrive; who arrives meanwhile waits for the same one. An issuer
that was waited for in vain is not waited for again until it has answered.
"""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx
import structlog
from cryptography.hazmat.primitives.asymmetric import rsa
from jwt import PyJWK
from jwt.exceptions import PyJWTError

from extauth.adapters import metrics
from extauth.core.claims import KEY_ID_LENGTH_MAX, Unusable, strict_object

log = structlog.get_logger()

REFRESH_SECONDS: Final = 300.0
#: A failed fetch is tried again after this.
RETRY_SECONDS: Final = 10.0
#: As long as there is no set at all nobody's token can be judged: at first more often.
FIRST_RETRY_SECONDS: Final = 1.0
UNKNOWN_KEY_REFRESH_SECONDS: Final = 30.0
#: A set that could not be renewed is used this long.
STALE_SECONDS: Final = 24 * 3600.0
DOCUMENT_BYTES_MAX: Final = 256 * 1024
KEYS_MAX: Final = 50
#: Unknown ids that do not cause another fetch.
UNKNOWN_KEYS_MAX: Final = 1000
#: An id that a fetch did not bring is not asked for again this long.
UNKNOWN_KEY_SECONDS: Final = 300.0
FETCH_SECONDS_MAX: Final = 5.0
#: Below Envoy's 500 ms for the whole decision.
WAIT_SECONDS_MAX: Final = 0.25
RSA_BITS_MIN: Final = 2048
#: Checking a signature costs with the square of it.
RSA_BITS_MAX: Final = 8192
#: Of private and symmetric keys; whoever publishes one has lost it.
_SECRET_MEMBERS: Final = frozenset({"d", "p", "q", "dp", "dq", "qi", "k", "oth"})
#: What a key of each kind is made of; texts, all of them.
_MEMBERS: Final = {"EC": ("crv", "x", "y"), "RSA": ("n", "e"), "OKP": ("crv", "x")}

_CURVES: Final = {"ES256": "P-256", "ES384": "P-384", "ES512": "P-521", "EdDSA": "Ed25519"}
_KINDS: Final = {"RS": "RSA", "PS": "RSA", "ES": "EC", "Ed": "OKP"}


@dataclass(frozen=True, slots=True, kw_only=True)
class KeySet:
    """An issuer's keys by id, each bound to one algorithm."""

    keys: Mapping[str, PyJWK]
    #: Seconds of a monotonic clock.
    fetched_at: float


class KeySource:
    """The keys of one issuer; safe to call from several threads."""

    def __init__(
        self,
        *,
        name: str,
        url: str,
        algorithms: tuple[str, ...],
        clock: Callable[[], float] = time.monotonic,
        fetch: Callable[[str], bytes] | None = None,
    ) -> None:
        self.identity = (url, algorithms)
        self._name = name
        self._url = url
        self._algorithms = algorithms
        self._clock = clock
        self._fetch = fetch or fetch_document
        self._set: KeySet | None = None
        self._condition = threading.Condition()
        #: Fetches that have ended, well or not; the one that requests wait for; whether one goes on.
        self._rounds = 0
        self._wanted_round = 0
        self._is_fetching = False
        self._is_started = False
        self._is_closed = False
        #: False once somebody has waited in vain.
        self._is_prompt = True
        self._generation = 0
        self._unknown_refresh_at = -UNKNOWN_KEY_REFRESH_SECONDS
        self._unknown: OrderedDict[str, float] = OrderedDict()

    @property
    def generation(self) -> int:
        """Another number when the keys have changed: what was verified with others must be verified again."""
        return self._generation

    def start(self) -> None:
        """Begin to fetch, from a thread of its own. Until then nobody waits for a fetch: there would be none."""
        self._is_started = True
        threading.Thread(target=self._run, name=f"jwks-{self._name}", daemon=True).start()

    def close(self) -> None:
        """Stop fetching."""
        with self._condition:
            self._is_closed = True
            self._condition.notify_all()

    def find(self, key_id: str) -> PyJWK | None:
        """
        The key with this id, None if the issuer has none.

        Raises `LookupError` where that cannot be said: there is no set, it is too old, or one that may have the key is
        on its way and late.
        """
        with self._condition:
            if self._set is None:
                self._wait_until(self._next_round())
            keys = self._current()
            if keys is None:
                raise LookupError("no key set")
            found = keys.get(key_id)
            if found is not None or not self._is_started or not self._is_fetched_for(key_id):
                return found
            is_asked_late = self._is_fetching and self._rounds + 1 == self._wanted_round
            if not self._wait_until(self._wanted_round):
                raise LookupError("the key set is being fetched")
            found = (self._current() or {}).get(key_id)
            # A fetch that others had caused already may have missed the key by an instant.
            if found is None and not is_asked_late:
                self._remember_unknown(key_id)
            return found

    def refresh(self) -> bool:
        """Fetch once, now; whether there is a new set. A set without a usable key leaves the last one in force."""
        with self._condition:
            self._is_fetching = True
        fetched = None
        try:
            fetched = KeySet(keys=self._read(self._fetch(self._url)), fetched_at=self._clock())
            log.debug("jwks_fetched", issuer=self._name, count=len(fetched.keys))
        except (httpx.HTTPError, httpx.InvalidURL, OSError, Unusable) as exc:
            log.warning("jwks_refused", issuer=self._name, error=type(exc).__name__, reason=_reason(exc))
        metrics.JWKS_FETCHES.labels(self._name, "ok" if fetched else "failed").inc()
        with self._condition:
            if fetched is not None:
                if self._set is None or _identities(fetched) != _identities(self._set):
                    self._generation += 1
                    self._unknown.clear()
                self._set = fetched
                self._is_prompt = True
            self._rounds += 1
            self._is_fetching = False
            self._condition.notify_all()
        return fetched is not None

    def _age_seconds(self) -> float:
        """Without a set, infinite: nothing of this issuer can be verified. Of a source that is over, nothing."""
        if self._is_closed:
            return math.nan
        return math.inf if self._set is None else self._clock() - self._set.fetched_at

    def _run(self) -> None:
        metrics.JWKS_AGE_SECONDS.labels(self._name).set_function(self._age_seconds)
        while True:
            is_good = self.refresh()
            pause = REFRESH_SECONDS if is_good else self._retry_seconds()
            with self._condition:
                self._condition.wait_for(lambda: self._is_closed or self._rounds < self._wanted_round, pause)
                if self._is_closed:
                    return

    def _retry_seconds(self) -> float:
        if self._set is not None:
            return RETRY_SECONDS
        return min(RETRY_SECONDS, FIRST_RETRY_SECONDS * float(2 ** min(self._rounds - 1, 10)))

    def _current(self) -> Mapping[str, PyJWK] | None:
        current = self._set
        if current is None or self._clock() - current.fetched_at > STALE_SECONDS:
            return None
        return current.keys

    def _is_fetched_for(self, key_id: str) -> bool:
        """Whether a fetch that may bring *key_id* is on its way: one that others have caused, or a new one, if it is time."""
        now = self._clock()
        since = self._unknown.get(key_id)
        if since is not None and now - since < UNKNOWN_KEY_SECONDS:
            self._unknown.move_to_end(key_id)
            return False
        if self._rounds < self._wanted_round:
            return True
        if now - self._unknown_refresh_at < UNKNOWN_KEY_REFRESH_SECONDS:
            return False
        self._unknown_refresh_at = now
        self._wanted_round = self._next_round()
        self._condition.notify_all()
        return True

    def _next_round(self) -> int:
        """The fetch whose answer is from now on: one that began before may have been answered before."""
        return self._rounds + (2 if self._is_fetching and self._set is not None else 1)

    def _wait_until(self, round_number: int) -> bool:
        if self._is_prompt and not self._condition.wait_for(lambda: self._rounds >= round_number, WAIT_SECONDS_MAX):
            self._is_prompt = False
        return self._rounds >= round_number

    def _remember_unknown(self, key_id: str) -> None:
        self._unknown[key_id] = self._clock()
        while len(self._unknown) > UNKNOWN_KEYS_MAX:
            self._unknown.popitem(last=False)

    def _read(self, document: bytes) -> dict[str, PyJWK]:
        entries = strict_object_of_keys(document)
        keys: dict[str, PyJWK] = {}
        repeated: set[str] = set()
        for entry in entries:
            try:
                kid, key = read_key(entry, self._algorithms)
            except Unusable as exc:
                # One bad key must not cost the others.
                log.info("jwk_ignored", issuer=self._name, reason=str(exc))
                continue
            if kid in keys:
                repeated.add(kid)
            keys[kid] = key
        for kid in repeated:
            del keys[kid]
        if not keys:
            raise Unusable("no_usable_key")
        return keys


def strict_object_of_keys(document: bytes) -> list[Any]:
    """The entries of a JWKS document; raises `Unusable` if it is none or has too many."""
    entries = strict_object(document).get("keys")
    if not isinstance(entries, list) or len(entries) > KEYS_MAX:
        raise Unusable("not_a_key_set")
    return entries


def read_key(entry: object, algorithms: tuple[str, ...]) -> tuple[str, PyJWK]:
    """A key's id and the key, bound to the one algorithm it may verify; raises `Unusable`, whatever *entry* is."""
    if not isinstance(entry, dict):
        raise Unusable("not_an_object")
    kid, use = entry.get("kid"), entry.get("use", "sig")
    operations = entry.get("key_ops", ["verify"])
    if not isinstance(kid, str) or not 0 < len(kid) <= KEY_ID_LENGTH_MAX:
        raise Unusable("no_usable_kid")
    if use != "sig" or not isinstance(operations, list) or "verify" not in operations:
        raise Unusable("not_for_signatures")
    if not _SECRET_MEMBERS.isdisjoint(entry):
        raise Unusable("secret_key")
    algorithm = _algorithm(entry, algorithms)
    if not all(isinstance(entry.get(member), str) for member in _MEMBERS[_KINDS[algorithm[:2]]]):
        raise Unusable("malformed_key")
    try:
        key = PyJWK(dict(entry), algorithm=algorithm)
    except (PyJWTError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as exc:
        raise Unusable("malformed_key") from exc
    if isinstance(key.key, rsa.RSAPublicKey) and not RSA_BITS_MIN <= key.key.key_size <= RSA_BITS_MAX:
        raise Unusable("rsa_too_short" if key.key.key_size < RSA_BITS_MIN else "rsa_too_long")
    return kid, key


def _algorithm(entry: Mapping[str, Any], algorithms: tuple[str, ...]) -> str:
    """The one that the key names; where it names none, the only one of the issuer's that fits it."""
    named = entry.get("alg")
    fitting = [one for one in algorithms if named in (None, one) and _fits(one, entry)]
    if len(fitting) != 1:
        raise Unusable("algorithm_refused")
    return fitting[0]


def fetch_document(url: str, *, authority: Path | None = None) -> bytes:
    """
    Get a JWKS document: no redirects, no proxies from the environment, bounded in size and time.

    *authority* is a file of certificates to trust beside the public authorities; read each time, because it is renewed.
    """
    deadline = time.monotonic() + FETCH_SECONDS_MAX
    data = bytearray()
    trusted = httpx.create_ssl_context(trust_env=False)
    if authority is not None:
        trusted.load_verify_locations(authority)
    with (
        httpx.Client(follow_redirects=False, trust_env=False, timeout=2.0, verify=trusted) as client,
        client.stream("GET", url, headers={"accept": "application/json", "accept-encoding": "identity"}) as answer,
    ):
        if answer.status_code != httpx.codes.OK:
            raise Unusable("status_not_200")
        if answer.headers.get("content-encoding", "identity") != "identity":
            raise Unusable("encoded")
        for piece in answer.iter_raw():
            data += piece
            if len(data) > DOCUMENT_BYTES_MAX:
                raise Unusable("document_too_large")
            if time.monotonic() > deadline:
                raise Unusable("too_slow")
    return bytes(data)


def _fits(algorithm: str, entry: Mapping[str, Any]) -> bool:
    return entry.get("kty") == _KINDS[algorithm[:2]] and (
        algorithm not in _CURVES or entry.get("crv") == _CURVES[algorithm]
    )


def _identities(fetched: KeySet) -> dict[str, object]:
    return {kid: (key.algorithm_name, key.key) for kid, key in fetched.keys.items()}


def _reason(exc: Exception) -> str:
    # Only our own words: an issuer's answer is not for the log.
    return str(exc) if isinstance(exc, Unusable) else ""
