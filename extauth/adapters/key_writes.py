# SPDX-License-Identifier: Apache-2.0
"""
Write down what using keys leaves behind, in batches and away from requests.

When each was last used, how often one was used that has a successor, and the hash with the
newest pepper of those that still had an older one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import datetime
from typing import Final

import psycopg
import structlog

from extauth.adapters import metrics
from extauth.core.uses import Use, Uses

log = structlog.get_logger()

#: Seconds between looks at what is due; a first use is visible after this.
FLUSH_EVERY_SECONDS: Final = 5.0
#: Keys per statement.
BATCH_COUNT_MAX: Final = 1000
#: Re-hashes that wait; beyond, the next use of the key brings it again.
REHASH_COUNT_MAX: Final = 10_000

# Another process may have written the same minute; a use after rotation is added all the same.
# Locked in the order of ids, so that two processes never wait for each other.
_WRITE_USES: Final = """
with used as (
    select * from unnest(%(ids)s::text[], %(at)s::timestamptz[], %(counts)s::bigint[]) as u(key_id, at, count)
), locked as (
    select k.key_id, u.at, u.count from api_key k join used u using (key_id)
    where u.count > 0 or k.last_used_at is null or k.last_used_at < u.at - interval '50 seconds'
    order by k.key_id for update of k
)
update api_key k
set last_used_at = greatest(k.last_used_at, l.at), uses_after_rotation = k.uses_after_rotation + l.count
from locked l where k.key_id = l.key_id
"""
# Only over the hash that was verified: a key that changed meanwhile keeps what it has.
_WRITE_HASHES: Final = """
with fresh as (
    select * from unnest(%(ids)s::text[], %(old)s::bytea[], %(new)s::bytea[]) as f(key_id, old, new)
), locked as (
    select k.key_id, f.new from api_key k join fresh f on f.key_id = k.key_id and f.old = k.key_hash
    order by k.key_id for update of k
)
update api_key k set key_hash = l.new, pepper_version = %(version)s
from locked l where k.key_id = l.key_id
"""


class KeyWrites:
    """Collects from requests and writes from its own thread."""

    def __init__(self, url: str, *, clock: Callable[[], datetime], newest_pepper: int) -> None:
        self._url = url
        self._clock = clock
        self._newest_pepper = newest_pepper
        self._lock = threading.Lock()
        self._uses = Uses()
        self._rehashes: dict[str, tuple[bytes, bytes]] = {}
        self._stop = threading.Event()

    def used(self, key_id: str, now: datetime, *, is_rotated: bool) -> None:
        """Take note that a key was let through."""
        with self._lock:
            self._uses.add(key_id, now, after_rotation_count=1 if is_rotated else 0)

    def rehash(self, key_id: str, *, old: bytes, new: bytes) -> None:
        """Replace the hash *old* by *new*, made with the newest pepper."""
        with self._lock:
            if len(self._rehashes) < REHASH_COUNT_MAX:
                self._rehashes[key_id] = (old, new)

    def start(self) -> threading.Thread:
        """Write every few seconds, for ever."""
        thread = threading.Thread(target=self._run, name="key-writes", daemon=True)
        thread.start()
        return thread

    def stop(self) -> None:
        """Write what is left and end."""
        self._stop.set()
        self.flush()

    def flush(self) -> None:
        """Write all that is due; what cannot be written stays for the next time."""
        with self._lock:
            if not len(self._uses) and not self._rehashes:
                return
        taken: list[Use] = []
        hashes: dict[str, tuple[bytes, bytes]] = {}
        try:
            with psycopg.connect(self._url, autocommit=True, application_name="extauth-writes", connect_timeout=2) as connection:
                while True:
                    with self._lock:
                        taken = self._uses.take_due(self._clock(), BATCH_COUNT_MAX)
                    if not taken:
                        break
                    _write_uses(connection, taken)
                    taken = []
                with self._lock:
                    hashes, self._rehashes = self._rehashes, {}
                if hashes:
                    _write_hashes(connection, hashes, self._newest_pepper)
                    log.info("keys_rehashed", count=len(hashes), pepper_version=self._newest_pepper)
        except psycopg.Error as exc:
            log.warning("key_writes_postponed", error=type(exc).__name__)
            with self._lock:
                self._uses.give_back(taken)
                self._rehashes = {**hashes, **self._rehashes}
        with self._lock:
            lost, self._uses.lost_count = self._uses.lost_count, 0
        metrics.KEY_WRITES_LOST.inc(lost)

    def _run(self) -> None:
        while not self._stop.wait(FLUSH_EVERY_SECONDS):
            self.flush()


def _write_uses(connection: psycopg.Connection, uses: list[Use]) -> None:
    connection.execute(
        _WRITE_USES,
        {
            "ids": [use.key_id for use in uses],
            "at": [use.last_used_at for use in uses],
            "counts": [use.after_rotation_count for use in uses],
        },
    )


def _write_hashes(connection: psycopg.Connection, hashes: dict[str, tuple[bytes, bytes]], version: int) -> None:
    connection.execute(
        _WRITE_HASHES,
        {
            "ids": list(hashes),
            "old": [old for old, _ in hashes.values()],
            "new": [new for _, new in hashes.values()],
            "version": version,
        },
    )
