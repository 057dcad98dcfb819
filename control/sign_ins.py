# SPDX-License-Identifier: Apache-2.0
"""
Who tries to sign in: how often they may ask for tokens, and what is written down of those who were refused.

In this process's memory: each process of the control plane counts for itself.
"""

from __future__ import annotations

import re
import threading
from datetime import datetime, timedelta
from typing import Final

import structlog

from chassis import keys as formats
from chassis.attempts import Attempts
from chassis.errors import PeajeError
from control import audit, operators, service_accounts
from control.act import Act
from control.store import Store

log = structlog.get_logger()

_MINUTE: Final = timedelta(minutes=1)
#: A token is good for ten minutes: an honest client asks once in that time, a fleet of it now and then together.
TOKENS_PER_CLIENT: Final = 60
#: Of one address, which many clients may share.
TOKENS_PER_ADDRESS: Final = 600
#: Entries of the audit log a minute; the next one says how many had no room.
ENTRIES_PER_MINUTE: Final = 60

_CLIENT: Final = re.compile(rf"{service_accounts.ID_PREFIX}[0-9A-Za-z]{{{formats.KEY_ID_LENGTH}}}")
#: Stands for whoever did not say a name that anybody can have.
NOBODY: Final = "-"


class SignIns:
    """Counts and remembers; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._clients = Attempts(most=TOKENS_PER_CLIENT, per=_MINUTE)
        self._addresses = Attempts(most=TOKENS_PER_ADDRESS, per=_MINUTE)
        self._entries = Attempts(most=ENTRIES_PER_MINUTE, per=_MINUTE)
        self._unlogged = 0

    def wait(self, client_id: str, address: str, now: datetime) -> timedelta:
        """Take an attempt to get a token; how long until the next one is free, zero if this one is granted."""
        with self._lock:
            wait = self._addresses.take(address, now)
            # A name that nobody can have needs no bucket: it is refused without a look at any secret.
            if wait or not _CLIENT.fullmatch(client_id):
                return wait
            return self._clients.take(client_id, now)

    def refused(self, store: Store, act: Act, *, road: str, who: str, address: str) -> None:
        """
        Write down that somebody was not let in by *road*; *who* is a name from `operator_of` or `client_of`.

        Never in the way of the answer: what cannot be written is counted, and the next entry says how many.
        """
        with self._lock:
            unlogged = self._unlogged
            if self._entries.take("", act.now):
                self._unlogged += 1
                return
            self._unlogged = 0
        seen = {"road": road, "address": address} | ({"unlogged": unlogged} if unlogged else {})
        try:
            with store.transaction(act.scope) as connection:
                audit.append(connection, act, "sign_in.refused", who, tenant_id=None, after=seen)
        except PeajeError as exc:
            log.warning("sign_in_not_recorded", reason=exc.message)
            with self._lock:
                self._unlogged += unlogged + 1


def operator_of(token: str) -> str:
    """The operator that *token* speaks of, unproven, as far as it is a token at all."""
    parsed = formats.parse_token(token)
    return operators.ID_PREFIX + parsed.token_id if parsed is not None and parsed.kind == formats.OPERATOR_TOKEN else NOBODY


def client_of(client_id: str) -> str:
    """The name that a client gave itself, as far as any client can have it."""
    return client_id if _CLIENT.fullmatch(client_id) else NOBODY
