# SPDX-License-Identifier: Apache-2.0
"""Answer `POST /v1/explain`: would this request be let through, and which rule says so."""

from __future__ import annotations

from typing import Any, LiteralString

from fastapi import FastAPI
from psycopg.rows import tuple_row
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from control.act import Act
from control.api.access import CurrentAct, needs
from control.api.services import Services
from control.core.roles import Permission
from control.store import Store
from extauth.adapters import directory, document
from extauth.adapters import explain as explaining
from extauth.core.decision import Rules
from extauth.core.identity import AccountState, Ask, KeyState, Standing


class Question(BaseModel):
    """A request that is not sent; name one of `key_id`, `service_account_id`, `tenant`."""

    model_config = ConfigDict(extra="forbid")

    key_id: str | None = Field(default=None, max_length=64)
    service_account_id: str | None = Field(default=None, max_length=64)
    tenant: str | None = Field(default=None, max_length=63)
    project: str = Field(default="default", max_length=63)
    scopes: list[str] | None = Field(default=None, max_length=50)
    models: list[str] | None = Field(default=None, max_length=200)
    model: str | None = Field(default=None, max_length=200)
    dialect: str = Field(default="openai.chat", max_length=64)
    address: str = Field(default="127.0.0.1", max_length=45)
    host: str = Field(default="localhost", max_length=255)
    time: AwareDatetime | None = Field(default=None, description="When; now if left out.")


def add(app: FastAPI, services: Services) -> None:
    """Add the route to *app*. It asks as the operator may see: another tenant's key does not exist."""

    @app.post("/v1/explain", **needs(Permission.REQUESTS_READ))
    def explain_decision(body: Question, act: CurrentAct) -> dict[str, Any]:
        path = services.identity_path
        policies = document.load(path).policies if path is not None and path.exists() else ()
        ask = Ask(
            dialect=body.dialect, model=body.model, path=explaining.path_of(body.dialect), host=body.host,
            address=body.address, now=body.time or act.now,
        )  # fmt: skip
        question = explaining.Question(
            ask=ask, key_id=body.key_id, account_id=body.service_account_id, tenant_id=body.tenant,
            project_id=body.project, scopes=body.scopes, models=body.models,
        )  # fmt: skip
        rules = Rules(served=services.catalogue().served, policies=policies)
        return explaining.explain(question, StoredIdentities(services.store, act), rules)


class StoredIdentities:
    """extauth's own queries, run within the tenants of an act; nothing is remembered."""

    def __init__(self, store: Store, act: Act) -> None:
        self._store = store
        self._act = act

    def find(self, key_id: str) -> KeyState | None:
        """The state of a key."""
        row = self._row(directory.KEY_BY_ID, (key_id,))
        return None if row is None else directory.read_key(row, self._act.now)[0]

    def find_account(self, account_id: str) -> AccountState | None:
        """The state of a service account."""
        row = self._row(directory.ACCOUNT_BY_ID, (account_id,))
        return None if row is None else directory.read_account(row, self._act.now)[0]

    def find_project(self, tenant_id: str, project_id: str) -> Standing | None:
        """The standing of a project."""
        row = self._row(directory.PROJECT_BY_ID, (tenant_id, project_id))
        return None if row is None else directory.read_standing(*row)

    def _row(self, query: LiteralString, arguments: tuple[str, ...]) -> tuple[Any, ...] | None:
        with self._store.transaction(self._act.scope) as connection:
            return connection.cursor(row_factory=tuple_row).execute(query, arguments).fetchone()
