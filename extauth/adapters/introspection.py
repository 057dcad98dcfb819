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
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
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
#: Questions under way at one endpoint; more are refused at once.
IN_FLIGHT_MAX: Final = 32
_CONNECTIONS_MAX: Final = 8
#: Questions in a row without any answer after which an endpoint is left alone, and for how many seconds: who waits for it holds a
#: thread that others need.
FAILURES_MAX: Final = 3
LEFT_ALONE_SECONDS: Final = 2.0

Ask = Callable[[str], tuple[int, bytes]]
_Answer = tuple[Mapping[str, Any] | None, float]


class Introspection:
    """One introspection endpoint; safe to call from several threads."""

    def __init__(
        self,
        ask: Ask,
        *,
        issuer: str | None,
        audiences: frozenset[str] | None,
        remember_count_max: int = REMEMBER_COUNT_MAX,
        wait_seconds: float = TIMEOUT_SECONDS,
    ) -> None:
        self._ask = ask
        self._issuer = issuer
        self._audiences = audiences
        self._remember_count_max = remember_count_max
        self._wait_seconds = wait_seconds
        self._lock = threading.Lock()
        # Its own threads: a server may drip its headers for longer than any client's timeout measures.
        self._pool = ThreadPoolExecutor(_CONNECTIONS_MAX, thread_name_prefix="introspection")
        self._under_way: dict[bytes, Future[_Answer]] = {}
        self._failures = 0
        self._left_alone_until = float("-inf")
        self._remembered: tuple[OrderedDict[bytes, _Answer], ...] = (OrderedDict(), OrderedDict())

    def claims(self, token: str, now: datetime) -> Mapping[str, Any]:
        """What the issuer says of *token*; raises `Unusable` for a no, `Unavailable` for no answer."""
        digest, seconds = hashlib.sha256(token.encode("ascii")).digest(), now.timestamp()
        with self._lock:
            for table in self._remembered:
                found = table.get(digest)
                if found is not None and seconds < found[1]:
                    table.move_to_end(digest)
                    return _active(found[0])
            future = self._under_way.get(digest)
            if future is None:
                self._refuse_if_left_alone(seconds)
                try:
                    future = self._pool.submit(self._question, digest, token, now)
                except RuntimeError as exc:  # a new identity document has just closed this one
                    raise Unavailable("The identity document is being replaced.") from exc
                self._under_way[digest] = future
        try:
            return _active(future.result(self._wait_seconds)[0])
        except FutureTimeout as exc:
            raise Unavailable("The token's issuer is slow.") from exc

    def remembers(self, token: str, now: datetime) -> bool:
        """Whether *token* was good when it was last asked about, or is known not to be: no stranger's."""
        digest = hashlib.sha256(token.encode("ascii")).digest()
        with self._lock:
            good, bad = self._remembered
            found = bad.get(digest)
            return digest in good or (found is not None and now.timestamp() < found[1])

    def close(self) -> None:
        """End the threads after the questions under way."""
        self._pool.shutdown(wait=False)

    def _question(self, digest: bytes, token: str, now: datetime) -> _Answer:
        try:
            answer = self._read(*self._ask(token), now)
        except (httpx.HTTPError, Unavailable) as exc:
            with self._lock:
                self._under_way.pop(digest, None)
                # A bad answer that is quick holds nobody up.
                self._failures = 0 if isinstance(exc, Unavailable) else self._failures + 1
                if self._failures >= FAILURES_MAX:
                    self._left_alone_until = now.timestamp() + LEFT_ALONE_SECONDS
            raise Unavailable("The token's issuer does not answer.") from exc
        with self._lock:
            self._under_way.pop(digest, None)
            self._failures, self._left_alone_until = 0, float("-inf")
        self._remember(digest, *answer)
        return answer

    def _refuse_if_left_alone(self, seconds: float) -> None:
        if seconds < self._left_alone_until or len(self._under_way) >= IN_FLIGHT_MAX:
            raise Unavailable("The token's issuer is slow.")
        if self._failures >= FAILURES_MAX:
            # This question is the probe; others wait for what becomes of it.
            self._left_alone_until = seconds + LEFT_ALONE_SECONDS

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
        except Unusable as exc:
            if str(exc) == "time_malformed":
                raise Unavailable("The token's issuer gave no usable answer.") from exc
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
            self._remembered[claims is not None].pop(digest, None)
            table[digest] = (claims, until)
            while len(table) > self._remember_count_max:
                table.popitem(last=False)


def over_http(url: str, *, client_id: str, client_secret: str) -> Ask:
    """Ask with a form POST and HTTP Basic, as RFC 7662 has it; no redirects, bounded in size and time."""
    client = httpx.Client(
        follow_redirects=False, trust_env=False, timeout=TIMEOUT_SECONDS, auth=(client_id, client_secret),
        limits=httpx.Limits(max_connections=_CONNECTIONS_MAX),
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
        if answer.headers.get("content-encoding", "identity") != "identity":
            raise httpx.DecodingError("an encoding that nobody asked for")
        return answer.status_code, bytes(body)

    return ask


def _active(claims: Mapping[str, Any] | None) -> Mapping[str, Any]:
    if claims is None:
        raise Unusable("inactive")
    return claims
