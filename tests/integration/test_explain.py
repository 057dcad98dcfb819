# SPDX-License-Identifier: Apache-2.0
"""`POST /v1/explain` says what the decision itself would, on the same Postgres."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.bad_inputs import world as worlds
from tests.integration.control_plane import ControlPlane, sign_in_first, start


@dataclass(frozen=True, kw_only=True)
class Explaining:
    """A control API beside the rows' keys."""

    control: ControlPlane
    world: worlds.World

    def ask(self, name: str | None, *, token: str | None = None, **fields: Any) -> Any:
        """Ask about a key by the rows' name for it."""
        named = {} if name is None else {"key_id": self.world.rows[name]["key_id"]}
        return self.control.ask("POST", "/v1/explain", token, json={"model": "tiny", **named, **fields})


@pytest.fixture
def explaining(postgres_url: str, tmp_path: Path) -> Explaining:
    """The whole control API, with policies."""
    control = start(postgres_url, tmp_path)
    (tmp_path / "identity.yaml").write_text(json.dumps({"policies": worlds.POLICIES}))
    object.__setattr__(control.services, "identity_path", tmp_path / "identity.yaml")
    sign_in_first(control)
    world = worlds.build({1: b"p" * 32}, control.clock())
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        worlds.store(world, connection, control.clock())
    return Explaining(control=control, world=world)


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
def test_the_rule_that_decides_is_named(
    explaining: Explaining, name: str | None, fields: dict[str, Any], rule: str | None, code: str | None
) -> None:
    """The same rule and code with which the request itself would be refused."""
    answer = explaining.ask(name, **fields).json()

    assert (rule is None, rule, code) == (answer["allowed"], answer["rule"], answer["code"])
    assert (rule or "let through") in answer["explanation"]
    refused = [step["rule"] for step in answer["steps"] if not step["passes"]]
    assert ([rule] if rule else []) == refused[:1]


def test_another_tenants_key_does_not_exist(explaining: Explaining) -> None:
    """Row-level security is under the explanation too."""
    ours, theirs = explaining.control.operator("tenant-admin", "acme"), explaining.control.operator("tenant-admin", "other")

    assert [200, 404] == [explaining.ask("good", token=token).status_code for token in (ours, theirs)]
    assert 404 == explaining.ask(None, token=theirs, tenant="acme").status_code


@pytest.mark.parametrize("body", [{}, {"key_id": "0123456789AB", "tenant": "acme"}, {"tenant": "acme", "dialect": "x"}, {"tenant": "acme", "nosuch": 1}])
def test_a_question_that_is_none_is_refused(explaining: Explaining, body: dict[str, Any]) -> None:
    """Exactly one caller, a known dialect, no unknown field."""
    assert 400 == explaining.control.ask("POST", "/v1/explain", json=body).status_code
