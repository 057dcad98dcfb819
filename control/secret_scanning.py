# SPDX-License-Identifier: Apache-2.0
"""
Secrets of ours that a scanning partner found in public: whatever still works stops working.

Alerts are signed as GitHub signs them: ECDSA P-256 with SHA-256 over the raw body. The answer is the
same whether a secret is known or not, so the endpoint cannot be asked what exists.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from chassis import keys as formats
from chassis.errors import Invalid
from chassis.files import read_bounded
from control import keys, operators, service_accounts
from control.act import Act
from control.minting import Hashed, Mint
from control.store import Connection, Store

#: Per call; GitHub batches far fewer.
TOKENS_MAX: Final = 1000
#: Room for `TOKENS_MAX` tokens with long addresses.
BODY_BYTES_MAX: Final = 1 << 20
_KEYS_FILE_BYTES_MAX: Final = 64 * 1024
#: Base64 of the longest P-256 signature in DER, 72 bytes, and some air.
_SIGNATURE_LENGTH_MAX: Final = 256

PublicKeys = Mapping[str, ec.EllipticCurvePublicKey]


class TooManyTokens(Invalid):
    """Refuse a batch beyond `TOKENS_MAX`."""


def load_public_keys(path: Path | None) -> PublicKeys:
    """
    The partner's keys by identifier, as GitHub's `/meta/public_keys/secret_scanning` answers them.

    No file is configured: no key, so every signature is wrong.
    """
    if path is None:
        return {}
    try:
        text = read_bounded(path, bytes_max=_KEYS_FILE_BYTES_MAX)
    except Invalid as exc:
        raise Invalid(f"PEAJE_SECRET_SCANNING_KEYS: {exc.message}") from exc
    try:
        entries = json.loads(text)["public_keys"]
        found = {entry["key_identifier"]: serialization.load_pem_public_key(entry["key"].encode()) for entry in entries}
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise Invalid(
            f"PEAJE_SECRET_SCANNING_KEYS: {path} is not a list of public keys.",
            mend='Write {"public_keys": [{"key_identifier": "…", "key": "-----BEGIN PUBLIC KEY-----…"}]}.',
        ) from exc
    keys_by_id: dict[str, ec.EllipticCurvePublicKey] = {}
    for identifier, key in found.items():
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
            raise Invalid(f"PEAJE_SECRET_SCANNING_KEYS: {path} has a key that is not for ECDSA on P-256.")
        keys_by_id[identifier] = key
    return keys_by_id


def is_signed(known: PublicKeys, *, identifier: str | None, signature: str | None, body: bytes) -> bool:
    """Whether *body* is signed by the partner's key called *identifier*."""
    key = known.get(identifier or "")
    if key is None or not signature or len(signature) > _SIGNATURE_LENGTH_MAX:
        return False
    try:
        key.verify(base64.b64decode(signature, validate=True), body, ec.ECDSA(hashes.SHA256()))
    except (InvalidSignature, binascii.Error, ValueError):
        return False
    return True


def read_tokens(body: bytes) -> list[str]:
    """The found texts of a signed body; raises `Invalid`."""
    try:
        alerts = json.loads(body)
    except (ValueError, RecursionError) as exc:
        raise Invalid("The body is not JSON.") from exc
    if not isinstance(alerts, list):
        raise Invalid("The body is not a list of alerts.")
    if len(alerts) > TOKENS_MAX:
        raise TooManyTokens(f"A call has at most {TOKENS_MAX} tokens.")
    if not all(isinstance(alert, dict) and isinstance(alert.get("token"), str) for alert in alerts):
        raise Invalid("An alert has no token.")
    return [alert["token"] for alert in alerts]


def revoke_found(store: Store, act: Act, mint: Mint, texts: list[str]) -> int:
    """
    Revoke keys and operator tokens, suspend service accounts whose secret was found; how many there were.

    Only a whole, right secret counts: an id alone is public. A second delivery changes nothing.
    """
    found = {text: parsed for text in texts if (parsed := formats.parse_token(text)) is not None}
    with store.transaction(act.scope) as connection:
        return sum(_revoke(connection, act, mint, parsed) for parsed in found.values())


def _revoke(connection: Connection, act: Act, mint: Mint, parsed: formats.ParsedToken) -> bool:
    match parsed.kind:
        case formats.OPERATOR_TOKEN:
            object_id = operators.ID_PREFIX + parsed.token_id
            query = "select token_hash as hash, pepper_version from operator where operator_id = %s"
        case formats.CLIENT_SECRET:
            object_id = service_accounts.ID_PREFIX + parsed.token_id
            query = (
                "select secret_hash as hash, pepper_version, previous_secret_hash, previous_pepper_version "
                "from service_account where service_account_id = %s"
            )
        case "live" | "test":
            object_id = parsed.token_id
            query = "select key_hash as hash, pepper_version from api_key where key_id = %s"
        case _:
            return False  # a bootstrap token lives for minutes, once
    row = connection.execute(query, (object_id,)).fetchone()
    if not _matches(mint, parsed.token, row):
        return False
    digest = hashlib.sha256(parsed.token.encode("ascii")).digest()
    is_new = connection.execute(
        "insert into secret_alert (alert_hash, key_id, source, received_at) values (%s, %s, %s, %s) "
        "on conflict do nothing returning true",
        (digest, object_id, act.actor, act.now),
    ).fetchone()
    if is_new is None:
        return False
    match parsed.kind:
        case formats.OPERATOR_TOKEN:
            operators.revoke_in(connection, act, object_id)
        case formats.CLIENT_SECRET:
            service_accounts.set_state_in(connection, act, object_id, "suspended")
        case _:
            keys.revoke_in(connection, act, object_id)
    return True


def _matches(mint: Mint, text: str, row: dict[str, Any] | None) -> bool:
    current = None if row is None else Hashed(hash=bytes(row["hash"]), pepper_version=row["pepper_version"])
    previous = None
    if row is not None and row.get("previous_secret_hash") is not None:
        previous = Hashed(hash=bytes(row["previous_secret_hash"]), pepper_version=row["previous_pepper_version"])
    return mint.match(text, current, previous) is not None
