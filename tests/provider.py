# SPDX-License-Identifier: Apache-2.0
"""
A small identity provider on loopback: own keys, discovery, key set, introspection, and faults at will.

The instrument of every test about tokens. It signs anything it is asked to; `Recipe` says how a token
is to be wrong.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

CLIENT_ID, CLIENT_SECRET = "peaje", "Vt7-qLw2_Zx8mNb4Kr9sHd3fGj6pTy1c"

#: Made once: an RSA key takes a while.
RSA_KEY = rsa.generate_private_key(65537, 2048)


def encode(data: bytes) -> str:
    """Base64url without padding."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def dump(value: object) -> bytes:
    """JSON without white space."""
    return json.dumps(value, separators=(",", ":")).encode()


def public_jwk(key: Any, kid: str, algorithm: str) -> dict[str, Any]:
    """The public half of *key* as a JWK."""
    made = jwt.get_algorithm_by_name(algorithm).to_jwk(key.public_key(), as_dict=True)
    return {**made, "kid": kid, "alg": algorithm, "use": "sig"}


@dataclass
class Provider:
    """An issuer. Counts what it is asked; `fault` changes what it answers to the key set's URL."""

    url: str = ""
    #: By kid: algorithm and private key.
    signers: dict[str, tuple[str, Any]] = field(default_factory=dict)
    #: Kids that are published; None: all.
    published: set[str] | None = None
    #: One of `_FAULTS`, or "".
    fault: str = ""
    #: What introspection answers, by token: a document, or its text as it is. Absent: inactive.
    active: dict[str, Any] = field(default_factory=dict)
    #: "500", "html", "slow", or "".
    introspection_fault: str = ""
    fetches: int = 0
    introspections: int = 0
    elsewhere: int = 0

    def add(self, kid: str, algorithm: str, key: Any = None) -> None:
        """Make a key that signs with *algorithm*."""
        makers = {
            "ES256": lambda: ec.generate_private_key(ec.SECP256R1()), "ES384": lambda: ec.generate_private_key(ec.SECP384R1()),
            "EdDSA": ed25519.Ed25519PrivateKey.generate, "RS256": lambda: RSA_KEY, "PS256": lambda: RSA_KEY,
        }  # fmt: skip
        self.signers[kid] = (algorithm, key or makers[algorithm]())

    def jwks(self) -> dict[str, Any]:
        """The key set."""
        kids = self.signers if self.published is None else self.published
        return {"keys": [public_jwk(self.signers[kid][1], kid, self.signers[kid][0]) for kid in kids]}

    def claims(self, **changes: Any) -> dict[str, Any]:
        """Claims of a good access token for tenant `acme`; a change to None leaves one out."""
        now = int(time.time())
        made = {
            "iss": self.url, "sub": "user-7", "aud": "peaje", "iat": now, "exp": now + 600, "jti": f"{now}",
            "client_id": "app", "tenant": "acme", "scope": "inference models embeddings",
        } | changes  # fmt: skip
        return {name: value for name, value in made.items() if value is not None}

    def mint(self, kid: str = "es", **changes: Any) -> str:
        """A good token, or one whose claims differ as said."""
        algorithm, key = self.signers[kid]
        return jwt.encode(self.claims(**changes), key, algorithm, headers={"kid": kid, "typ": "at+jwt"})

    def cook(self, recipe: Mapping[str, Any], tenant: str = "acme") -> str:
        """
        The token of a row of tests/bad_inputs/tokens.yaml.

        `header` and `claims` change a good token's (null leaves a member out, {in: N} is N seconds from
        now, {url: S} is the issuer with S behind it); `header_text`, `claims_text` stand before the last
        brace as they are; `nest` puts so many lists into a claim, `pad` so many letters; `sign` says how.
        """
        if "raw" in recipe:
            return str(recipe["raw"]) * int(recipe.get("times", 1))
        kid = str(recipe.get("key", "es"))
        header = {"alg": self.signers[kid][0], "kid": kid, "typ": "at+jwt"}
        header = _changed(header, recipe.get("header", {}), self.url)
        claims = _changed(self.claims(tenant=tenant), recipe.get("claims", {}), self.url)
        if "pad" in recipe:
            claims["pad"] = "a" * recipe["pad"]
        header_bytes = _with_text(dump(header), recipe.get("header_text", ""))
        claims_bytes = _with_text(dump(claims), recipe.get("claims_text", ""))
        if "nest" in recipe:
            depth = recipe["nest"]
            claims_bytes = claims_bytes[:-1] + b',"nest":' + b"[" * depth + b"]" * depth + b"}"
        signing_input = f"{encode(header_bytes)}.{encode(claims_bytes)}".encode()
        return f"{signing_input.decode()}.{encode(self._sign(recipe.get('sign', 'key'), kid, signing_input))}"

    def _sign(self, how: str, kid: str, signing_input: bytes) -> bytes:
        algorithm, key = self.signers[kid]
        if how in _CONFUSIONS:
            return hmac.digest(_CONFUSIONS[how](public_jwk(key, kid, algorithm), key), signing_input, hashlib.sha256)
        if how == "other_text":
            signing_input, how = signing_input + b"A", "key"
        if how in ("none", "zeros"):
            return b"" if how == "none" else bytes(64)
        if how == "stranger":
            algorithm, key = "ES256", ec.generate_private_key(ec.SECP256R1())
        elif how != "key":
            algorithm = how
        return jwt.get_algorithm_by_name(algorithm).sign(signing_input, key)


def _pem(key: Any, form: serialization.PublicFormat) -> bytes:
    return key.public_key().public_bytes(serialization.Encoding.PEM, form)


#: What an attacker takes for the secret of an HMAC.
_CONFUSIONS: dict[str, Callable[[dict[str, Any], Any], bytes]] = {
    "hmac_pem": lambda _, key: _pem(key, serialization.PublicFormat.SubjectPublicKeyInfo),
    "hmac_pem_indented": lambda _, key: b"\n  " + _pem(key, serialization.PublicFormat.SubjectPublicKeyInfo),
    "hmac_pkcs1": lambda _, key: _pem(key, serialization.PublicFormat.PKCS1),
    "hmac_jwk": lambda jwk, _: dump(jwk),
}


def _changed(members: dict[str, Any], changes: Mapping[str, Any], url: str) -> dict[str, Any]:
    made = dict(members)
    for name, value in changes.items():
        if value is None:
            made.pop(name, None)
        elif isinstance(value, dict) and set(value) == {"in"}:
            made[name] = int(time.time()) + value["in"]
        elif isinstance(value, dict) and set(value) == {"url"}:
            made[name] = url + value["url"]
        elif isinstance(value, dict) and set(value) == {"long"}:
            made[name] = "a" * value["long"]
        else:
            made[name] = value
    return made


def _with_text(document: bytes, text: str) -> bytes:
    return document[:-1] + text.encode() + b"}" if text else document


@contextmanager
def running_provider(**settings: Any) -> Iterator[Provider]:
    """A provider that listens, with an ES256 key `es` and an RS256 key `rs`."""
    provider = Provider(**settings)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(provider))
    server.daemon_threads = True
    provider.url = f"http://127.0.0.1:{server.server_address[1]}"
    provider.add("es", "ES256")
    provider.add("rs", "RS256")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield provider
    finally:
        server.shutdown()
        server.server_close()


#: What the key set's URL answers instead: a status, a type, and the body made of the good set.
_FAULTS: dict[str, tuple[int, str, Callable[[dict[str, Any]], bytes]]] = {
    "500": (500, "text/plain", lambda _: b"oops"),
    "html": (200, "text/html", lambda _: b"<html><body>Sign in</body></html>"),
    "huge": (200, "application/json", lambda good: dump({**good, "pad": "a" * (10 << 20)})),
    "redirect": (302, "text/plain", lambda _: b""),
    "doubled_member": (200, "application/json", lambda good: dump(good)[:-1] + b',"keys":[]}'),
    "many": (200, "application/json", lambda good: dump({"keys": good["keys"] * 30})),
    "empty": (200, "application/json", lambda _: dump({"keys": []})),
    "malformed_key": (
        200, "application/json",
        lambda good: dump({"keys": [
            {"kty": "RSA", "kid": "bad", "alg": "RS256", "n": "AA", "e": "A"},
            {"kty": "RSA", "kid": "worse", "alg": "RS256", "n": 7, "e": None}, None, *good["keys"],
        ]}),
    ),
}  # fmt: skip


def _handler(provider: Provider) -> type[BaseHTTPRequestHandler]:  # noqa: C901 - one class, its branches are one question each
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/jwks":
                provider.fetches += 1
                status, kind, make = _FAULTS.get(provider.fault, (200, "application/json", dump))
                self._answer(status, make(provider.jwks()), kind=kind)
            elif self.path == "/.well-known/openid-configuration":
                self._answer(200, dump({"issuer": provider.url, "jwks_uri": f"{provider.url}/jwks"}))
            else:
                provider.elsewhere += 1
                self._answer(404, b"{}")

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"])).decode()
            provider.introspections += 1
            expected = "Basic " + base64.b64encode(f"{CLIENT_ID}:{CLIENT_SECRET}".encode()).decode()
            if self.path != "/introspect" or self.headers["authorization"] != expected:
                self._answer(401, b"{}")
            elif provider.introspection_fault == "500":
                self._answer(500, b"{}")
            elif provider.introspection_fault == "html":
                self._answer(200, b"<html>")
            else:
                if provider.introspection_fault == "slow":
                    time.sleep(1.0)
                answer = provider.active.get(parse_qs(body)["token"][0], {"active": False})
                self._answer(200, answer.encode() if isinstance(answer, str) else dump(answer))

        def _answer(self, status: int, body: bytes, *, kind: str = "application/json") -> None:
            with contextlib.suppress(OSError):  # the asker had enough
                self.send_response(status)
                self.send_header("content-type", kind)
                self.send_header("content-length", str(len(body)))
                if status == 302:
                    self.send_header("location", f"{provider.url}/elsewhere")
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    return Handler
