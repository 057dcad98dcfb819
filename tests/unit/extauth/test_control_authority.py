# SPDX-License-Identifier: Apache-2.0
"""Keys of service accounts' tokens, from a control API whose certificate no public authority has signed."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from extauth.core.identity import Denial, Identity
from tests.certificates import Authority
from tests.identities import FakeDirectory, ask_function, bearer, identities_in, write_home
from tests.provider import Provider, dump


@contextmanager
def _control(provider: Provider, tls: Path) -> Iterator[None]:
    """Serve the key set of *provider*, and tell it where."""

    class Keys(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            document = dump(provider.jwks())
            self.send_response(200 if self.path == "/.well-known/jwks.json" else 404)
            self.send_header("content-length", str(len(document)))
            self.end_headers()
            self.wfile.write(document)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Keys)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tls / "tls.crt", tls / "tls.key")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    provider.url = f"https://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _entry(provider: Provider, kind: str) -> dict[str, Any]:
    if kind == "service_accounts":
        return {"name": "control", "kind": kind}
    return {
        "name": "other", "kind": kind, "issuer": provider.url, "jwks_url": f"{provider.url}/.well-known/jwks.json",
        "audiences": ["peaje"], "algorithms": ["ES256"], "tenants": ["acme"], "claims": {"tenant": "tenant"},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "is_named", "passes"),
    [("service_accounts", True, True), ("service_accounts", False, False), ("jwt", True, False)],
    ids=["control", "authority not named", "another issuer"],
)
def test_the_control_apis_own_authority_vouches_for_its_keys_alone(tmp_path: Path, kind: str, *, is_named: bool, passes: bool) -> None:
    """Whoever is signed by it is not thereby an issuer of tokens: what cannot be verified is not judged."""
    tls = Authority.make().fill(tmp_path / "tls", "control")
    provider, directory = Provider(), FakeDirectory()
    provider.add("es", "ES256")
    directory.add_account("sa_1")
    with _control(provider, tls):
        write_home(tmp_path, {"issuers": [_entry(provider, kind)]})
        authority = tls / "ca.crt" if is_named else None
        with closing(identities_in(tmp_path, directory, control_url=provider.url, control_authority=authority)) as identities:
            [source] = identities._built.sources.values()

            assert passes == source.refresh()
            answer = ask_function(identities, bearer(provider.mint(sub="sa_1", project="default", scope="inference")))

    assert isinstance(answer, Identity if passes else Denial)
    if isinstance(answer, Denial):
        assert "service_unavailable" == answer.refusal.code
