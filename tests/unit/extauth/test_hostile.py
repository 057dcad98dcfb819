# SPDX-License-Identifier: Apache-2.0
"""Hostile requests against the pure decision."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from chassis import keys
from chassis.contract import PATHS
from extauth.core.credential import INVALID_KEY, find_credential
from extauth.core.decision import Rules, decide, prove_key
from extauth.core.identity import Ask, Denial, Identity, Phase
from tests.hostile import callers as every
from tests.hostile.rows import Row, fill, load

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
PEPPER = bytes(range(32))
CALLERS = every.make()
STORED = {caller.key_id: caller.stored(PEPPER, NOW) for caller in CALLERS.values()}
SPELLINGS = every.spellings(CALLERS) | {"stored_hash": keys.hash_key(PEPPER, CALLERS["good"].key).hex()}
#: As the servicer says of a token that no issuer is configured for.
NO_ISSUER = Denial(phase=Phase.IDENTITY, rule="issuer_unknown", refusal=INVALID_KEY)


@pytest.mark.parametrize("row", load("function"), ids=lambda row: row.id)
def test_the_decision_gives_each_hostile_request_what_it_must_get(row: Row) -> None:
    """Status and code, or the very caller that it must be taken for."""
    expected = row.expected["function"]
    path = fill(row.path, SPELLINGS).partition("?")[0]
    ask = Ask(dialect=PATHS[path], model=row.model, path=path, host=row.host, address=row.address, now=NOW)

    credential = find_credential(row.header_bytes(SPELLINGS))
    identity: Identity | Denial = NO_ISSUER
    if isinstance(credential, keys.ParsedKey):
        identity = prove_key(credential, STORED.get(credential.key_id), {1: PEPPER})
    answer = decide(ask, credential, identity, Rules(served=frozenset({"tiny"})))

    if isinstance(answer, Denial):
        assert ([answer.refusal.status], answer.refusal.code) == (list(expected.status), expected.code), row.title
    else:
        assert ([200], CALLERS[expected.caller or ""].key_id) == (list(expected.status), answer.key_id), row.title
