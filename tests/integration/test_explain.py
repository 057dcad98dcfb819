# SPDX-License-Identifier: Apache-2.0
"""`POST /v1/explain` says what the decision itself would, on the same Postgres."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from chassis.clock import utc_now
from chassis.stores.postgres import read_pool
from control.api.explain_decision import add_explain
from tests.bad_inputs import world as worlds
from tests.bad_inputs.service import CATALOGUE


@pytest.fixture
def ask(postgres_url: str, tmp_path: Path) -> Iterator[Any]:
    """Ask about a key by the rows' name for it; the whole answer."""
    now = utc_now()
    world = worlds.build({1: b"p" * 32}, now)
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        worlds.store(world, connection, now)
    (tmp_path / "identity.yaml").write_text(json.dumps({"policies": worlds.POLICIES}))
    pool = read_pool(postgres_url, name="control", connections=2)
    app = FastAPI()
    add_explain(app, pool, home=tmp_path, catalogue=lambda: CATALOGUE, clock=utc_now)
    client = TestClient(app)

    def call(name: str | None, **fields: Any) -> dict[str, Any]:
        named = {} if name is None else {"key_id": world.rows[name]["key_id"]}
        answer = client.post("/v1/explain", json={"model": "tiny", **named, **fields})
        assert 200 == answer.status_code, answer.text
        return answer.json()

    yield call
    pool.close()


@pytest.mark.parametrize(
    ("name", "fields", "rule", "code"),
    [
        ("good", {}, None, None),
        ("good", {"model": "unheard"}, "model_served", "model_not_found"),
        ("good", {"host": "b.example"}, "policy:own-host", "policy_denied"),
        ("revoked", {}, "not_revoked", "invalid_api_key"),
        ("disabled", {}, "key_active", "key_disabled"),
        ("suspended", {}, "tenant_active", "tenant_suspended"),
        ("here", {"address": "203.0.113.9"}, "address_allowed", "address_not_allowed"),
        ("here", {"address": "127.0.0.1"}, None, None),
        ("embeddings_only", {}, "scope_allowed", "scope_not_allowed"),
        ("embeddings_only", {"dialect": "openai.embeddings"}, None, None),
        ("denied_model", {}, "model_allowed", "model_not_allowed"),
        (None, {"tenant": "acme", "project": "frozen"}, "project_active", "project_suspended"),
        (None, {"service_account_id": "sa_0123456789AB"}, "service_account_active", "service_account_suspended"),
    ],
)
def test_the_rule_that_decides_is_named(ask: Any, name: str | None, fields: dict[str, Any], rule: str | None, code: str | None) -> None:
    """The same rule and code with which the request itself would be refused."""
    answer = ask(name, **fields)

    assert (rule is None, rule, code) == (answer["allowed"], answer["rule"], answer["code"])
    assert (rule or "let through") in answer["explanation"]
    refused = [step["rule"] for step in answer["steps"] if not step["passes"]]
    assert ([rule] if rule else []) == refused[:1]
