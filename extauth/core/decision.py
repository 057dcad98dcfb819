# SPDX-License-Identifier: Apache-2.0
"""
Decide whether a request may pass, and as whom.

Knows credentials, keys, states and model lists. Must not know gRPC, Postgres or the time:
all of these arrive as arguments. A denial is a value.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime

from chassis import keys
from chassis.contract import API_KEY_HEADER, AUTHORIZATION_HEADER
from chassis.refusals import Refusal
from extauth.core.token import Caller

#: Longest credential that is looked at; a key has 61 characters. Longer ones are refused unread.
CREDENTIAL_BYTES_MAX = 256

_NOT_A_KEY = Refusal(status=401, code="invalid_api_key", message="The API key is not valid.")
_CONFLICT = Refusal(
    status=400,
    code="conflicting_credentials",
    message="authorization and x-api-key hold different credentials; send one.",
)
_MISSING = Refusal(
    status=401,
    code="missing_credential",
    message='No API key was sent. Send it as "authorization: Bearer KEY" or "x-api-key: KEY".',
)
_SUSPENDED = Refusal(status=403, code="tenant_suspended", message="This account is suspended.")
_MODEL_UNKNOWN = Refusal(status=404, code="model_not_found", message="No such model.", param="model")
_MODEL_FORBIDDEN = Refusal(
    status=403, code="model_not_allowed", message="This key may not use that model.", param="model"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyState:
    """What is known of an API key; everything a decision depends on and nothing more."""

    key_id: str
    tenant_id: str
    project_id: str
    key_hash: bytes
    pepper_version: int
    #: Models the key may use; None for every model that is served.
    models: frozenset[str] | None
    expires_at: datetime | None
    revoked_at: datetime | None
    tenant_active: bool
    project_active: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """Who calls: written to Envoy's metadata, never to a header."""

    tenant_id: str
    project_id: str
    key_id: str
    models: frozenset[str] | None


def find_key(headers: Iterable[tuple[str, bytes]]) -> keys.ParsedKey | Refusal:
    """
    Phase 1, credential: the one well-formed key among *headers*, or why there is none.

    No precedence between headers and none between repeated ones: two that differ are refused,
    because "the last one wins" is how a proxy and its policy come to disagree.
    """
    bearer: list[bytes] = []
    plain: list[bytes] = []
    for name, value in headers:
        if name == AUTHORIZATION_HEADER:
            bearer.append(value)
        elif name == API_KEY_HEADER:
            plain.append(value)
    if len(bearer) > 1 or len(plain) > 1:
        return _NOT_A_KEY
    found: list[bytes] = []
    if bearer:
        scheme, _, token = bearer[0].partition(b" ")
        if scheme.lower() != b"bearer":
            return _NOT_A_KEY
        found.append(token.lstrip(b" "))
    found += plain
    if not found:
        return _MISSING
    if len(set(found)) > 1:
        return _CONFLICT
    return _parse(found[0])


def decide(
    parsed: keys.ParsedKey,
    state: KeyState | None,
    *,
    peppers: Mapping[int, bytes],
    served: frozenset[str],
    model: str | None,
    now: datetime,
) -> Principal | Refusal:
    """
    Phases 2 to 4, identity, state and policy: *state* is what the directory knows of *parsed*.

    *model* is None for requests that name none (the list of models). A key that is expired
    (`now >= expires_at`) or revoked answers like one that never was.
    """
    if state is None or not _is_genuine(parsed, state, peppers):
        return _NOT_A_KEY
    if state.revoked_at is not None and now >= state.revoked_at:
        return _NOT_A_KEY
    if state.expires_at is not None and now >= state.expires_at:
        return _NOT_A_KEY
    if not (state.tenant_active and state.project_active):
        return _SUSPENDED
    if model is not None and model not in served:
        return _MODEL_UNKNOWN
    if model is not None and state.models is not None and model not in state.models:
        return _MODEL_FORBIDDEN
    return Principal(
        tenant_id=state.tenant_id,
        project_id=state.project_id,
        key_id=state.key_id,
        models=state.models,
    )


def decide_caller(
    caller: Caller | Refusal, *, served: frozenset[str], model: str | None
) -> Principal | Refusal:
    """The same for a caller who came with a token or a certificate."""
    if isinstance(caller, Refusal):
        return caller
    account, bearer = caller.account, caller.bearer
    if not (account.tenant_active and account.project_active and account.account_active):
        return _SUSPENDED
    lists = [frozenset(models) for models in (bearer.models, account.models) if models is not None]
    models = frozenset.intersection(*lists) - frozenset(account.denied_models) if lists else None
    if model is not None and model not in served:
        return _MODEL_UNKNOWN
    if model is not None and (model in account.denied_models or (models is not None and model not in models)):
        return _MODEL_FORBIDDEN
    return Principal(
        tenant_id=bearer.tenant_id, project_id=bearer.project_id, key_id=bearer.principal_id, models=models
    )


def usable_models(principal: Principal, served: Iterable[str]) -> list[str]:
    """The served models that *principal* may use, sorted by name."""
    return sorted(name for name in served if principal.models is None or name in principal.models)


def _parse(credential: bytes) -> keys.ParsedKey | Refusal:
    if len(credential) > CREDENTIAL_BYTES_MAX:
        return _NOT_A_KEY
    try:
        text = credential.decode("ascii")
    except UnicodeDecodeError:
        return _NOT_A_KEY
    return keys.parse(text) or _NOT_A_KEY


def _is_genuine(parsed: keys.ParsedKey, state: KeyState, peppers: Mapping[int, bytes]) -> bool:
    pepper = peppers.get(state.pepper_version)
    return pepper is not None and keys.verify(pepper, parsed.key, state.key_hash)
