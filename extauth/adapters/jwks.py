# SPDX-License-Identifier: Apache-2.0
"""
An issuer's key set: fetched in the background, kept while the issuer is away.

A request waits for a fetch in two cases only, each bounded: nothing has been fetched yet, and a
key id that nobody has seen, which may be a new key. The second happens once per 30 seconds
and issuer, however many such ids arrive.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import httpx
import structlog
from cryptography.hazmat.primitives.asymmetric import rsa
from jwt import PyJWK
from jwt.exceptions import PyJWTError

from chassis.telemetry import metrics
from extauth.core.claims import Unusable, strict_object

log = structlog.get_logger()

REFRESH_SECONDS: Final = 300.0
#: A failed fetch is tried again after this.
RETRY_SECONDS: Final = 10.0
UNKNOWN_KEY_REFRESH_SECONDS: Final = 30.0
#: A set that could not be renewed is used this long.
STALE_SECONDS: Final = 24 * 3600.0
DOCUMENT_BYTES_MAX: Final = 256 * 1024
KEYS_MAX: Final = 50
#: Unknown ids that do not cause another fetch.
UNKNOWN_KEYS_MAX: Final = 1000
FETCH_SECONDS_MAX: Final = 5.0
#: Below Envoy's 500 ms for the whole decision.
WAIT_SECONDS_MAX: Final = 0.25
RSA_BITS_MIN: Final = 2048

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
        #: Counts fetches that ended, well or not; guarded by the condition.
        self._fetch_count = 0
        self._is_fetching = False
        #: The fetch that waiters for an unknown id wait for is the one after this.
        self._awaited = 0
        self._condition = threading.Condition()
        self._asked = threading.Event()
        self._unknown_refresh_at = -UNKNOWN_KEY_REFRESH_SECONDS
        self._unknown: OrderedDict[str, None] = OrderedDict()
        self._is_closed = False

    def start(self) -> None:
        """Begin to fetch, from a thread of its own."""
        threading.Thread(target=self._run, name=f"jwks-{self._name}", daemon=True).start()

    def close(self) -> None:
        """Stop fetching."""
        self._is_closed = True
        self._asked.set()

    def find(self, key_id: str) -> PyJWK | None:
        """The key with this id; None if the issuer has none or its set is too old. Raises `LookupError` while there is no set."""
        keys = self._current()
        if keys is None:
            self._wait_for_fetch(after=0)
            keys = self._current()
            if keys is None:
                raise LookupError("no key set yet")
        found = keys.get(key_id)
        if found is not None:
            return found
        awaited = self._ask_about(key_id)
        if awaited is not None:
            self._wait_for_fetch(after=awaited)
        return (self._current() or {}).get(key_id)

    def refresh(self) -> bool:
        """Fetch once, now; whether there is a new set."""
        fetched = None
        with self._condition:
            self._is_fetching = True
        try:
            fetched = KeySet(keys=self._read(self._fetch(self._url)), fetched_at=self._clock())
            log.debug("jwks_fetched", issuer=self._name, count=len(fetched.keys))
        except (httpx.HTTPError, OSError, Unusable) as exc:
            log.warning("jwks_refused", issuer=self._name, error=type(exc).__name__, reason=_reason(exc))
        metrics.JWKS_FETCHES.labels(self._name, "ok" if fetched else "failed").inc()
        with self._condition:
            if fetched is not None:
                self._set = fetched
            self._fetch_count += 1
            self._is_fetching = False
            self._condition.notify_all()
        return fetched is not None

    def _run(self) -> None:
        while not self._is_closed:
            # Cleared first: who asks from here on is answered by this fetch or by the next.
            self._asked.clear()
            wait = REFRESH_SECONDS if self.refresh() else RETRY_SECONDS
            if self._set is not None:
                metrics.JWKS_AGE_SECONDS.labels(self._name).set(self._clock() - self._set.fetched_at)
            self._asked.wait(wait)

    def _current(self) -> Mapping[str, PyJWK] | None:
        current = self._set
        if current is None or self._clock() - current.fetched_at > STALE_SECONDS:
            return None
        return current.keys

    def _ask_about(self, key_id: str) -> int | None:
        """
        Have the set fetched for an unknown id, if it is time; the number of the last fetch that is too early to know it.

        None if it is not worth waiting. Whoever comes while such a fetch is under way waits for that one.
        """
        now = self._clock()
        with self._condition:
            since = now - self._unknown_refresh_at
            if since < WAIT_SECONDS_MAX:
                return self._awaited
            if key_id in self._unknown or since < UNKNOWN_KEY_REFRESH_SECONDS:
                return None
            self._unknown_refresh_at = now
            # One that has already begun may have missed the key by an instant.
            self._awaited = self._fetch_count + (1 if self._is_fetching else 0)
            self._unknown[key_id] = None
            while len(self._unknown) > UNKNOWN_KEYS_MAX:
                self._unknown.popitem(last=False)
            self._asked.set()
            return self._awaited

    def _wait_for_fetch(self, *, after: int) -> None:
        with self._condition:
            self._condition.wait_for(lambda: self._fetch_count > after, WAIT_SECONDS_MAX)

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


def strict_object_of_keys(document: bytes) -> list[dict[str, Any]]:
    """The entries of a JWKS document; raises `Unusable` if it is none or has too many."""
    entries = strict_object(document).get("keys")
    if not isinstance(entries, list) or len(entries) > KEYS_MAX:
        raise Unusable("not_a_key_set")
    return [entry for entry in entries if isinstance(entry, dict)]


def read_key(entry: Mapping[str, Any], algorithms: tuple[str, ...]) -> tuple[str, PyJWK]:
    """A key's id and the key, bound to the one algorithm it may verify; raises `Unusable`."""
    kid, use = entry.get("kid"), entry.get("use", "sig")
    operations = entry.get("key_ops", ["verify"])
    if not isinstance(kid, str) or not kid or use != "sig" or not isinstance(operations, list) or "verify" not in operations:
        raise Unusable("not_for_signatures")
    algorithm = entry.get("alg") or next((one for one in algorithms if _fits(one, entry)), None)
    if algorithm not in algorithms or not _fits(algorithm, entry):
        raise Unusable("algorithm_refused")
    try:
        key = PyJWK(dict(entry), algorithm=algorithm)
    except (PyJWTError, ValueError, TypeError, KeyError) as exc:
        raise Unusable("malformed_key") from exc
    if isinstance(key.key, rsa.RSAPublicKey) and key.key.key_size < RSA_BITS_MIN:
        raise Unusable("rsa_too_short")
    return kid, key


def fetch_document(url: str) -> bytes:
    """Get a JWKS document: no redirects, no proxies from the environment, bounded in size and time."""
    deadline = time.monotonic() + FETCH_SECONDS_MAX
    data = bytearray()
    with (
        httpx.Client(follow_redirects=False, trust_env=False, timeout=2.0) as client,
        client.stream("GET", url, headers={"accept": "application/json", "accept-encoding": "identity"}) as answer,
    ):
        if answer.status_code != httpx.codes.OK:
            raise Unusable("status_not_200")
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


def _reason(exc: Exception) -> str:
    # Only our own words: an issuer's answer is not for the log.
    return str(exc) if isinstance(exc, Unusable) else ""
