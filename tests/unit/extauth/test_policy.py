# SPDX-License-Identifier: Apache-2.0
"""Policies: what is refused at load, and what each answers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from chassis.errors import Invalid
from extauth.core.policy import EXPRESSION_LENGTH_MAX, compile_policy
from tests.unit.extauth.test_decision import ASK, IDENTITY


@pytest.mark.parametrize(
    "expression",
    [
        "model ==", "nosuch == 1", "1 == 1", "model", "size(model)", "scopes.exists(s, s == 'a')", "scopes.all(model, model == 'a')",
        "scopes.map(model, model) == scopes", "open(model)", "model == '" + "x" * EXPRESSION_LENGTH_MAX + "'",
    ],
)  # fmt: skip
def test_a_policy_that_cannot_be_meant_is_refused_at_load(expression: str) -> None:
    """Syntax, unknown names, constants, what is not a question, loops, and length."""
    with pytest.raises(Invalid):
        compile_policy(name="p", expression=expression, refuses_when=True)


@pytest.mark.parametrize(
    ("expression", "refuses_when", "is_refused"),
    [
        ("model == 'tiny'", True, True), ("model == 'large'", True, False),
        ("model == 'tiny'", False, False), ("model == 'large'", False, True),
        ("within(address, '10.0.0.0/8')", False, False), ("within(address, '192.168.0.0/16')", False, True),
        ("labels.tier == 'gold'", False, False), ("time.getHours() == 12", True, True), ("key == '0123456789AB'", True, True),
        ("'inference' in scopes", False, True), ("host == 'a.example' && tenant != 'other'", True, True),
        # Errors refuse, whichever way the policy is written.
        ("labels.none == 'x'", True, True), ("labels.none == 'x'", False, True), ("claims.a.b == 1", True, True),
        ("within(address, model)", True, True), ("model.matches('(')", False, True),
    ],
)  # fmt: skip
def test_a_policy_refuses_where_it_says_so_or_fails(expression: str, refuses_when: bool, is_refused: bool) -> None:
    """`deny` where true, `allow` where false, and both where the question cannot be answered."""
    policy = compile_policy(name="p", expression=expression, refuses_when=refuses_when, message="Not now.")

    refusal = policy.refusal(ASK, IDENTITY)

    assert is_refused == (refusal is not None)
    if refusal is not None:
        assert (403, "policy_denied", "Not now.") == (refusal.status, refusal.code, refusal.message)


def test_an_answer_that_is_neither_true_nor_false_refuses() -> None:
    """What an expression yields may depend on a claim's type."""
    policy = compile_policy(name="p", expression="claims.flag", refuses_when=True)

    assert policy.refusal(ASK, replace(IDENTITY, claims={"flag": "no"})) is not None
    assert policy.refusal(ASK, replace(IDENTITY, claims={"flag": False})) is None
