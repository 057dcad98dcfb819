# SPDX-License-Identifier: Apache-2.0
"""
The token endpoint without its I/O: what was asked (RFC 6749 4.4), what is granted, what the token says (RFC 9068).

A refusal is a value with one of the codes of RFC 6749 5.2.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final
from urllib.parse import parse_qsl, unquote_plus

GRANT_TYPE: Final = "client_credentials"
AUDIENCE: Final = "peaje"
FORM: Final = "application/x-www-form-urlencoded"
#: A token cannot be taken back by itself; this is how long a thief has one.
TOKEN_LIFETIME: Final = timedelta(minutes=10)
#: A new signing key is published this long before it signs, so that no verifier meets a token whose key it
#: has not heard of. They fetch every five minutes.
PUBLISH_AHEAD: Final = timedelta(minutes=10)
#: How far a verifier's clock may be behind ours.
LEEWAY: Final = timedelta(seconds=60)
#: No honest request has more.
FIELDS_MAX: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """Why no token: `error` is for programs, `description` for people; neither says whether the client exists."""

    error: str
    description: str
    status: int = 400


#: One answer for an unknown client, a wrong secret and a suspended account.
INVALID_CLIENT: Final = Refused(
    error="invalid_client", description="The client is unknown, its secret is wrong, or it is suspended.", status=401
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRequest:
    """A well-formed request; nothing of it is proven yet."""

    client_id: str
    client_secret: str = field(repr=False)
    #: None: not asked for.
    scopes: tuple[str, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """The service account that a token is for."""

    service_account_id: str
    tenant_id: str
    project_id: str


def read_request(*, authorization: str | None, content_type: str | None, body: bytes) -> TokenRequest | Refused:
    """Read a request with `client_secret_basic` or `client_secret_post`, never both."""
    if (content_type or "").partition(";")[0].strip().lower() != FORM:
        return _invalid(f"The body must be {FORM}.")
    try:
        pairs = parse_qsl(
            body.decode("ascii"), keep_blank_values=True, strict_parsing=bool(body), max_num_fields=FIELDS_MAX,
            errors="strict",
        )
    except ValueError:
        return _invalid("The body is not a form.")
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        return _invalid("A parameter is given twice.")
    # A parameter without a value counts as left out (RFC 6749 3.2).
    fields = {name: value for name, value in pairs if value}
    client = _client(authorization, fields)
    if isinstance(client, Refused):
        return client
    if "grant_type" not in fields:
        return _invalid("grant_type is missing.")
    if fields["grant_type"] != GRANT_TYPE:
        return Refused(error="unsupported_grant_type", description=f"Only {GRANT_TYPE} is supported.")
    scopes = tuple(fields["scope"].split(" ")) if "scope" in fields else None
    if scopes is not None and not all(scopes):
        return Refused(error="invalid_scope", description="Scopes are separated by single spaces.")
    return TokenRequest(client_id=client[0], client_secret=client[1], scopes=scopes)


def grant(asked: Sequence[str] | None, *, allowed: Collection[str] | None) -> tuple[str, ...] | Refused | None:
    """
    Scopes of the token: what was asked for, or all that are allowed; None means every scope there is.

    >>> grant(None, allowed=["chat", "embeddings"])
    ('chat', 'embeddings')
    >>> grant(["chat"], allowed=None)
    ('chat',)
    """
    if asked is None:
        return None if allowed is None else tuple(sorted(allowed))
    if allowed is not None and not set(asked) <= set(allowed):
        return Refused(error="invalid_scope", description="A scope is not one of this client's.")
    return tuple(sorted(set(asked)))


def claims(
    account: Account, *, issuer: str, scopes: Sequence[str] | None, token_id: str, now: datetime
) -> dict[str, Any]:
    """What the token says; times are whole seconds since 1970. No `scope` means every scope."""
    issued_at = int(now.timestamp())
    document = {
        "iss": issuer, "sub": account.service_account_id, "aud": AUDIENCE, "client_id": account.service_account_id,
        "iat": issued_at, "exp": issued_at + int(TOKEN_LIFETIME.total_seconds()), "jti": token_id,
        "tenant": account.tenant_id, "project": account.project_id,
    }
    return document if scopes is None else document | {"scope": " ".join(scopes)}


def signer(created: Sequence[datetime], *, now: datetime) -> int:
    """
    The index of the key that signs now, given when each was made, oldest first.

    The first signs at once; a later one once it has been published for `PUBLISH_AHEAD`.
    """
    return max(index for index in range(len(created)) if index == 0 or created[index] + PUBLISH_AHEAD <= now)


def published(created: Sequence[datetime], *, now: datetime) -> list[int]:
    """
    Indexes of the keys that verifiers must know, given when each was made, oldest first.

    A key stays until the last token that it can have signed is over, on a slow clock too.
    """
    kept = PUBLISH_AHEAD + TOKEN_LIFETIME + LEEWAY
    return [
        index
        for index in range(len(created))
        if index + 1 == len(created) or now < created[index + 1] + kept
    ]


def _client(authorization: str | None, fields: dict[str, str]) -> tuple[str, str] | Refused:
    if authorization is None:
        if "client_id" not in fields or "client_secret" not in fields:
            return INVALID_CLIENT
        return fields["client_id"], fields["client_secret"]
    if "client_secret" in fields:
        return _invalid("The client signs in twice.")
    scheme, _, encoded = authorization.partition(" ")
    if scheme.lower() != "basic":
        return INVALID_CLIENT
    try:
        client_id, colon, secret = base64.b64decode(encoded.strip(), validate=True).decode("utf-8").partition(":")
    except (binascii.Error, ValueError):
        return INVALID_CLIENT
    # Both halves are form-encoded before they are joined (RFC 6749 2.3.1).
    client_id, secret = unquote_plus(client_id), unquote_plus(secret)
    if not colon or not client_id or not secret:
        return INVALID_CLIENT
    if fields.get("client_id", client_id) != client_id:
        return _invalid("The client names itself twice.")
    return client_id, secret


def _invalid(description: str) -> Refused:
    return Refused(error="invalid_request", description=description)
