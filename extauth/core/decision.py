# SPDX-License-Identifier: Apache-2.0
"""
Decide whether a request may pass, and as whom. A denial is a value.

Five phases, in order: the *credential* has been found, the *identity* behind it is proven, its
*state* is looked at, then *policy*, then the *answer*. The rules of state and policy are one
table; `decide` stops at the first that says no, `trace` tells what each of them says.
Must not know gRPC, Postgres or the time: all of these arrive as arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from chassis import contract, keys
from chassis.refusals import Refusal
from extauth.core.credential import INVALID_KEY, Credential
from extauth.core.identity import Ask, Denial, Identity, KeyState, Phase, is_within
from extauth.core.policy import Policy

CANNOT_DECIDE: Final = Refusal(
    status=503, code="service_unavailable", message="The gateway cannot decide right now. Try again.", retry_after=1
)
INVALID_TOKEN: Final = Refusal(status=401, code="invalid_token", message="The token is not valid.")
_KEY_DISABLED: Final = Refusal(status=403, code="key_disabled", message="This key is disabled.")
_ACCOUNT_SUSPENDED: Final = Refusal(
    status=403, code="service_account_suspended", message="This service account is suspended."
)
_TENANT_SUSPENDED: Final = Refusal(status=403, code="tenant_suspended", message="This account is suspended.")
_PROJECT_SUSPENDED: Final = Refusal(status=403, code="project_suspended", message="This project is suspended.")
_ADDRESS_FORBIDDEN: Final = Refusal(
    status=403, code="address_not_allowed", message="This credential may not be used from this address."
)
_SCOPE_FORBIDDEN: Final = Refusal(
    status=403, code="scope_not_allowed", message="This credential may not be used for this kind of request."
)
_MODEL_UNKNOWN: Final = Refusal(status=404, code="model_not_found", message="No such model.", param="model")
_MODEL_FORBIDDEN: Final = Refusal(
    status=403, code="model_not_allowed", message="This key may not use that model.", param="model"
)


#: How long Envoy's express lane may remember an admission: the revocation bound.
REMEMBER_FOR: Final = timedelta(milliseconds=5000)
_NOT: Final = timedelta(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What holds for everybody: the models that are served and the operator's policies."""

    served: frozenset[str]
    policies: Sequence[Policy] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One rule's say about one request; *refusal* None means that it lets it pass."""

    phase: Phase
    rule: str
    refusal: Refusal | None


def decide(
    ask: Ask, credential: Credential | Denial, identity: Identity | Denial, rules: Rules
) -> Identity | Denial:
    """Let *ask* pass as the identity that is returned, or say no."""
    # 1. Credential: is there exactly one, and does it look like one?
    if isinstance(credential, Denial):
        return credential
    # 2. Identity: is it genuine, and whose is it?
    if isinstance(identity, Denial):
        return identity
    # 3. State: is everybody it belongs to in good standing?  4. Policy: may they do this?
    for phase, name, check in CHECKS:
        refusal = check(ask, identity, rules)
        if refusal is not None:
            return Denial(phase=phase, rule=name, refusal=refusal)
    for policy in rules.policies:
        refusal = policy.refusal(ask, identity)
        if refusal is not None:
            return Denial(phase=Phase.POLICY, rule=f"policy:{policy.name}", refusal=refusal)
    # 5. Answer: what Envoy's metadata will say of the caller.
    return identity


def trace(ask: Ask, identity: Identity, rules: Rules) -> list[Step]:
    """Tell what every rule says of *ask*, also after the first no; the first refusal is the decision."""
    return [
        *(Step(phase=phase, rule=name, refusal=check(ask, identity, rules)) for phase, name, check in CHECKS),
        *(
            Step(phase=Phase.POLICY, rule=f"policy:{policy.name}", refusal=policy.refusal(ask, identity))
            for policy in rules.policies
        ),
    ]


def memorable_for(ask: Ask, identity: Identity, rules: Rules) -> timedelta:
    """
    How long the same credential, dialect and model may pass without asking again; zero for not at all.

    Not where the answer depended on anything else, not past the moment at which the identity ends,
    and not where each use is to be counted.
    """
    if identity.networks is not None or identity.is_rotated:
        return _NOT
    if rules.policies and not all(policy.is_lasting for policy in rules.policies):
        return _NOT
    # The bound counts from when Postgres was asked, not from now: ages add up.
    until = (identity.known_at or ask.now) + REMEMBER_FOR
    if identity.expires_at is not None:
        until = min(until, identity.expires_at)
    return max(_NOT, until - ask.now)


def prove_key(parsed: keys.ParsedKey, state: KeyState | None, peppers: Mapping[int, bytes]) -> Identity | Denial:
    """
    Phase 2 for keys: whose key it is, if it is the one whose hash is stored.

    An unknown id costs the same hash as a wrong secret, so that the time of a refusal does not
    tell one from the other.
    """
    version = state.pepper_version if state is not None else max(peppers)
    pepper = peppers.get(version)
    if pepper is None:
        # Our own fault, not the caller's: nothing is known of the key, so it is neither good nor bad.
        return Denial(phase=Phase.IDENTITY, rule="pepper_missing", refusal=CANNOT_DECIDE)
    is_genuine = keys.verify(pepper, parsed.key, state.key_hash if state is not None else _NO_HASH)
    if state is None:
        return _unproven("key_unknown")
    return state.identity if is_genuine else _unproven("secret_wrong")


def usable_models(identity: Identity, served: Iterable[str]) -> list[str]:
    """The served models that *identity* may use, sorted by name."""
    return sorted(name for name in served if _may_use(identity, name))


def _may_use(identity: Identity, model: str) -> bool:
    # Deny wins.
    return (identity.models is None or identity.models.match(model)) and not identity.denied_models.match(model)


def _revoked(ask: Ask, identity: Identity, _rules: Rules) -> Refusal | None:
    # A key that is over answers like one that never was.
    return INVALID_KEY if identity.revoked_at is not None and ask.now >= identity.revoked_at else None


def _expired(ask: Ask, identity: Identity, _rules: Rules) -> Refusal | None:
    if identity.expires_at is None or ask.now < identity.expires_at:
        return None
    return INVALID_TOKEN if identity.claims else INVALID_KEY


def _disabled(_ask: Ask, identity: Identity, _rules: Rules) -> Refusal | None:
    return None if identity.is_active else _KEY_DISABLED


def _account(_ask: Ask, identity: Identity, _rules: Rules) -> Refusal | None:
    return None if identity.account_active else _ACCOUNT_SUSPENDED


def _tenant(_ask: Ask, identity: Identity, _rules: Rules) -> Refusal | None:
    return None if identity.standing.tenant_active else _TENANT_SUSPENDED


def _project(_ask: Ask, identity: Identity, _rules: Rules) -> Refusal | None:
    return None if identity.standing.project_active else _PROJECT_SUSPENDED


def _address(ask: Ask, identity: Identity, _rules: Rules) -> Refusal | None:
    if identity.networks is None or is_within(ask.address, identity.networks):
        return None
    return _ADDRESS_FORBIDDEN


def _scope(ask: Ask, identity: Identity, _rules: Rules) -> Refusal | None:
    if identity.scopes is None or contract.DIALECT_SCOPES.get(ask.dialect) in identity.scopes:
        return None
    return _SCOPE_FORBIDDEN


def _model_served(ask: Ask, _identity: Identity, rules: Rules) -> Refusal | None:
    return None if ask.model is None or ask.model in rules.served else _MODEL_UNKNOWN


def _model_allowed(ask: Ask, identity: Identity, _rules: Rules) -> Refusal | None:
    return None if ask.model is None or _may_use(identity, ask.model) else _MODEL_FORBIDDEN


Check = Callable[[Ask, Identity, Rules], Refusal | None]

#: In this order. What is over answers first, so that its owner learns nothing more; then who is
#: suspended, from the key up; then what may be done.
CHECKS: Final[tuple[tuple[Phase, str, Check], ...]] = (
    (Phase.STATE, "not_revoked", _revoked),
    (Phase.STATE, "not_expired", _expired),
    (Phase.STATE, "key_active", _disabled),
    (Phase.STATE, "service_account_active", _account),
    (Phase.STATE, "tenant_active", _tenant),
    (Phase.STATE, "project_active", _project),
    (Phase.POLICY, "address_allowed", _address),
    (Phase.POLICY, "scope_allowed", _scope),
    (Phase.POLICY, "model_served", _model_served),
    (Phase.POLICY, "model_allowed", _model_allowed),
)

_NO_HASH: Final = bytes(32)


def _unproven(rule: str) -> Denial:
    return Denial(phase=Phase.IDENTITY, rule=rule, refusal=INVALID_KEY)
