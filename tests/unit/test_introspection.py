# SPDX-License-Identifier: Apache-2.0
"""Opaque tokens: asked about once, believed for a short while, and only what is JSON true."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from chassis.errors import Unavailable
from extauth.adapters import introspection
from extauth.adapters.introspection import Introspection
from extauth.core.claims import Unusable
from tests.provider import dump

NOW = datetime(2026, 11, 25, 12, tzinfo=UTC)
ACTIVE = {"active": True, "sub": "u", "tenant": "acme"}


class Endpoint:
    """What an endpoint answers; counts the questions, and lets the test say when they are answered."""

    def __init__(self, answer: Any = None) -> None:
        self.answer: Any = ACTIVE if answer is None else answer
        self.status = 200
        self.questions = 0
        self.may_answer = threading.Event()
        self.may_answer.set()

    def __call__(self, _token: str) -> tuple[int, bytes]:
        self.questions += 1
        self.may_answer.wait(5)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.status, dump(self.answer)


def made(endpoint: Endpoint, **settings: Any) -> Introspection:
    """An introspection that waits long enough for any machine."""
    return Introspection(endpoint, **{"issuer": None, "audiences": None, "wait_seconds": 5.0} | settings)


def test_an_active_token_is_asked_about_once_in_thirty_seconds() -> None:
    """The bound on a revocation at the provider; 30 s later it is asked about again."""
    endpoint = Endpoint()
    asked = made(endpoint)

    for seconds in (0, 1, 29):
        assert "u" == asked.claims("t", NOW + timedelta(seconds=seconds))["sub"]
    before = endpoint.questions
    asked.claims("t", NOW + timedelta(seconds=30))

    assert (1, 2) == (before, endpoint.questions)


def test_a_token_is_not_believed_beyond_its_expiry() -> None:
    """Also where that is sooner than thirty seconds, with the leeway of every other token."""
    endpoint = Endpoint({**ACTIVE, "exp": int(NOW.timestamp()) - 20})
    asked = made(endpoint)
    asked.claims("t", NOW)

    with pytest.raises(Unusable):
        asked.claims("t", NOW + timedelta(seconds=10))

    assert 2 == endpoint.questions


def test_tokens_that_begin_alike_are_two() -> None:
    """CVE-2026-35030: what is remembered is remembered of the whole token."""
    endpoint = Endpoint()
    asked = made(endpoint)
    asked.claims("a" * 200 + "b", NOW)
    endpoint.answer = {"active": False}

    with pytest.raises(Unusable):
        asked.claims("a" * 200 + "c", NOW)


@pytest.mark.parametrize(
    "answer",
    [{}, {"active": None}, {"active": "true"}, {"active": 1}, {**ACTIVE, "exp": "soon"}, [ACTIVE], httpx.ConnectError("no")],
    ids=str,
)
def test_what_is_neither_yes_nor_no_is_remembered_as_neither(answer: Any) -> None:
    """The next request asks again, and is let in if it may be."""
    endpoint = Endpoint(answer)
    asked = made(endpoint)
    with pytest.raises(Unavailable):
        asked.claims("t", NOW)

    endpoint.answer = ACTIVE

    assert "u" == asked.claims("t", NOW)["sub"]


def test_eight_who_bring_one_token_ask_one_question() -> None:
    """And all hear its answer."""
    endpoint = Endpoint()
    endpoint.may_answer.clear()
    asked = made(endpoint)
    heard: list[str] = []
    threads = [threading.Thread(target=lambda: heard.append(asked.claims("t", NOW)["sub"])) for _ in range(8)]

    for thread in threads:
        thread.start()
    endpoint.may_answer.set()
    for thread in threads:
        thread.join(10)

    assert ["u"] * 8 == heard
    assert 1 == endpoint.questions


def test_an_endpoint_that_does_not_answer_is_left_alone_for_a_moment() -> None:
    """Who waits for it holds a thread that others need. After the moment one question tries whether it is back."""
    endpoint = Endpoint(httpx.ReadTimeout("no"))
    asked = made(endpoint)
    later = NOW + timedelta(seconds=introspection.LEFT_ALONE_SECONDS)

    def ask(token: str, now: datetime) -> None:
        with pytest.raises(Unavailable):
            asked.claims(token, now)

    for number in range(introspection.FAILURES_MAX + 5):
        ask(f"t{number}", NOW)
    while_alone = endpoint.questions
    ask("probe", later)
    ask("not a probe", later)
    probed = endpoint.questions
    endpoint.answer = ACTIVE

    assert (introspection.FAILURES_MAX, introspection.FAILURES_MAX + 1) == (while_alone, probed)
    assert "u" == asked.claims("t", later + timedelta(seconds=introspection.LEFT_ALONE_SECONDS))["sub"]


def test_questions_under_way_are_bounded() -> None:
    """The bound, and one more."""
    endpoint = Endpoint()
    endpoint.may_answer.clear()
    asked = made(endpoint, wait_seconds=0.0)

    for number in range(introspection.IN_FLIGHT_MAX + 1):
        with pytest.raises(Unavailable):
            asked.claims(f"t{number}", NOW)

    assert introspection.IN_FLIGHT_MAX == len(asked._under_way)
    endpoint.may_answer.set()


def test_made_up_tokens_do_not_push_out_good_ones() -> None:
    """Yes and no are bounded apart."""
    endpoint = Endpoint()
    asked = made(endpoint, remember_count_max=2)
    asked.claims("good", NOW)
    endpoint.answer = {"active": False}

    for number in range(5):
        with pytest.raises(Unusable):
            asked.claims(f"made-up-{number}", NOW)

    assert "u" == asked.claims("good", NOW)["sub"]
    assert [1, 2] == [len(table) for table in asked._remembered]


def test_a_good_token_is_remembered_as_no_strangers_when_it_must_be_asked_about_again() -> None:
    """A no only for as long as it is believed; what was never asked about, never."""
    endpoint = Endpoint()
    asked = made(endpoint)
    asked.claims("good", NOW)
    endpoint.answer = {"active": False}
    with pytest.raises(Unusable):
        asked.claims("bad", NOW)
    later = NOW + timedelta(seconds=introspection.REMEMBER_SECONDS_MAX)

    assert (True, True, False) == tuple(asked.remembers(token, NOW) for token in ("good", "bad", "new"))
    assert (True, False, False) == tuple(asked.remembers(token, later) for token in ("good", "bad", "new"))


@pytest.mark.parametrize(("claims", "is_let_in"), [({"iss": "a"}, True), ({"iss": "b"}, False), ({}, False)])
def test_an_answer_for_another_issuer_is_a_no(claims: dict[str, str], is_let_in: bool) -> None:
    """Where the document names one."""
    asked = made(Endpoint({**ACTIVE, **claims}), issuer="a")

    if is_let_in:
        assert "u" == asked.claims("t", NOW)["sub"]
    else:
        with pytest.raises(Unusable):
            asked.claims("t", NOW)
