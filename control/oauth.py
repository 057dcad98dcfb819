# SPDX-License-Identifier: Apache-2.0
"""Tokens for service accounts: client credentials in, a short-lived access token out."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import structlog

from chassis import keys as formats
from control.act import ALL_TENANTS
from control.core import tokens
from control.core.tokens import Account, Refused, TokenRequest
from control.minting import Hashed, Mint
from control.service_accounts import ID_PREFIX
from control.signing_keys import SigningKeys
from control.store import Connection, Store

log = structlog.get_logger()

_ACCOUNT = """
select a.service_account_id, a.tenant_id, a.project_id, a.scopes, a.secret_hash, a.pepper_version,
       a.previous_secret_hash, a.previous_pepper_version, a.previous_secret_expires_at,
       a.state = 'active' and p.state = 'active' and t.state = 'active' as is_active
from service_account a
join project p using (tenant_id, project_id)
join tenant t using (tenant_id)
where a.service_account_id = %s
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Issuer:
    """What issuing needs besides the store; `url` is what tokens name as their issuer."""

    url: str
    keys: SigningKeys
    mint: Mint

    def metadata(self) -> dict[str, Any]:
        """What clients and verifiers look up (RFC 8414)."""
        return {
            "issuer": self.url,
            "token_endpoint": f"{self.url}/oauth2/token",
            "jwks_uri": f"{self.url}/.well-known/jwks.json",
            "grant_types_supported": [tokens.GRANT_TYPE],
            "response_types_supported": [],
            "token_endpoint_auth_methods_supported": ["client_secret_basic", "client_secret_post"],
        }


def issue(store: Store, issuer: Issuer, asked: TokenRequest, *, now: datetime) -> dict[str, Any] | Refused:
    """The token response (RFC 6749 5.1), or why not."""
    row = _sign_in(store, issuer.mint, asked, now=now)
    if row is None:
        return tokens.INVALID_CLIENT
    scopes = tokens.grant(asked.scopes, allowed=row["scopes"])
    if isinstance(scopes, Refused):
        return scopes
    account = Account(
        service_account_id=row["service_account_id"], tenant_id=row["tenant_id"], project_id=row["project_id"]
    )
    token_id = secrets.token_urlsafe(16)
    claims = tokens.claims(account, issuer=issuer.url, scopes=scopes, token_id=token_id, now=now)
    token = issuer.keys.sign(claims, now=now)
    log.info("token_issued", service_account=account.service_account_id, tenant=account.tenant_id, token_id=token_id)
    answer = {
        "access_token": token, "token_type": "Bearer", "expires_in": int(tokens.TOKEN_LIFETIME.total_seconds()),
    }
    return answer if scopes is None else answer | {"scope": " ".join(scopes)}


def _sign_in(store: Store, mint: Mint, asked: TokenRequest, *, now: datetime) -> dict[str, Any] | None:
    parsed = formats.parse_token(asked.client_secret)
    # Garbage costs no I/O. A secret names its account: another's is as wrong as any.
    if parsed is None or parsed.kind != formats.CLIENT_SECRET or ID_PREFIX + parsed.token_id != asked.client_id:
        return None
    # Every tenant's: the client's account says which it is.
    with store.transaction(ALL_TENANTS) as connection:
        row = connection.execute(_ACCOUNT, (asked.client_id,)).fetchone()
        current = _hashed(row, "secret_hash", "pepper_version")
        is_previous_good = row is not None and (row["previous_secret_expires_at"] or now) > now
        previous = _hashed(row, "previous_secret_hash", "previous_pepper_version") if is_previous_good else None
        matching = mint.match(asked.client_secret, current, previous)
        if row is None or matching is None or not row["is_active"]:
            return None
        if matching is current and mint.is_outdated(matching):
            _hash_again(connection, mint, asked)
    return row


def _hashed(row: dict[str, Any] | None, hash_name: str, version_name: str) -> Hashed | None:
    if row is None or row[hash_name] is None:
        return None
    return Hashed(hash=bytes(row[hash_name]), pepper_version=row[version_name])


def _hash_again(connection: Connection, mint: Mint, asked: TokenRequest) -> None:
    fresh = mint.hashed(asked.client_secret)
    connection.execute(
        "update service_account set secret_hash = %s, pepper_version = %s where service_account_id = %s",
        (fresh.hash, fresh.pepper_version, asked.client_id),
    )
