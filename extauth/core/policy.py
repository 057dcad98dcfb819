# SPDX-License-Identifier: Apache-2.0
"""
Attribute policies: CEL expressions of the operator, compiled once, asked for each request.

A policy can only take away: `deny` refuses where it is true, `allow` where it is false. One
that fails while it is asked, or answers anything but true or false, refuses.

The cost of a question is bounded by the length of the expression and of what it reads: loops
over lists are refused at load, and regular expressions match in linear time.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import cel

from chassis.errors import Invalid
from chassis.refusals import Refusal
from extauth.core.identity import Ask, Identity, Standing, is_within

#: Characters. Far above any policy that a person can review.
EXPRESSION_LENGTH_MAX: Final = 2000
MESSAGE_LENGTH_MAX: Final = 300
MESSAGE_DEFAULT: Final = "A policy does not allow this request."

VARIABLES: Final = (
    "model", "path", "host", "dialect", "address", "time", "tenant", "project", "labels", "key", "scopes", "claims",
)
#: Differ between two requests with the same credential, dialect and model.
_FLEETING: Final = frozenset({"host", "address", "time"})
#: Everything that an expression may call: CEL's operators, tests on text, parts of a time, and `within`.
_FUNCTIONS: Final = frozenset({
    "_&&_", "_||_", "!_", "_?_:_", "_==_", "_!=_", "_<_", "_<=_", "_>_", "_>=_", "@in", "_[_]", "_+_", "_-_", "_*_", "_/_", "_%_", "-_",
    "startsWith", "endsWith", "contains", "matches", "size", "string", "int", "uint", "double", "timestamp", "duration",
    "getFullYear", "getMonth", "getDate", "getDayOfMonth", "getDayOfWeek", "getDayOfYear", "getHours", "getMinutes", "getSeconds",
    "within",
})  # fmt: skip
#: CEL's loops. Named here as well, because a loop whose variable is called like one of ours would not show as unknown.
_LOOP: Final = re.compile(r"\.\s*(all|exists|exists_one|existsOne|map|filter|transform\w*)\s*\(")


def _within(address: str, network: str) -> bool:
    return is_within(address, (ipaddress.ip_network(network),))


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """One compiled policy."""

    name: str
    refuses_when: bool
    program: cel.Program
    answer: Refusal
    #: Its answer depends on nothing but the caller, the dialect and the model, so it may be remembered with them.
    is_lasting: bool = True

    def refusal(self, ask: Ask, identity: Identity) -> Refusal | None:
        """What this policy has against *ask*, if anything."""
        try:
            said = self.program.execute(_context(ask, identity))
        except Exception:  # noqa: BLE001 - whatever an operator's expression raises, the answer is no
            return self.answer
        return self.answer if said is self.refuses_when or not isinstance(said, bool) else None


def compile_policy(*, name: str, expression: str, refuses_when: bool, message: str = MESSAGE_DEFAULT) -> Policy:
    """
    Make a policy that refuses where *expression* is *refuses_when*; raises `Invalid` with the reason.

    >>> night = compile_policy(name="night", expression="time.getHours() < 6", refuses_when=True)
    >>> night.program.variables()
    ['time']
    """
    if len(expression) > EXPRESSION_LENGTH_MAX:
        raise Invalid(f"policy {name!r}: the expression is longer than {EXPRESSION_LENGTH_MAX} characters.")
    if _LOOP.search(expression):
        raise Invalid(f"policy {name!r}: loops over lists are not available.", mend="Use `in`.")
    try:
        program = cel.compile(expression)
    except ValueError as exc:
        raise Invalid(f"policy {name!r}: {str(exc).splitlines()[0]}.") from exc
    unknown = sorted(set(program.variables()) - set(VARIABLES))
    if unknown:
        raise Invalid(f"policy {name!r}: {unknown[0]} is not a variable.", mend=f"There are: {', '.join(VARIABLES)}.")
    foreign = sorted(set(program.functions()) - _FUNCTIONS)
    if foreign:
        raise Invalid(f"policy {name!r}: {foreign[0]} is not available in policies.")
    _refuse_constants(name, program)
    return Policy(
        name=name,
        refuses_when=refuses_when,
        program=program,
        answer=Refusal(status=403, code="policy_denied", message=message),
        is_lasting=not _FLEETING.intersection(program.variables()),
    )


def _refuse_constants(name: str, program: cel.Program) -> None:
    """An expression that is not a question about the request is a mistake that would lie dormant."""
    if not program.variables():
        raise Invalid(f"policy {name!r}: the expression does not depend on the request.")
    try:
        said = program.execute(_context(_SAMPLE_ASK, _SAMPLE_IDENTITY))
    except (KeyError, RuntimeError, TypeError, ValueError):
        return  # the sample has no labels and no claims
    if not isinstance(said, bool):
        raise Invalid(f"policy {name!r}: the expression is not true or false.")


def _context(ask: Ask, identity: Identity) -> dict[str, Any]:
    return {
        "model": ask.model or "",
        "path": ask.path,
        "host": ask.host,
        "dialect": ask.dialect,
        "address": ask.address,
        "time": ask.now,
        "tenant": identity.tenant_id,
        "project": identity.project_id,
        "labels": identity.standing.labels,
        "key": identity.key_id,
        "scopes": sorted(identity.scopes) if identity.scopes is not None else [],
        "claims": identity.claims,
        "within": _within,
    }


_SAMPLE_ASK: Final = Ask(
    dialect="openai.chat", model="model", path="/v1/chat/completions", host="localhost", address="127.0.0.1",
    now=datetime(2026, 1, 1, tzinfo=UTC),
)  # fmt: skip
_SAMPLE_IDENTITY: Final = Identity(
    tenant_id="tenant", project_id="default", key_id="key",
    standing=Standing(tenant_active=True, project_active=True),
)  # fmt: skip
