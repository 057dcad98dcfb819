# SPDX-License-Identifier: Apache-2.0
"""`POST /v1/explain`: would this request be let through, and which rule says so?"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from psycopg_pool import ConnectionPool
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from chassis import contract
from chassis.models import ModelCatalogue
from extauth.adapters import document
from extauth.adapters.directory import Directory
from extauth.adapters.explain import Question, explain, path_of
from extauth.core.decision import Rules
from extauth.core.identity import Ask


class ExplainRequest(BaseModel):
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


def add_explain(
    app: FastAPI,
    pool: ConnectionPool,
    *,
    home: Path,
    catalogue: Callable[[], ModelCatalogue],
    clock: Callable[[], datetime],
) -> None:
    """
    Add the route; *pool* reads keys as extauth does, *home* has the identity document.

    It answers for every tenant: whoever adds it puts it behind the right of a platform-admin.
    """

    @app.post("/v1/explain")
    def explain_decision(body: ExplainRequest) -> dict[str, Any]:
        return answer(body, pool, home=home, catalogue=catalogue(), clock=clock)


def answer(
    body: ExplainRequest, pool: ConnectionPool, *, home: Path, catalogue: ModelCatalogue, clock: Callable[[], datetime]
) -> dict[str, Any]:
    """Explain *body* against what Postgres and the identity document say now; nothing is remembered."""
    path = home / contract.IDENTITY_PATH
    policies = document.load(path).policies if path.exists() else ()
    ask = Ask(
        dialect=body.dialect, model=body.model, path=path_of(body.dialect), host=body.host, address=body.address,
        now=body.time or clock(),
    )  # fmt: skip
    question = Question(
        ask=ask, key_id=body.key_id, account_id=body.service_account_id, tenant_id=body.tenant,
        project_id=body.project, scopes=body.scopes, models=body.models,
    )  # fmt: skip
    return explain(question, Directory(pool, clock=clock), Rules(served=catalogue.served, policies=policies))
