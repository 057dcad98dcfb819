# SPDX-License-Identifier: Apache-2.0
"""Verify JWTs: the only place that knows PyJWT's verification. A verified token is remembered by its full digest."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final

from jwt import PyJWS
from jwt.exceptions import PyJWTError

from chassis.errors import Unavailable
from extauth.adapters.jwks import KeySource
from extauth.core.claims import Expected, Unusable, check_claims, check_header, take_apart

#: Verified tokens that are remembered; a signature costs a hundred times a lookup.
REMEMBER_COUNT_MAX: Final = 10_000
#: Seconds. What is verified is verified again at least this often, and at once when its issuer's keys change.
REMEMBER_SECONDS_MAX: Final = 60.0

_jws = PyJWS()


class TokenVerifier:
    """Tokens of several issuers, told apart by `iss`; safe to call from several threads."""

    def __init__(self, issuers: Mapping[str, tuple[str, Expected, KeySource]]) -> None:
        #: By `iss`: the issuer's name, what its tokens must say, its keys.
        self._issuers = issuers
        self._lock = threading.Lock()
        #: By digest: issuer, claims, until when, and the generation of the keys that it was verified with.
        self._verified: OrderedDict[bytes, tuple[str, Mapping[str, Any], float, int]] = OrderedDict()

    def verify(self, token: str, now: datetime) -> tuple[str, Mapping[str, Any]]:
        """The name of the issuer and the claims; raises `Unusable`, or `Unavailable` before an issuer's keys are known."""
        digest, seconds = hashlib.sha256(token.encode("ascii")).digest(), now.timestamp()
        with self._lock:
            found = self._verified.get(digest)
            if found is not None and seconds < found[2] and self._issuers[found[1]["iss"]][2].generation == found[3]:
                self._verified.move_to_end(digest)
                return found[0], found[1]
        parts = take_apart(token)
        issuer = parts.payload.get("iss")
        known = self._issuers.get(issuer) if isinstance(issuer, str) else None
        if known is None:
            raise Unusable("issuer_unknown")
        name, expected, source = known
        algorithm, kid = check_header(parts.header, expected)
        # Before the look-up: keys that change meanwhile must not vouch for what the last ones did.
        generation = source.generation
        try:
            key = source.find(kid)
        except LookupError as exc:
            raise Unavailable("The issuer's keys are not known yet.") from exc
        if key is None:
            raise Unusable("kid_unknown")
        if key.algorithm_name != algorithm:
            raise Unusable("algorithm_not_the_keys")
        try:
            _jws.decode(token, key=key, algorithms=[algorithm])
        except (PyJWTError, ValueError) as exc:
            raise Unusable("signature_wrong") from exc
        until = min(check_claims(parts.payload, expected, now), seconds + REMEMBER_SECONDS_MAX)
        with self._lock:
            self._verified[digest] = (name, parts.payload, until, generation)
            while len(self._verified) > REMEMBER_COUNT_MAX:
                self._verified.popitem(last=False)
        return name, parts.payload
