# SPDX-License-Identifier: Apache-2.0
"""
The keys of an issuer, fetched in the background and remembered.

A request waits for the network in two cases only, both bounded: before the first set is here, and when
its key id is new (an issuer that has just begun to sign with it). What is unknown after that is known
to be unknown. An issuer that does not answer costs nothing but the age of its keys, up to a day.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from typing import Any, Final, Protocol

import structlog

from chassis.errors import Unavailable
from extauth.adapters.jose import VerificationKey, parse_set
from extauth.core.issuers import Issuer

log = structlog.get_logger()

REFRESH_EVERY: Final = timedelta(minutes=5)
#: After a fetch that failed, before the next; the first set is tried for more often.
RETRY_AFTER: Final = timedelta(seconds=30)
FIRST_RETRY_AFTER: Final = timedelta(seconds=1)
#: Fetches that unknown key ids may cause: anybody can make those up.
UNKNOWN_KID_FETCH_EVERY: Final = timedelta(seconds=30)
#: An id that a fetch did not bring is not asked for again.
UNKNOWN_KID_FOR: Final = timedelta(minutes=5)
UNKNOWN_KIDS_MAX: Final = 1000
#: Keys of an issuer that does not answer are believed this long.
STALE_FOR: Final = timedelta(hours=24)
#: Longest that a request waits. Envoy waits 500 ms for the whole decision.
WAIT_SECONDS: Final = 0.25
FETCH_SECONDS: Final = 5.0


class Keys(Protocol):
    """Where the keys of an issuer are."""

    @property
    def generation(self) -> int:
        """Another number after each change: what was proven with keys of the last one is to be proven again."""

    def find(self, kid: str, now: datetime) -> VerificationKey | None:
        """The key called *kid*; raises `Unavailable` while no keys are known."""

    def stop(self) -> None:
        """End what goes on in the background."""


class FixedKeys:
    """Keys that stand in the identity document."""

    generation = 0

    def __init__(self, keys: Mapping[str, VerificationKey]) -> None:
        self._keys = keys

    def find(self, kid: str, now: datetime) -> VerificationKey | None:
        """The key called *kid*."""
        del now
        return self._keys.get(kid)

    def stop(self) -> None:
        """Nothing goes on."""


class FetchedKeys:
    """Keys behind a URL. One thread fetches; requests read what it has brought."""

    def __init__(
        self,
        issuer: Issuer,
        fetch: Callable[[], dict[str, Any]],
        *,
        clock: Callable[[], datetime],
        wait_seconds: float = WAIT_SECONDS,
    ) -> None:
        self._issuer = issuer
        self._fetch = fetch
        self._clock = clock
        self._wait_seconds = wait_seconds
        self._changed = threading.Condition()
        self._keys: Mapping[str, VerificationKey] = {}
        self._fetched_at: datetime | None = None
        self._generation = 0
        #: Fetches that have ended, well or not; the one that requests wait for; whether one goes on.
        self._rounds = 0
        self._wanted_round = 0
        self._is_fetching = False
        self._is_stopped = False
        #: False once somebody has waited in vain: an issuer that is slow is not waited for again.
        self._is_prompt = True
        self._last_caused: datetime | None = None
        self._unknown: OrderedDict[str, datetime] = OrderedDict()

    def start(self) -> None:
        """Fetch now, and again every five minutes, from a daemon thread."""
        threading.Thread(target=self._run, name="jwks", daemon=True).start()

    def stop(self) -> None:
        """End the thread after the fetch under way."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()

    @property
    def generation(self) -> int:
        """Grows when the set changes or is no longer believed."""
        return self._generation

    def find(self, kid: str, now: datetime) -> VerificationKey | None:
        """The key called *kid*, None if the issuer has none; raises `Unavailable` while it has said nothing."""
        with self._changed:
            if self._fetched_at is None:
                self._wait_until(self._next_round())
            if not self._is_believed(now):
                raise Unavailable("No keys of the issuer are known.")
            key = self._keys.get(kid)
            if key is not None or not self._is_fetched_for(kid, now):
                return key
            if not self._wait_until(self._wanted_round):
                raise Unavailable("The issuer is asked for its keys right now.")
            key = self._keys.get(kid)
            if key is None:
                self._remember_unknown(kid, now)
            return key

    def refresh(self) -> None:
        """Fetch once; a set that is not one, or has no usable key, leaves the last one in force."""
        with self._changed:
            self._is_fetching = True
        try:
            document = self._fetch()
            parsed = parse_set(document, algorithms=self._issuer.algorithms)
            if isinstance(parsed, str):
                raise Unavailable(parsed)
            if not parsed.keys:
                raise Unavailable("it has no usable key")
        except Unavailable as exc:
            log.warning("jwks_refused", issuer=self._issuer.issuer, reason=exc.message)
            with self._changed:
                self._end_round()
            return
        for fault in parsed.faults:
            log.warning("jwk_refused", issuer=self._issuer.issuer, reason=fault)
        with self._changed:
            if parsed.keys != self._keys:
                log.info("jwks_changed", issuer=self._issuer.issuer, count=len(parsed.keys))
                self._keys = parsed.keys
                self._generation += 1
                self._unknown.clear()
            self._fetched_at = self._clock()
            self._is_prompt = True
            self._end_round()

    def _run(self) -> None:
        while True:
            began = self._clock()
            self.refresh()
            with self._changed:
                pause = self._pause(is_good=self._fetched_at is not None and self._fetched_at >= began)
                self._changed.wait_for(
                    lambda: self._rounds < self._wanted_round or self._is_stopped, pause.total_seconds()
                )
                if self._is_stopped:
                    return

    def _pause(self, *, is_good: bool) -> timedelta:
        if is_good:
            return REFRESH_EVERY
        return RETRY_AFTER if self._fetched_at is not None else FIRST_RETRY_AFTER

    def _is_believed(self, now: datetime) -> bool:
        if self._fetched_at is None or now - self._fetched_at < STALE_FOR:
            return self._fetched_at is not None
        if self._keys:
            log.error("jwks_too_old", issuer=self._issuer.issuer)
            self._keys = {}
            self._generation += 1
        return False

    def _is_fetched_for(self, kid: str, now: datetime) -> bool:
        """Whether a fetch is on its way that may bring *kid*: one that others have caused, or a new one, if it is time."""
        since = self._unknown.get(kid)
        if since is not None and now - since < UNKNOWN_KID_FOR:
            self._unknown.move_to_end(kid)
            return False
        if self._rounds < self._wanted_round:
            return True
        if self._last_caused is not None and now - self._last_caused < UNKNOWN_KID_FETCH_EVERY:
            return False
        self._last_caused = now
        self._wanted_round = self._next_round()
        self._changed.notify_all()
        return True

    def _next_round(self) -> int:
        """The first fetch that begins from now on."""
        return self._rounds + (2 if self._is_fetching and self._fetched_at is not None else 1)

    def _wait_until(self, round_number: int) -> bool:
        if self._is_prompt and not self._changed.wait_for(lambda: self._rounds >= round_number, self._wait_seconds):
            self._is_prompt = False
        return self._rounds >= round_number

    def _end_round(self) -> None:
        self._rounds += 1
        self._is_fetching = False
        self._changed.notify_all()

    def _remember_unknown(self, kid: str, now: datetime) -> None:
        self._unknown[kid] = now
        while len(self._unknown) > UNKNOWN_KIDS_MAX:
            self._unknown.popitem(last=False)
