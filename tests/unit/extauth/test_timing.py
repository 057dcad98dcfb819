# SPDX-License-Identifier: Apache-2.0
"""
K05: the time of a refusal does not tell a wrong secret from a key that nobody has.

Nobody can measure that on a busy machine by two averages. So both are timed in turn, thousands of times; of each
the lower quartile counts, which what else runs does not reach; and one even round of several is enough, while a
hash that is left out (the same measurement shows it) makes every round uneven.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime

import pytest

from chassis import keys
from extauth.core.decision import prove_key
from extauth.core.identity import Denial, Identity, KeyState, Standing

CALLS = 3000
ROUNDS = 12
#: Of the time of a refusal. The hash alone is a good half of it.
UNEVEN_MIN = 0.15

_PEPPERS = {1: b"p" * 32}
_BODY = "peaje_live_0123456789AB_0123456789abcdefghijklmnopqrstuv"
_PARSED = keys.parse(_BODY + keys.checksum(_BODY))
_STATE = KeyState(
    identity=Identity(
        tenant_id="acme", project_id="default", key_id="0123456789AB",
        standing=Standing(tenant_active=True, project_active=True), known_at=datetime(2026, 11, 25, tzinfo=UTC),
    ),
    key_hash=b"x" * 32,
    pepper_version=1,
)  # fmt: skip

Prove = Callable[[keys.ParsedKey, KeyState | None, Mapping[int, bytes]], Identity | Denial]


def _without_the_hash(parsed: keys.ParsedKey, state: KeyState | None, peppers: Mapping[int, bytes]) -> Identity | Denial:
    """What a hurried hand would write: nothing stored, nothing to compare."""
    if state is None:
        return _UNKNOWN
    return prove_key(parsed, state, peppers)


assert _PARSED is not None
_UNKNOWN = prove_key(_PARSED, None, _PEPPERS)


def unevenness(prove: Prove) -> float:
    """How far apart the two refusals are, as a share of the longer one."""
    assert _PARSED is not None
    wrong, unknown = [], []
    for _ in range(CALLS):
        for state, times in ((_STATE, wrong), (None, unknown)):
            began = time.perf_counter_ns()
            prove(_PARSED, state, _PEPPERS)
            times.append(time.perf_counter_ns() - began)
    first, second = (sorted(times)[CALLS // 4] for times in (wrong, unknown))
    return abs(first - second) / max(first, second)


def test_a_wrong_secret_and_an_unknown_key_take_equally_long() -> None:
    """One even round is enough: noise makes rounds uneven, never even."""
    assert any(unevenness(prove_key) < UNEVEN_MIN for _ in range(ROUNDS))


def test_a_hash_that_is_left_out_would_show() -> None:
    """Or the test above could not fail."""
    assert not any(unevenness(_without_the_hash) < UNEVEN_MIN for _ in range(ROUNDS))


@pytest.mark.parametrize("state", [None, _STATE], ids=["unknown", "wrong secret"])
def test_both_compute_one_hash(state: KeyState | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason for it, without a clock."""
    hashed: list[bytes] = []
    hash_key = keys.hash_key
    monkeypatch.setattr(keys, "hash_key", lambda pepper, key: hashed.append(pepper) or hash_key(pepper, key))
    assert _PARSED is not None

    assert isinstance(prove_key(_PARSED, state, _PEPPERS), Denial)

    assert [_PEPPERS[1]] == hashed
