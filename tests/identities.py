# SPDX-License-Identifier: Apache-2.0
"""What tests of tokens share: the rows, a document that trusts a test's provider, extauth behind a real gRPC socket."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml

from chassis import contract
from chassis.clock import utc_now
from chassis.errors import Unavailable
from chassis.models import ModelCatalogue
from chassis.wire import ext_authz_pb2 as wire
from extauth.adapters.identities import Identities
from extauth.core import decision
from extauth.core.credential import find_credential
from extauth.core.identity import AccountState, Ask, Denial, Identity, Standing
from extauth.core.patterns import NOTHING
from extauth.core.strangers import Strangers
from extauth.servicer import METHOD, Servicer
from tests.provider import CLIENT_ID, CLIENT_SECRET, Provider

ROWS: list[dict[str, Any]] = yaml.safe_load((Path(__file__).parent / "bad_inputs/tokens.yaml").read_text())["rows"]
SECRET_FILE = "secrets/corp"
SPIFFE_ID = "spiffe://example.com/ns/prod/sa/chat"
SERVED = frozenset({"tiny"})
ACTIVE = Standing(tenant_active=True, project_active=True)


def rows(scenario: str | None = None) -> list[Any]:
    """The rows with a recipe, or those of a scenario, named by their ids."""
    chosen = [row for row in ROWS if row.get("scenario") == scenario]
    return [pytest.param(row, id=row["id"]) for row in chosen]


def document_for(provider: Provider, *, tenant: str = "acme", **changes: Any) -> dict[str, Any]:
    """Trusts *provider* for one tenant: its signed tokens, its introspection, and one certificate."""
    common = {"tenants": [tenant], "claims": {"tenant": "tenant", "project": "project", "models": "models"}}
    return {
        "issuers": [
            {
                "name": "idp", "kind": "jwt", "issuer": provider.url, "jwks_url": f"{provider.url}/jwks",
                "audiences": ["peaje"], "algorithms": ["ES256", "RS256", "PS256"], **common, **changes,
            },
            {
                "name": "corp", "kind": "introspection", "url": f"{provider.url}/introspect", "client_id": CLIENT_ID,
                "client_secret_file": SECRET_FILE, "token_prefix": "opaque-", **common,
            },
        ],
        "certificates": [{"name": "chat", "san": SPIFFE_ID, "tenant": tenant}],
    }  # fmt: skip


def write_home(home: Path, document: dict[str, Any]) -> None:
    """A state directory with the document and the secret that it names."""
    secret = home / SECRET_FILE
    secret.parent.mkdir(exist_ok=True)
    secret.write_text(CLIENT_SECRET)
    secret.chmod(0o600)
    write_document(home, document)


def write_document(home: Path, document: dict[str, Any] | str) -> None:
    """Replace the document whole, as an editor does."""
    text = document if isinstance(document, str) else yaml.safe_dump(document)
    temporary = home / "identity.new"
    temporary.write_text(text)
    temporary.replace(home / contract.IDENTITY_PATH)


@dataclass
class FakeDirectory:
    """Who exists, as a test says it."""

    projects: dict[tuple[str, str], Standing] = field(default_factory=lambda: {("acme", "default"): ACTIVE})
    accounts: dict[str, AccountState] = field(default_factory=dict)
    is_away: bool = False

    def find(self, key_id: str) -> None:
        """There are no keys here."""
        del key_id

    def remembers(self, key_id: str) -> bool:
        """As `Directory`: nothing is."""
        del key_id
        return False

    def find_project(self, tenant_id: str, project_id: str) -> Standing | None:
        """As `Directory`."""
        if self.is_away:
            raise Unavailable("Postgres did not answer.")
        return self.projects.get((tenant_id, project_id))

    def find_account(self, account_id: str) -> AccountState | None:
        """As `Directory`."""
        return self.accounts.get(account_id)

    def add_account(self, account_id: str, **changes: Any) -> None:
        """Know a service account of acme's."""
        facts = {
            "tenant_id": "acme", "project_id": "default", "is_active": True, "scopes": None, "models": None,
            "denied_models": NOTHING, "standing": ACTIVE,
        } | changes  # fmt: skip
        self.accounts[account_id] = AccountState(**facts)


class Call:
    """What Envoy's call has beside its message: the client's address, if it tells one."""

    def __init__(self, address: str = "") -> None:
        self._metadata = ((contract.ADDRESS_CALL_METADATA, address),) if address else ()

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        """As gRPC has it."""
        return self._metadata


def identities_in(
    home: Path, directory: FakeDirectory, *, control_url: str = "http://127.0.0.1:1", control_authority: Path | None = None,
    strangers: Strangers | None = None,
) -> Identities:
    """Everybody who may call by the document in *home*."""
    return Identities(
        directory, peppers={1: b"p" * 32}, writes=None, home=home, control_url=control_url,  # type: ignore[arg-type]
        control_authority=control_authority, strangers=strangers,
    )  # fmt: skip


def ask_function(
    identities: Identities, *headers: tuple[str, bytes], subject: str | tuple[str, ...] = ""
) -> Identity | Denial:
    """Decide a chat request without a transport; *subject* is what the peer's certificate says, once or several times."""
    ask = Ask(
        dialect="openai.chat", model="tiny", path="/v1/chat/completions", host="h", address="127.0.0.1", now=utc_now()
    )
    names = (subject,) if isinstance(subject, str) and subject else tuple(subject)
    credential = find_credential(headers, names=names)
    identity = credential if isinstance(credential, Denial) else identities.identify(credential, ask, names=names)
    return decision.decide(ask, credential, identity, decision.Rules(served=SERVED, policies=identities.policies))


@contextmanager
def serving(socket: Path, identities: Identities) -> Iterator[Callable[..., wire.CheckResponse]]:
    """Serve extauth on *socket*; gives a function that asks it as Envoy does."""
    served = ModelCatalogue.parse({"models": [{"name": "tiny", "engine": "openai", "endpoints": ["h:1"]}]}, source="test")
    servicer = Servicer(identities, catalogue=lambda: served, clock=utc_now)
    server = grpc.server(ThreadPoolExecutor(4))
    _, service, method = METHOD.split("/")
    handler = grpc.unary_unary_rpc_method_handler(
        servicer.check, request_deserializer=wire.CheckRequest.FromString,
        response_serializer=wire.CheckResponse.SerializeToString,
    )  # fmt: skip
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
    server.add_insecure_port(f"unix:{socket}")
    server.start()
    with grpc.insecure_channel(f"unix:{socket}", options=[("grpc.max_send_message_length", 8 << 20)]) as channel:
        check = channel.unary_unary(
            METHOD, request_serializer=wire.CheckRequest.SerializeToString,
            response_deserializer=wire.CheckResponse.FromString,
        )  # fmt: skip
        yield lambda *headers, subject="": check(check_request(*headers, subject=subject), timeout=10)
    server.stop(0).wait()


def check_request(*headers: tuple[str, bytes], subject: str = "") -> wire.CheckRequest:
    """What Envoy asks of a chat request with these *headers* from the holder of a certificate."""
    request = wire.CheckRequest()
    request.attributes.source.principal = subject
    for name, value in headers:
        request.attributes.request.http.header_map.headers.add(key=name, raw_value=value)
    facts = request.attributes.metadata_context.filter_metadata[contract.NS_REQUEST]
    facts.fields[contract.REQ_DIALECT].string_value = "openai.chat"
    facts.fields[contract.REQ_MODEL].string_value = "tiny"
    return request


def bearer(text: str) -> tuple[str, bytes]:
    """The header that carries *text*."""
    return contract.AUTHORIZATION_HEADER, b"Bearer " + text.encode()
