# SPDX-License-Identifier: Apache-2.0
"""Alerts of secret-scanning partners: signed, bounded, idempotent, and no way to ask what exists."""

from __future__ import annotations

import base64
import json
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from chassis import keys as formats
from chassis.errors import Invalid
from control.secret_scanning import load_public_keys
from tests.integration.control_plane import ControlPlane, sign_in_first, start

PATH = "/v1/secret-scanning/alerts"


class Partner:
    """A partner with a key pair, as GitHub has one."""

    def __init__(self) -> None:
        self.private = ec.generate_private_key(ec.SECP256R1())
        self.identifier = secrets.token_hex(16)

    def document(self) -> dict[str, Any]:
        """As GitHub's endpoint for public keys answers."""
        pem = self.private.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        return {"public_keys": [{"key_identifier": self.identifier, "key": pem.decode(), "is_current": True}]}

    def send(self, control: ControlPlane, body: bytes, **headers: str) -> Any:
        """Post *body*, signed; *headers* replace ours."""
        signature = base64.b64encode(self.private.sign(body, ec.ECDSA(hashes.SHA256()))).decode()
        own = {"Github-Public-Key-Identifier": self.identifier, "Github-Public-Key-Signature": signature}
        return control.client.post(PATH, content=body, headers=own | headers)


def alerts(*tokens: str) -> bytes:
    return json.dumps(
        [{"token": token, "type": "peaje_key", "url": "https://example.com/x", "source": "content"} for token in tokens]
    ).encode()


@pytest.fixture
def partner() -> Partner:
    return Partner()


@pytest.fixture
def control(postgres_url: str, tmp_path: Path, partner: Partner) -> Iterator[ControlPlane]:
    """A control API that knows the partner's key."""
    path = tmp_path / "partner.json"
    path.write_text(json.dumps(partner.document()))
    plane = start(postgres_url, tmp_path, scanning_keys=path)
    sign_in_first(plane)
    yield plane
    plane.services.store.close()


def test_keys_operators_and_client_secrets_that_were_found_stop_working(control: ControlPlane, partner: Partner) -> None:
    """Each in the way that ends it; the others stay."""
    tenant = control.tenant("acme")
    other = control.made("/v1/tenants/acme/keys", {"name": "other"})

    answer = partner.send(control, alerts(tenant.key["key"], tenant.admin, tenant.account["client_secret"]))

    assert (200, {"received": 3}) == (answer.status_code, answer.json())
    assert control.ask("GET", f"/v1/keys/{tenant.key['key_id']}").json()["revoked_at"] is not None
    assert control.ask("GET", f"/v1/keys/{other['key_id']}").json()["revoked_at"] is None
    assert 401 == control.ask("GET", "/v1/tenants", tenant.admin).status_code
    assert "suspended" == control.ask("GET", f"/v1/service-accounts/{tenant.account['client_id']}").json()["state"]
    entries = control.ask("GET", "/v1/audit?limit=1000").json()["entries"]
    assert {"key.revoked", "operator.revoked", "service_account.suspended"} == {
        entry["action"] for entry in entries if entry["actor"] == "secret-scanning"
    }


def test_a_second_delivery_changes_nothing(control: ControlPlane, partner: Partner) -> None:
    """Also not after somebody has mended it: an account that was let back in stays in."""
    tenant = control.tenant("acme")
    body = alerts(tenant.key["key"], tenant.account["client_secret"], tenant.key["key"])
    first = partner.send(control, body)
    control.made(f"/v1/service-accounts/{tenant.account['client_id']}", {"state": "active"}, method="PATCH")
    before = control.ask("GET", f"/v1/keys/{tenant.key['key_id']}").json()
    control.clock.forward(hours=1)

    again = partner.send(control, body)

    assert (first.status_code, first.json()) == (again.status_code, again.json())
    assert before == control.ask("GET", f"/v1/keys/{tenant.key['key_id']}").json()
    assert "active" == control.ask("GET", f"/v1/service-accounts/{tenant.account['client_id']}").json()["state"]


def test_the_answer_does_not_say_whether_a_secret_exists(control: ControlPlane, partner: Partner) -> None:
    """A known key, a revoked one, an invented one, garbage: one answer."""
    tenant = control.tenant("acme")
    invented = formats.mint("live", secrets.token_bytes).key
    bodies = [alerts(tenant.key["key"]), alerts(tenant.key["key"]), alerts(invented), alerts("x"), alerts("\x00")]

    answers = [partner.send(control, body) for body in bodies]

    assert 1 == len({(answer.status_code, answer.text) for answer in answers})


def test_an_id_with_a_wrong_secret_ends_nothing(control: ControlPlane, partner: Partner) -> None:
    """Ids are public; with a right checksum anybody can make one up."""
    tenant = control.tenant("acme")
    forged = formats.mint_token("live", secrets.token_bytes, token_id=tenant.key["key_id"]).token

    assert 200 == partner.send(control, alerts(forged)).status_code
    assert control.ask("GET", f"/v1/keys/{tenant.key['key_id']}").json()["revoked_at"] is None


def test_a_bad_signature_is_401_and_ends_nothing(control: ControlPlane, partner: Partner) -> None:
    """Another's key, another body, no signature, an unknown identifier, a signature that is none."""
    tenant = control.tenant("acme")
    body = alerts(tenant.key["key"])
    of_other_body = base64.b64encode(partner.private.sign(b"[]", ec.ECDSA(hashes.SHA256()))).decode()
    with_sha512 = base64.b64encode(partner.private.sign(body, ec.ECDSA(hashes.SHA512()))).decode()

    answers: list[Any] = [
        Partner().send(control, body),
        Partner().send(control, body, **{"Github-Public-Key-Identifier": partner.identifier}),
        partner.send(control, body, **{"Github-Public-Key-Identifier": "nobody"}),
        partner.send(control, body, **{"Github-Public-Key-Identifier": ""}),
        *(
            partner.send(control, body, **{"Github-Public-Key-Signature": signature})
            for signature in (of_other_body, with_sha512, "", "!", "AAAA", "A" * 100_00)
        ),
        control.client.post(PATH, content=body),
        control.ask("POST", PATH, content=body),  # a platform-admin is not a partner
    ]

    assert {401} == {answer.status_code for answer in answers}
    assert control.ask("GET", f"/v1/keys/{tenant.key['key_id']}").json()["revoked_at"] is None


def test_a_call_has_at_most_a_thousand_tokens(control: ControlPlane, partner: Partner) -> None:
    """One more is refused whole, and so is a body beyond the bound."""
    tenant = control.tenant("acme")
    garbage = ["x" * 60] * 999

    assert 413 == partner.send(control, alerts(*garbage, "x", tenant.key["key"])).status_code
    assert 413 == partner.send(control, alerts(*["x" * 200] * 10_000)).status_code
    assert control.ask("GET", f"/v1/keys/{tenant.key['key_id']}").json()["revoked_at"] is None
    assert 200 == partner.send(control, alerts(*garbage, tenant.key["key"])).status_code
    assert control.ask("GET", f"/v1/keys/{tenant.key['key_id']}").json()["revoked_at"] is not None


@pytest.mark.parametrize(
    "body", [b"", b"x", b"{}", b"[1]", b'[{"type": "x"}]', b'[{"token": 1}]', b"\xff", b"[" * 100_000]
)
def test_a_signed_body_that_is_no_list_of_alerts_is_400(control: ControlPlane, partner: Partner, body: bytes) -> None:
    """The partner's mistake, in a sentence."""
    assert 400 == partner.send(control, body).status_code


def test_without_a_file_of_keys_every_alert_is_refused(postgres_url: str, tmp_path: Path, partner: Partner) -> None:
    """The default: no partner."""
    plane = start(postgres_url, tmp_path)

    assert 401 == partner.send(plane, alerts("x")).status_code
    plane.services.store.close()


@pytest.mark.parametrize(
    "text", ["", "x", "[]", "{}", '{"public_keys": 1}', '{"public_keys": [{}]}', '{"public_keys": [{"key_identifier": "a", "key": "x"}]}']
)
def test_a_file_of_keys_that_is_none_is_refused_by_name(tmp_path: Path, text: str) -> None:
    """At the start, not at the first alert."""
    path = tmp_path / "keys.json"
    path.write_text(text)

    with pytest.raises(Invalid, match="PEAJE_SECRET_SCANNING_KEYS"):
        load_public_keys(path)


def test_a_key_on_another_curve_is_refused(tmp_path: Path) -> None:
    """The scheme is P-256 and nothing else."""
    partner = Partner()
    partner.private = ec.generate_private_key(ec.SECP384R1())
    path = tmp_path / "keys.json"
    path.write_text(json.dumps(partner.document()))

    with pytest.raises(Invalid, match="P-256"):
        load_public_keys(path)
