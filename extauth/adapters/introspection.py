# SPDX-License-Identifier: Apache-2.0
"""
Ask an issuer what its opaque token is (RFC 7662), and remember it briefly.

Positive only where the answer says JSON `true`. Anything that is neither a yes nor a no is
`Unavailable`: extauth answers 503 and remembers nothing.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, Final

import httpx

from chassis.errors import Unavailable
from extauth.core.claims import Unusable, check_times, strict_object

#: Seconds. An answer is used no longer than this, and no longer than the token lives.
REMEMBER_SECONDS_MAX: Final = 30.0
REMEMBER_COUNT_MAX: Final = 10_000
ANSWER_BYTES_MAX: Final = 64 * 1024
#: Below Envoy's 500 ms for the whole decision.
TIMEOUT_SECONDS: Final = 0.35
#: Questions at a time; more would take all of extauth's threads while an issuer is slow.
IN_FLIGHT_MAX: Final = 2

Ask = Callable[[str], tuple[int, bytes]]


class Introspection:
    """One introspection endpoint; safe to call from several threads."""

    def __init__(self, ask: Ask, *, issuer: str | None, audiences: frozenset[str] | None) -> None:
        self._ask = ask
        self._issuer = issuer
        self._audiences = audiences
        self._lock = threading.Lock()
        self._slots = threading.BoundedSemaphore(IN_FLIGHT_MAX)
        self._remembered: tuple[OrderedDict[bytes, tuple[Mapping[str, Any] | None, float]], ...] = (
            OrderedDict(),
            OrderedDict(),
        )

    def claims(self, token: str, now: datetime) -> Mapping[str, Any]:
        """What the issuer says of *token*; raises `Unusable` for a no, `Unavailable` for no answer."""
        digest, seconds = hashlib.sha256(token.encode("ascii")).digest(), now.timestamp()
        with self._lock:
            for table in self._remembered:
                found = table.get(digest)
                if found is not None and seconds < found[1]:
                    table.move_to_end(digest)
                    return _active(found[0])
        if not self._slots.acquire(blocking=False):
            raise Unavailable("The token's issuer is slow.")
        try:
            status, body = self._ask(token)
        except httpx.HTTPError as exc:
            raise Unavailable("The token's issuer does not answer.") from exc
        finally:
            self._slots.release()
        claims, until = self._read(status, body, now)
        self._remember(digest, claims, until)
        return _active(claims)

    def _read(self, status: int, body: bytes, now: datetime) -> tuple[Mapping[str, Any] | None, float]:
        if status != httpx.codes.OK or len(body) > ANSWER_BYTES_MAX:
            raise Unavailable("The token's issuer does not answer.")
        try:
            answer = strict_object(body)
        except Unusable as exc:
            raise Unavailable("The token's issuer gave no usable answer.") from exc
        active, latest = answer.get("active"), now.timestamp() + REMEMBER_SECONDS_MAX
        if active is False:
            return None, latest
        if active is not True:
            raise Unavailable("The token's issuer gave no usable answer.")
        try:
            until = min(latest, check_times(answer, now)) if "exp" in answer else latest
            self._check(answer)
        except Unusable:
            return None, latest
        return answer, until

    def _check(self, answer: Mapping[str, Any]) -> None:
        if self._issuer is not None and answer.get("iss") != self._issuer:
            raise Unusable("issuer_wrong")
        if self._audiences is not None:
            audience = answer.get("aud")
            audiences = [audience] if isinstance(audience, str) else audience
            if not isinstance(audiences, list) or self._audiences.isdisjoint(map(str, audiences)):
                raise Unusable("audience_wrong")

    def _remember(self, digest: bytes, claims: Mapping[str, Any] | None, until: float) -> None:
        # Yes and no apart, so that a flood of garbage cannot push out good tokens.
        table = self._remembered[claims is None]
        with self._lock:
            table[digest] = (claims, until)
            while len(table) > REMEMBER_COUNT_MAX:
                table.popitem(last=False)


def over_http(url: str, *, client_id: str, client_secret: str) -> Ask:
    """Ask with a form POST and HTTP Basic, as RFC 7662 has it; no redirects, bounded in size and time."""
    client = httpx.Client(
        follow_redirects=False, trust_env=False, timeout=TIMEOUT_SECONDS, auth=(client_id, client_secret),
        limits=httpx.Limits(max_connections=IN_FLIGHT_MAX),
    )  # fmt: skip

    def ask(token: str) -> tuple[int, bytes]:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        body = bytearray()
        form = {"token": token, "token_type_hint": "access_token"}
        with client.stream("POST", url, data=form, headers={"accept": "application/json", "accept-encoding": "identity"}) as answer:
            for piece in answer.iter_raw():
                body += piece
                if len(body) > ANSWER_BYTES_MAX or time.monotonic() > deadline:
                    raise httpx.ReadTimeout("the answer is too long or too slow")
        return answer.status_code, bytes(body)

    return ask


def _active(claims: Mapping[str, Any] | None) -> Mapping[str, Any]:
    if claims is None:
        raise Unusable("inactive")
    return claims
