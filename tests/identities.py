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
import yaml

from chassis import contract
from chassis.clock import utc_now
from chassis.errors import Unavailable
from chassis.models import Endpoint, Model, ModelCatalogue
from chassis.wire import ext_authz_pb2 as wire
from extauth.adapters.tokens import Tokens, Verifiers
from extauth.core.token import Account
from extauth.servicer import METHOD, Servicer
from tests.provider import CLIENT_ID, Provider

ROWS: list[dict[str, Any]] = yaml.safe_load((Path(__file__).parent / "bad_inputs/tokens.yaml").read_text())["rows"]
SECRET_FILE = "secrets/corp"
SPIFFE_ID = "spiffe://example.com/ns/prod/sa/chat"


def rows(scenario: str | None = None) -> list[Any]:
    """The rows with a recipe, or those of a scenario, named by their ids."""
    import pytest  # noqa: PLC0415 - this module is also read without it

    chosen = [row for row in ROWS if row.get("scenario") == scenario and ("token" in row) == (scenario is None)]
    return [pytest.param(row, id=row["id"]) for row in chosen]


def document_for(provider: Provider, *, tenant: str = "acme", inline: bool = False, **changes: Any) -> dict[str, Any]:
    """Trusts *provider* for one tenant: its signed tokens, its introspection, and one certificate."""
    keys = {"jwks": provider.jwks()} if inline else {"jwks_url": f"{provider.url}/jwks"}
    return {
        "issuers": [
            {
                "kind": "jwt", "issuer": provider.url, **keys, "audiences": ["peaje"],
                "algorithms": ["ES256", "RS256", "PS256"], "tenants": [tenant], **changes,
            },
            {
                "kind": "introspection", "name": "corp", "url": f"{provider.url}/introspect", "client_id": CLIENT_ID,
                "client_secret_file": SECRET_FILE, "tenants": [tenant], "prefix": "opaque-", "without_scope": "every",
            },
        ],
        "certificates": [{"uri": "spiffe://example.com/ns/prod/sa/*", "tenant": tenant}],
    }  # fmt: skip


@dataclass
class FakeAccounts:
    """Our own record: tenants and service accounts by name, as they are changed."""

    known: dict[tuple[str, str, str | None], Account] = field(default_factory=dict)
    is_away: bool = False

    def add(self, tenant: str, project: str = "default", account: str | None = None, **changes: Any) -> None:
        """Know an active one, or one that differs as said."""
        facts = {"tenant_active": True, "project_active": True, "account_active": True} | changes
        self.known[tenant, project, account] = Account(**facts)

    def find(self, tenant_id: str, project_id: str, service_account_id: str | None) -> Account | None:
        """As `Accounts`."""
        if self.is_away:
            raise Unavailable("Postgres did not answer.")
        return self.known.get((tenant_id, project_id, service_account_id))


class NoKeys:
    """A directory without any key."""

    def find(self, key_id: str) -> None:
        """None."""
        del key_id


@contextmanager
def serving(socket: Path, verifiers: Callable[[], Verifiers | None], accounts: FakeAccounts) -> Iterator[Callable[..., wire.CheckResponse]]:
    """Serve extauth on *socket*; gives a function that asks it as Envoy does."""
    tokens = Tokens(verifiers, accounts)  # type: ignore[arg-type]
    models = (Model(name="tiny", engine="openai", endpoints=(Endpoint(scheme="http", host="h", port=1),)),)
    servicer = Servicer(
        NoKeys(), peppers={1: b"p" * 32}, catalogue=lambda: ModelCatalogue(models=models), clock=utc_now,  # type: ignore[arg-type]
        tokens=tokens,
    )  # fmt: skip
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
