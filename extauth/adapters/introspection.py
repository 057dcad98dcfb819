# SPDX-License-Identifier: Apache-2.0
"""
Ask an introspection endpoint about opaque tokens (RFC 7662), and remember its answers for a short while.

An answer that did not come, or is none, is `Unavailable`: the caller is told to try again, and nothing
is remembered. An endpoint that keeps failing is left alone for a moment, so that who waits for it does
not hold up those who need not.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from datetime import datetime, timedelta
from typing import Any, Final

import structlog

from chassis.errors import Unavailable
from chassis.refusals import Refusal
from extauth.core.issuers import Introspector
from extauth.core.token import Bearer, check_introspection

log = structlog.get_logger()

#: An answer is believed this long, or until the token expires: the bound on a revocation at the provider.
REMEMBERED_FOR: Final = timedelta(seconds=30)
#: Active ones and others are bounded apart: made-up tokens cannot push out good ones.
ACTIVE_MAX: Final = 10_000
INACTIVE_MAX: Final = 10_000
#: Longest that a request waits. Envoy waits 500 ms for the whole decision.
WAIT_SECONDS: Final = 0.3
#: Questions under way at one endpoint; more are refused at once.
IN_FLIGHT_MAX: Final = 32
_THREADS: Final = 8
#: Failures in a row after which the endpoint is left alone, and for how long.
FAILURES_MAX: Final = 3
LEFT_ALONE_FOR: Final = timedelta(seconds=2)

_Answer = Bearer | Refusal


class Introspection:
    """Asks one endpoint; safe to use from several threads."""

    def __init__(
        self,
        introspector: Introspector,
        ask: Callable[[str], dict[str, Any]],
        *,
        active_max: int = ACTIVE_MAX,
        inactive_max: int = INACTIVE_MAX,
        wait_seconds: float = WAIT_SECONDS,
    ) -> None:
        self.introspector = introspector
        self._ask = ask
        self._wait_seconds = wait_seconds
        self._lock = threading.Lock()
        self._active: OrderedDict[bytes, tuple[Bearer, datetime]] = OrderedDict()
        self._inactive: OrderedDict[bytes, tuple[Refusal, datetime]] = OrderedDict()
        self._active_max = active_max
        self._inactive_max = inactive_max
        self._under_way: dict[bytes, Future[_Answer]] = {}
        self._failures = 0
        self._left_alone_until: datetime | None = None
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="introspection")

    def find(self, text: str, now: datetime) -> _Answer:
        """Whom *text* stands for, or why nobody; raises `Unavailable`."""
        # The whole token: two that begin alike are two.
        digest = hashlib.sha256(text.encode("ascii")).digest()
        with self._lock:
            remembered = self._remembered(digest, now)
            if remembered is not None:
                return remembered
            future = self._under_way.get(digest)
            if future is None:
                self._refuse_if_left_alone(now)
                if len(self._under_way) >= IN_FLIGHT_MAX:
                    raise Unavailable("Too many questions to the introspection endpoint are under way.")
                future = self._pool.submit(self._answer, digest, text, now)
                self._under_way[digest] = future
        try:
            return future.result(self._wait_seconds)
        except FutureTimeoutError as exc:
            raise Unavailable("The introspection endpoint did not answer in time.") from exc

    def stop(self) -> None:
        """End the threads after the questions under way."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def __len__(self) -> int:
        return len(self._active) + len(self._inactive)

    def _answer(self, digest: bytes, text: str, now: datetime) -> _Answer:
        try:
            answer = check_introspection(self._ask(text), self.introspector, now=now)
            if answer is None:
                raise Unavailable("it does not say whether the token is active")
        except Unavailable as exc:
            log.warning("introspection_failed", source=self.introspector.name, reason=exc.message)
            with self._lock:
                self._under_way.pop(digest, None)
                self._failures += 1
                if self._failures >= FAILURES_MAX:
                    self._left_alone_until = now + LEFT_ALONE_FOR
            raise
        with self._lock:
            self._under_way.pop(digest, None)
            self._failures = 0
            self._left_alone_until = None
            self._remember(digest, answer, now)
        return answer

    def _refuse_if_left_alone(self, now: datetime) -> None:
        if self._left_alone_until is None:
            return
        if now < self._left_alone_until:
            raise Unavailable("The introspection endpoint does not answer.")
        # This question is the probe; others wait for what becomes of it.
        self._left_alone_until = now + LEFT_ALONE_FOR

    def _remembered(self, digest: bytes, now: datetime) -> _Answer | None:
        for table in (self._active, self._inactive):
            found = table.get(digest)
            if found is not None and now < found[1]:
                table.move_to_end(digest)
                return found[0]
        return None

    def _remember(self, digest: bytes, answer: _Answer, now: datetime) -> None:
        self._active.pop(digest, None)
        self._inactive.pop(digest, None)
        until = now + REMEMBERED_FOR
        if isinstance(answer, Refusal):
            self._inactive[digest] = (answer, until)
        else:
            ends_at = until if answer.expires_at is None else min(until, answer.expires_at)
            self._active[digest] = (answer, ends_at)
        while len(self._active) > self._active_max:
            self._active.popitem(last=False)
        while len(self._inactive) > self._inactive_max:
            self._inactive.popitem(last=False)
