# SPDX-License-Identifier: Apache-2.0
"""A control API on a real Postgres, called in this process, with a clock that a test moves."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.testclient import TestClient

from chassis.models import ModelCatalogue
from control import bootstrap
from control.api.app import build
from control.api.services import Services
from control.minting import Mint
from control.oauth import Issuer
from control.signing_keys import SigningKeys
from control.store import Store

ISSUER = "http://control.test"
CATALOGUE = ModelCatalogue.parse(
    {"models": [{"name": name, "engine": "openai", "endpoints": ["127.0.0.1:1"]} for name in ("tiny", "large")]},
    source="test",
)


@dataclass
class Clock:
    """The time, as far as the control plane can tell."""

    now: datetime = field(default_factory=lambda: datetime(2026, 3, 1, 12, tzinfo=UTC))

    def __call__(self) -> datetime:
        return self.now

    def forward(self, **duration: float) -> None:
        """Let time pass."""
        self.now += timedelta(**duration)


@dataclass(slots=True, kw_only=True)
class ControlPlane:
    """The API with its first operator, and shortcuts to what tests need."""

    services: Services
    app: FastAPI
    client: TestClient
    clock: Clock
    admin: str = ""
    #: Of the shared one only.
    acme: Tenant | None = None
    rival: Tenant | None = None

    def ask(self, method: str, path: str, token: str | None = None, **arguments: Any) -> Any:
        """Call as the platform-admin, or as the operator whose token is given."""
        headers = {"authorization": f"Bearer {token or self.admin}"} | arguments.pop("headers", {})
        return self.client.request(method, path, headers=headers, **arguments)

    def made(self, path: str, body: dict[str, Any], token: str | None = None, method: str = "POST") -> dict[str, Any]:
        """The document of a call that must succeed."""
        answer = self.ask(method, path, token, json=body)
        assert answer.is_success, answer.text
        return dict(answer.json())

    def operator(self, role: str, tenant: str | None = None) -> str:
        """The token of a new operator."""
        return str(self.made("/v1/operators", {"name": role, "role": role, "tenant": tenant})["token"])

    def tenant(self, name: str) -> Tenant:
        """A tenant with one of everything."""
        tenant_id = self.made("/v1/tenants", {"name": name})["tenant_id"]
        at = f"/v1/tenants/{tenant_id}"
        return Tenant(
            tenant_id=tenant_id,
            project_id=self.made(f"{at}/projects", {"name": f"{name} search"})["project_id"],
            key=self.made(f"{at}/keys", {"name": "key"}),
            account=self.made(f"{at}/service-accounts", {"name": "robot"}),
            operator=self.made("/v1/operators", {"name": "admin", "role": "tenant-admin", "tenant": tenant_id}),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """A tenant, and the documents of what it has."""

    tenant_id: str
    project_id: str
    key: dict[str, Any]
    account: dict[str, Any]
    operator: dict[str, Any]
    #: Only where a test has made one: it would be sent to.
    webhook: dict[str, Any] | None = None

    @property
    def admin(self) -> str:
        """Its tenant-admin's token."""
        return str(self.operator["token"])


def start(postgres_url: str, directory: Path, *, scanning_keys: Path | None = None) -> ControlPlane:
    """Build the API on the database at *postgres_url*, without any operator yet."""
    mint = Mint(peppers={1: secrets.token_bytes(32)}, random_bytes=secrets.token_bytes)
    clock = Clock()
    services = Services(
        store=Store(postgres_url), mint=mint, issuer=Issuer(url=ISSUER, keys=SigningKeys(directory), mint=mint),
        catalogue=lambda: CATALOGUE, clock=clock, bootstrap_token_path=directory / "bootstrap-token",
        scanning_keys_path=scanning_keys,
    )  # fmt: skip
    app = build(services)
    # A failure is answered as it would be in production, and then seen by the test.
    return ControlPlane(services=services, app=app, client=TestClient(app, raise_server_exceptions=False), clock=clock)


def sign_in_first(control: ControlPlane) -> None:
    """Make the first operator as anybody would: with the one-time token."""
    bootstrap.open_road(
        control.services.store, control.services.mint, control.services.bootstrap_token_path, now=control.clock.now
    )
    token = control.services.bootstrap_token_path.read_text().strip()
    answer = control.client.post("/v1/bootstrap", json={"token": token})
    assert answer.status_code == 201, answer.text
    control.admin = answer.json()["token"]
