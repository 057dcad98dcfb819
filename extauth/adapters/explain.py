# SPDX-License-Identifier: Apache-2.0
"""
Tell whether a request would be let through and which rule says so, without sending it.

The same rules on the same state as the decision itself; only the proof of the credential is
left out, because who asks here names the key instead of presenting it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from chassis import contract
from chassis.errors import Invalid, NotFound
from extauth.core.decision import Rules, trace
from extauth.core.identity import AccountState, Ask, Identity, KeyState, Phase, Standing
from extauth.core.patterns import Patterns

_PATHS: Final = {dialect: path for path, dialect in contract.PATHS.items()}


class Known(Protocol):
    """What is needed of the directory."""

    def find(self, key_id: str) -> KeyState | None:
        """The state of a key."""

    def find_account(self, account_id: str) -> AccountState | None:
        """The state of a service account."""

    def find_project(self, tenant_id: str, project_id: str) -> Standing | None:
        """The standing of a project."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A request that nobody sends; exactly one of key, account or tenant says who would send it."""

    ask: Ask
    key_id: str | None = None
    account_id: str | None = None
    tenant_id: str | None = None
    project_id: str = "default"
    #: A token's scopes and models, where a tenant is named; None is every.
    scopes: Sequence[str] | None = None
    models: Sequence[str] | None = None


def explain(question: Question, known: Known, rules: Rules) -> dict[str, Any]:
    """Answer with `allowed`, the rule that decides, and what every rule says; raises `NotFound` and `Invalid`."""
    identity = _identity(question, known)
    steps = [
        {"phase": Phase.IDENTITY, "rule": "identity_known", "passes": True},
        *(
            {"phase": step.phase, "rule": step.rule, "passes": step.refusal is None}
            | ({"code": step.refusal.code, "message": step.refusal.message} if step.refusal is not None else {})
            for step in trace(question.ask, identity, rules)
        ),
    ]
    refused = next((step for step in steps if not step["passes"]), None)
    caller = f"{identity.key_id or 'a caller'} of tenant {identity.tenant_id}, project {identity.project_id}"
    verdict = "would be let through" if refused is None else f"would be refused by {refused['rule']}: {refused['message']}"
    return {
        "allowed": refused is None,
        "rule": None if refused is None else refused["rule"],
        "code": None if refused is None else refused["code"],
        "explanation": f"{caller}: {question.ask.path} on model {question.ask.model or '(none)'} {verdict}",
        "tenant": identity.tenant_id,
        "project": identity.project_id,
        "key_id": identity.key_id or None,
        "steps": steps,
    }


def path_of(dialect: str) -> str:
    """The path on which a dialect is spoken; raises `Invalid` for one that is not."""
    if dialect not in _PATHS:
        raise Invalid(f"dialect is {dialect!r}.", mend=f"Use one of {', '.join(_PATHS)}.")
    return _PATHS[dialect]


def _identity(question: Question, known: Known) -> Identity:
    named = [name for name in (question.key_id, question.account_id, question.tenant_id) if name is not None]
    if len(named) != 1:
        raise Invalid("Name exactly one of key_id, service_account_id and tenant.")
    if question.key_id is not None:
        state = known.find(question.key_id)
        if state is None:
            raise NotFound(f"There is no key {question.key_id!r}.", mend="See `peaje keys list`.")
        return state.identity
    if question.account_id is not None:
        account = known.find_account(question.account_id)
        if account is None:
            raise NotFound(f"There is no service account {question.account_id!r}.")
        return Identity(
            tenant_id=account.tenant_id, project_id=account.project_id, key_id=question.account_id,
            standing=account.standing, scopes=account.scopes, models=account.models,
            denied_models=account.denied_models, account_active=account.is_active,
        )  # fmt: skip
    standing = known.find_project(question.tenant_id or "", question.project_id)
    if standing is None:
        raise NotFound(f"There is no project {question.project_id!r} of tenant {question.tenant_id!r}.")
    return Identity(
        tenant_id=question.tenant_id or "", project_id=question.project_id, key_id="", standing=standing,
        scopes=None if question.scopes is None else frozenset(question.scopes),
        models=None if question.models is None else Patterns.of(question.models),
    )  # fmt: skip
