# SPDX-License-Identifier: Apache-2.0
"""A small OIDC issuer on loopback with its own signing keys: JWKS, introspection, and ways to be a bad one."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

AUDIENCE = "peaje"
CLIENT_SECRET = "7d0c5f1b9a2e4c6f8b3a1d5e9c7f2b4a6e8d0c1f"


@dataclass(slots=True)
class Issuer:
    """One issuer; its fields may be changed while it runs."""

    url: str = ""
    keys: dict[str, Any] = field(default_factory=dict)
    #: What /jwks answers instead of the keys.
    jwks: bytes | None = None
    jwks_status: int = 200
    jwks_fetches: int = 0
    #: What /introspect answers, by token.
    introspections: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    introspected: int = 0
    paths: list[str] = field(default_factory=list)

    def add_key(self, kid: str, *, kind: str = "EC") -> None:
        """Publish another signing key."""
        self.keys[kid] = (
            ec.generate_private_key(ec.SECP256R1())
            if kind == "EC"
            else rsa.generate_private_key(public_exponent=65537, key_size=2048)
        )

    def document(self) -> bytes:
        """The key set."""
        entries = []
        for kid, key in self.keys.items():
            is_rsa = isinstance(key, rsa.RSAPrivateKey)
            algorithm = jwt.get_algorithm_by_name("RS256" if is_rsa else "ES256")
            entry = algorithm.to_jwk(key.public_key(), as_dict=True)
            entries.append({**entry, "kid": kid, "use": "sig", "alg": "RS256" if is_rsa else "ES256"})
        return json.dumps({"keys": entries}).encode()

    def claims(self, **changes: Any) -> dict[str, Any]:
        """Claims of a good token, less those that are changed to None."""
        now = int(time.time())
        claims = {
            "iss": self.url, "aud": AUDIENCE, "sub": "somebody", "tenant": "acme", "exp": now + 300, "iat": now, **changes,
        }  # fmt: skip
        return {name: value for name, value in claims.items() if value is not None}

    def token(self, kid: str = "one", *, header: Mapping[str, Any] | None = None, **changes: Any) -> str:
        """A token signed with the key *kid*."""
        key = self.keys[kid]
        algorithm = "RS256" if isinstance(key, rsa.RSAPrivateKey) else "ES256"
        return jwt.encode(
            self.claims(**changes), key, algorithm=algorithm, headers={"typ": "at+jwt", "kid": kid, **(header or {})}
        )

    def signed(self, header: str, payload: str, kid: str = "one") -> str:
        """Sign two JSON texts as they are, so that they need not be what a library would write."""
        text = f"{encode(header.encode())}.{encode(payload.encode())}"
        algorithm = jwt.get_algorithm_by_name("ES256")
        return f"{text}.{encode(algorithm.sign(text.encode(), self.keys[kid]))}"

    def public_pem(self, kid: str) -> bytes:
        """The public key as PEM, for attacks that use it as a secret."""
        return self.keys[kid].public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def encode(data: bytes) -> str:
    """base64url without padding."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


@contextmanager
def serving() -> Iterator[Issuer]:
    """An issuer with one EC key `one` and one RSA key `rsa`, on a free port."""
    issuer = Issuer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            issuer.paths.append(self.path)
            if self.path == "/jwks":
                issuer.jwks_fetches += 1
                self._answer(issuer.jwks_status, issuer.jwks if issuer.jwks is not None else issuer.document())
            else:
                self._answer(404, b"{}")

        def do_POST(self) -> None:
            form = parse_qs(self.rfile.read(int(self.headers["content-length"])).decode())
            issuer.introspected += 1
            expected = "Basic " + base64.b64encode(f"peaje:{CLIENT_SECRET}".encode()).decode()
            if self.headers["authorization"] != expected:
                self._answer(401, b"{}")
            else:
                self._answer(*issuer.introspections.get(form["token"][0], (200, b'{"active": false}')))

        def _answer(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    issuer.add_key("one")
    issuer.add_key("rsa", kind="RSA")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    issuer.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield issuer
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def document(issuer: Issuer, **changes: Any) -> dict[str, Any]:
    """An identity document that trusts *issuer* for tenant acme, by JWT and by introspection."""
    entry = {
        "name": "idp", "kind": "jwt", "issuer": issuer.url, "jwks_url": f"{issuer.url}/jwks", "audiences": [AUDIENCE],
        "algorithms": ["ES256", "RS256", "PS256"], "tenants": ["acme"], "claims": {"tenant": "tenant"}, **changes,
    }  # fmt: skip
    opaque = {
        "name": "opaque", "kind": "introspection", "url": f"{issuer.url}/introspect", "client_id": "peaje",
        "client_secret_file": "secrets/introspection", "token_prefix": "op_", "tenants": ["acme"],
        "claims": {"tenant": "tenant"},
    }  # fmt: skip
    return {"issuers": [entry, opaque]}
