# SPDX-License-Identifier: Apache-2.0
"""The decision: each rule at its boundary, and the order among rules."""

from __future__ import annotations

import ipaddress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from chassis import keys
from extauth.core.credential import INVALID_KEY
from extauth.core.decision import CHECKS, REMEMBER_FOR, Rules, decide, memorable_for, prove_key, trace, usable_models
from extauth.core.identity import Ask, Denial, Identity, KeyState, Phase, Standing, is_within
from extauth.core.patterns import NOTHING, Patterns
from extauth.core.policy import compile_policy

NOW = datetime(2026, 11, 25, 12, tzinfo=UTC)
INSTANT = timedelta(microseconds=1)
GOOD = Standing(tenant_active=True, project_active=True, labels={"tier": "gold"})
IDENTITY = Identity(tenant_id="acme", project_id="default", key_id="0123456789AB", standing=GOOD)
ASK = Ask(
    dialect="openai.chat", model="tiny", path="/v1/chat/completions", host="a.example", address="10.1.2.3", now=NOW
)
RULES = Rules(served=frozenset({"tiny", "large"}))
PARSED = keys.parse("peaje_live_0123456789AB_0123456789abcdefghijklmnopqrstuv1fTxeV")
PEPPERS = {1: b"a" * 32, 2: b"b" * 32}


def code(identity: Identity, ask: Ask = ASK, rules: Rules = RULES) -> str:
    """The refusal's code, or ok."""
    assert PARSED is not None
    decided = decide(ask, PARSED, identity, rules)
    return decided.refusal.code if isinstance(decided, Denial) else "ok"


def networks(*texts: str) -> tuple[Any, ...]:
    """Parsed networks."""
    return tuple(ipaddress.ip_network(text) for text in texts)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, "ok"),
        ({"expires_at": NOW + INSTANT}, "ok"),
        ({"expires_at": NOW}, "invalid_api_key"),
        ({"expires_at": NOW, "claims": {"sub": "x"}}, "invalid_token"),
        ({"revoked_at": NOW + INSTANT}, "ok"),
        ({"revoked_at": NOW}, "invalid_api_key"),
        ({"is_active": False}, "key_disabled"),
        ({"account_active": False}, "service_account_suspended"),
        ({"standing": Standing(tenant_active=False, project_active=True)}, "tenant_suspended"),
        ({"standing": Standing(tenant_active=True, project_active=False)}, "project_suspended"),
        ({"networks": networks("10.0.0.0/8")}, "ok"),
        ({"networks": networks("10.1.2.3/32", "::1/128")}, "ok"),
        ({"networks": networks("10.1.2.4/32")}, "address_not_allowed"),
        ({"networks": ()}, "address_not_allowed"),
        ({"scopes": frozenset({"inference"})}, "ok"),
        ({"scopes": frozenset({"embeddings", "models"})}, "scope_not_allowed"),
        ({"scopes": frozenset()}, "scope_not_allowed"),
        ({"models": Patterns.of(["tiny"])}, "ok"),
        ({"models": Patterns.of(["t*y"])}, "ok"),
        ({"models": Patterns.of(["large"])}, "model_not_allowed"),
        ({"models": NOTHING}, "model_not_allowed"),
        ({"models": Patterns.of(["*"]), "denied_models": Patterns.of(["tin*"])}, "model_not_allowed"),
    ],
)
def test_each_attribute_decides_at_its_boundary(change: dict[str, Any], expected: str) -> None:
    """Null is every, empty is none, deny wins, a moment is over when it has come."""
    assert expected == code(replace(IDENTITY, **change))


def test_who_is_over_learns_nothing_else() -> None:
    """A revoked key of a suspended tenant reads like one that never was; the first rule in order decides."""
    over = replace(
        IDENTITY, revoked_at=NOW, is_active=False, standing=Standing(tenant_active=False, project_active=False)
    )

    assert "invalid_api_key" == code(over)


def test_a_model_that_is_not_served_is_404_whoever_asks() -> None:
    """Also for a key that may use every model."""
    assert "model_not_found" == code(IDENTITY, ASK._replace(model="Tiny"))


@pytest.mark.parametrize(
    ("address", "expected"),
    [("10.1.2.3", True), ("::ffff:10.1.2.3", True), ("11.0.0.1", False), ("::1", False), ("", False), ("a pipe", False)],
)
def test_an_address_is_within_its_network_however_it_arrives(address: str, expected: bool) -> None:
    """IPv4 on an IPv6 socket is IPv4; what is no address is nowhere."""
    assert expected == is_within(address, networks("10.0.0.0/8"))


def test_the_trace_says_what_every_rule_says_and_its_first_no_is_the_decision() -> None:
    """Explanation and decision come from one table."""
    identity = replace(IDENTITY, is_active=False, models=NOTHING)

    steps = trace(ASK, identity, RULES)

    assert [name for _, name, _ in CHECKS] == [step.rule for step in steps]
    refused = [step.refusal.code for step in steps if step.refusal is not None]
    assert ["key_disabled", "model_not_allowed"] == refused
    assert refused[0] == code(identity)


def test_a_denied_credential_is_the_answer_whatever_else_holds() -> None:
    """Phases stop at the first no."""
    denial = Denial(phase=Phase.CREDENTIAL, rule="missing", refusal=INVALID_KEY)

    assert denial is decide(ASK, denial, IDENTITY, RULES)


def test_a_key_is_proven_by_its_hash_and_nothing_else() -> None:
    """The stored hash presented as a key, another key's hash, another pepper: no."""
    assert PARSED is not None
    state = KeyState(identity=IDENTITY, key_hash=keys.hash_key(PEPPERS[1], PARSED.key), pepper_version=1)

    assert IDENTITY is prove_key(PARSED, state, PEPPERS)
    for wrong in (replace(state, key_hash=b"x" * 32), replace(state, pepper_version=2), None):
        denied = prove_key(PARSED, wrong, PEPPERS)
        assert isinstance(denied, Denial)
        assert "invalid_api_key" == denied.refusal.code


def test_a_key_whose_pepper_is_missing_is_neither_good_nor_bad() -> None:
    """503, as for everything that is ours to mend; nobody is told that a good key were wrong."""
    assert PARSED is not None
    state = KeyState(identity=IDENTITY, key_hash=keys.hash_key(PEPPERS[1], PARSED.key), pepper_version=9)

    denied = prove_key(PARSED, state, PEPPERS)

    assert isinstance(denied, Denial)
    assert ("pepper_missing", 503) == (denied.rule, denied.refusal.status)


def test_usable_models_are_those_a_request_would_pass_with() -> None:
    """The list of models and the decision agree."""
    identity = replace(IDENTITY, models=Patterns.of(["*"]), denied_models=Patterns.of(["large"]))

    assert ["tiny"] == usable_models(identity, RULES.served)


@pytest.mark.parametrize(
    ("change", "rules", "expected"),
    [
        ({}, RULES, REMEMBER_FOR),
        ({"known_at": NOW - timedelta(seconds=2)}, RULES, timedelta(seconds=3)),
        ({"known_at": NOW - timedelta(seconds=200)}, RULES, timedelta(0)),
        ({"expires_at": NOW + timedelta(seconds=1)}, RULES, timedelta(seconds=1)),
        ({"networks": networks("10.0.0.0/8")}, RULES, timedelta(0)),
        ({"is_rotated": True}, RULES, timedelta(0)),
        ({}, replace(RULES, policies=(compile_policy(name="a", expression="model == 'x'", refuses_when=True),)), REMEMBER_FOR),
        ({}, replace(RULES, policies=(compile_policy(name="a", expression="time.getHours() == 5", refuses_when=True),)), timedelta(0)),
        ({}, replace(RULES, policies=(compile_policy(name="a", expression="address == 'x'", refuses_when=True),)), timedelta(0)),
    ],
)  # fmt: skip
def test_only_what_the_lane_knows_may_be_remembered(change: dict[str, Any], rules: Rules, expected: timedelta) -> None:
    """Ages add up to the bound; an address, a time or a counted use is asked for each time."""
    assert expected == memorable_for(ASK, replace(IDENTITY, **change), rules)


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("a*c", "abc", True), ("a*c", "ac", True), ("a*c", "acb", False), ("*", "", True), ("a*a", "a", False),
        ("a*b*c", "a-b-b-c", True), ("a*b*c", "a-c-b", False), ("a.c", "abc", False), ("[ab]", "a", False),
        ("llama-*", "Llama-3", False), ("**", "x", True), ("ab*bc", "abc", False), ("a?c", "abc", False),
    ],
)  # fmt: skip
def test_only_the_star_is_special(pattern: str, name: str, expected: bool) -> None:
    """It covers any run, also an empty one; parts do not overlap."""
    assert expected == Patterns.of([pattern]).match(name)
