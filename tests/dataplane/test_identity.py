# SPDX-License-Identifier: Apache-2.0
"""Who is calling, through real Envoy: every row of keys, and client certificates."""

from __future__ import annotations

import datetime as dt
import ipaddress
import json
import re
import socket
import ssl
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from chassis.clock import utc_now
from chassis.contract import EXPRESS_ENVIRONMENT
from chassis.secrets import load_peppers
from control.laptop.places import MARKER
from tests.bad_inputs import world as worlds
from tests.dataplane.installation import REPOSITORY, VISIBLE_SECONDS, Installation, chat, free_ports, running

pytestmark = pytest.mark.express("on", "off")

SPIFFE = "spiffe://acme.example/batch"


@dataclass(frozen=True, kw_only=True)
class Door:
    """An installation with the rows' keys and a second listener with TLS."""

    installation: Installation
    world: worlds.World
    tls_port: int
    certificates: Path

    def send(self, headers: Sequence[tuple[str, bytes]], *, query: str = "", host: str = "a.example") -> tuple[int, str | None]:
        """One request byte by byte, so that no client library mends it; the status and the error's code."""
        body = json.dumps(chat()).encode()
        lines = [f"POST /v1/chat/completions{query} HTTP/1.1".encode(), b"host: " + host.encode(), b"connection: close"]
        lines += [name.encode() + b": " + value for name, value in headers]
        lines += [b"content-type: application/json", f"content-length: {len(body)}".encode(), b"", body]
        with socket.create_connection(("127.0.0.1", self.installation.port), timeout=30) as connection:
            connection.sendall(b"\r\n".join(lines))
            data = b""
            while piece := connection.recv(65536):
                data += piece
        status = int(re.match(rb"HTTP/1.1 (\d{3})", data)[1])  # type: ignore[index]
        code = re.search(rb'"code":\s*"(\w+)"', data)
        return status, code[1].decode() if code else None

    def tls(self, *, certificate: str | None, headers: dict[str, str] | None = None) -> httpx.Response:
        """One request by the second door."""
        context = ssl.create_default_context(cafile=str(self.certificates / "ca.pem"))
        if certificate is not None:
            context.load_cert_chain(self.certificates / f"{certificate}.pem", self.certificates / f"{certificate}.key")
        with httpx.Client(verify=context, trust_env=False) as client:
            return client.post(
                f"https://localhost:{self.tls_port}/v1/chat/completions", json=chat(), headers=headers or {}, timeout=30
            )


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory, express_lane: str) -> Iterator[Door]:
    """One installation for all."""
    home = tmp_path_factory.mktemp("door")
    (tls_port,) = free_ports(1)
    (home / MARKER).touch()  # files are laid into it before the first start
    certificates = home / "tls"
    certificates.mkdir()
    make_certificates(certificates)
    example = yaml.safe_load((REPOSITORY / "envoy/tls.example.yaml").read_text())
    example["address"]["socket_address"]["port_value"] = tls_port
    (home / "tls.yaml").write_text(yaml.safe_dump(example))
    # Before the first request: what a worker remembers from before a policy outlives it by up to two seconds.
    worlds.write_identity(
        home,
        {
            "issuers": [{"name": "control", "kind": "service_accounts"}],
            "policies": worlds.POLICIES,
            "certificates": [{"name": "batch", "san": SPIFFE, "tenant": "acme"}],
        },
    )
    with running(home, "--engine", "fake", environment={EXPRESS_ENVIRONMENT: express_lane}) as installation:
        world = worlds.build(load_peppers(home), utc_now())
        with installation.database() as connection:
            worlds.store(world, connection, utc_now())
        door = Door(installation=installation, world=world, tls_port=tls_port, certificates=certificates)
        yield door
        installation.issued += [text for name, text in world.texts.items() if name in world.rows]
        assert [] == installation.leaks()


@pytest.mark.parametrize("row", worlds.rows("keys", "envoy"), ids=lambda row: row["id"])
def test_keys(door: Door, row: dict[str, Any]) -> None:
    """Each row gets exactly what it says."""
    answer = door.send(
        door.world.headers(row), host=row.get("host", "a.example"), query=door.world.fill(row.get("query", "")).decode()
    )

    assert (row["status"], row.get("code")) == answer


def test_a_known_certificate_is_an_identity_and_its_use_is_billed(door: Door) -> None:
    """Envoy verified it; the document says whose it is."""
    answer = door.tls(certificate="batch")

    assert 200 == answer.status_code, answer.text
    deadline = time.monotonic() + VISIBLE_SECONDS
    query = "select tenant, project, key_id from billing_usage_v1 where request_id = %s"
    while not (found := door.installation.sql(query, answer.headers["x-request-id"])) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [{"tenant": "acme", "project": "default", "key_id": "cert:batch"}] == found


def test_a_certificate_is_known_by_any_of_its_names(door: Door) -> None:
    """Envoy itself tells of the first one only."""
    assert 200 == door.tls(certificate="several").status_code


@pytest.mark.parametrize(("certificate", "status", "code"), [("stranger", 401, "unknown_certificate"), (None, 401, "missing_credential")])
def test_other_certificates_and_none_are_no_identity(door: Door, certificate: str | None, status: int, code: str) -> None:
    """Verified but not known, or not shown."""
    answer = door.tls(certificate=certificate)

    assert (status, code) == (answer.status_code, answer.json()["error"]["code"])


def test_a_certificate_of_another_authority_does_not_get_in(door: Door) -> None:
    """The handshake fails; nothing is asked."""
    with pytest.raises(httpx.HTTPError):
        door.tls(certificate="forged")


def test_a_key_works_by_either_door_and_a_certificate_of_another_tenant_contradicts_it(door: Door) -> None:
    """One identity a request."""
    good = {"authorization": f"Bearer {door.world.texts['good']}"}
    made = door.installation.new_tenant()

    assert 200 == door.tls(certificate=None, headers=good).status_code
    assert 200 == door.tls(certificate="batch", headers=good).status_code
    answer = door.tls(certificate="batch", headers={"authorization": f"Bearer {made.key}"})
    assert (400, "conflicting_credentials") == (answer.status_code, answer.json()["error"]["code"])


def test_a_certificate_that_is_only_claimed_is_nothing(door: Door) -> None:
    """x-forwarded-client-cert is Envoy's word, not a client's."""
    spoofed = [("x-forwarded-client-cert", f"By=x;Hash=a;URI={SPIFFE}".encode())]

    assert (401, "missing_credential") == door.send(spoofed)
    assert 401 == door.tls(certificate=None, headers={"x-forwarded-client-cert": f"URI={SPIFFE}"}).status_code


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([("x-peaje-tenant", b"other"), ("X-Peaje-Tenant", b"other")], 200),
        ([("x_peaje_tenant", b"other")], 400),
        ([("x-envoy-original-path", b"/admin"), ("x-envoy-internal", b"true"), ("x-forwarded-for", b"10.0.0.1")], 200),
        # Envoy drops what the client itself calls hop-by-hop: then there is no credential, and nobody passes.
        ([("connection", b"authorization")], 401),
        ([("x-http-method-override", b"DELETE")], 200),
    ],
    ids=["H01", "H01-underscore", "H02", "H03", "H13"],
)
def test_headers_that_claim_something_change_nothing(door: Door, headers: list[tuple[str, bytes]], status: int) -> None:
    """The caller is who the key says, whatever else is sent."""
    good = ("authorization", f"Bearer {door.world.texts['good']}".encode())

    assert status == door.send([good, *headers])[0]


def test_a_service_accounts_token_lets_in_until_it_is_suspended(door: Door) -> None:
    """The control API is an issuer that every installation trusts; suspension ends what is already issued."""
    control = f"http://127.0.0.1:{door.installation.control_port}"
    tenant = door.installation.new_tenant("robots")
    account = door.installation.control(
        "POST", f"/v1/tenants/{tenant.tenant_id}/service-accounts", json={"name": "robot"}
    ).json()
    answer = httpx.post(
        f"{control}/oauth2/token", data={"grant_type": "client_credentials"},
        auth=(account["client_id"], account["client_secret"]),
    )  # fmt: skip
    bearer = [("authorization", f"Bearer {answer.json()['access_token']}".encode())]
    assert (200, None) == door.send(bearer)

    door.installation.control(
        "PATCH", f"/v1/service-accounts/{account['service_account_id']}", json={"state": "suspended"}
    )

    deadline = time.monotonic() + VISIBLE_SECONDS
    while (found := door.send(bearer)) == (200, None) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert (403, "service_account_suspended") == found


def test_an_address_that_is_claimed_opens_nothing(door: Door) -> None:
    """H02: a key bound to a network is judged by the connection's own address."""
    headers = [("authorization", f"Bearer {door.world.texts['elsewhere']}".encode()), ("x-forwarded-for", b"192.0.2.7")]

    assert (403, "address_not_allowed") == door.send(headers)


def test_nothing_that_was_presented_is_in_a_log(door: Door) -> None:
    """No key in any file of logs or journal."""
    texts = [door.world.texts[name] for name in door.world.rows]

    files = [path for place in ("log", "journal") for path in (door.installation.home / place).iterdir()]
    assert [] == [(path.name, text[:12]) for path in files for text in texts if text.encode() in path.read_bytes()]


def make_certificates(directory: Path) -> None:
    """A CA, a server, a known and an unknown client, and a client of another CA with the known one's name."""
    authority, stranger = _authority("clients and servers"), _authority("somebody else")
    (directory / "ca.pem").write_bytes(authority[0].public_bytes(serialization.Encoding.PEM))
    (directory / "clients.pem").write_bytes(authority[0].public_bytes(serialization.Encoding.PEM))
    uri, dns = x509.UniformResourceIdentifier, x509.DNSName
    for name, issuer, names in (
        ("server", authority, [dns("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
        ("batch", authority, [uri(SPIFFE)]),
        ("several", authority, [uri("spiffe://acme.example/first"), uri(SPIFFE), dns("batch.example")]),
        ("stranger", authority, [dns("stranger.example")]),
        ("forged", stranger, [uri(SPIFFE)]),
    ):
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = _builder(name, key, issuer[0].subject).add_extension(x509.SubjectAlternativeName(names), critical=False)
        signed = certificate.sign(issuer[1], hashes.SHA256())
        (directory / f"{name}.pem").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
        (directory / f"{name}.key").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )


def _authority(name: str) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    key = ec.generate_private_key(ec.SECP256R1())
    builder = _builder(name, key, x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
    return builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True).sign(key, hashes.SHA256()), key


def _builder(name: str, key: ec.EllipticCurvePrivateKey, issuer: x509.Name) -> x509.CertificateBuilder:
    now = dt.datetime.now(dt.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(minutes=5))
        .not_valid_after(now + dt.timedelta(days=1))
    )
