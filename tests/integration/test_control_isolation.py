# SPDX-License-Identifier: Apache-2.0
"""
One tenant never sees or touches another's: the matrix of every route, and the database beneath it.

The matrix is made from the application's own OpenAPI document, so a new route is in it or fails it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import psycopg
import pytest

from control.act import ALL_TENANTS, OneTenant
from control.api.access import DECLARATION, PUBLIC, check_declared, routes
from control.core.roles import Permission, Role, can_be_held, may
from tests.integration.control_plane import ControlPlane, Tenant

#: A valid body for every route that takes one, so that a refusal is about the object and not the body.
#: A new route without one here fails the matrix.
BODIES: dict[tuple[str, str], dict[str, Any]] = {
    ("POST", "/v1/tenants"): {"name": "another"},
    ("PATCH", "/v1/tenants/{tenant}"): {"state": "suspended"},
    ("POST", "/v1/tenants/{tenant}/projects"): {"name": "another"},
    ("PATCH", "/v1/tenants/{tenant}/projects/{project}"): {"state": "suspended"},
    ("POST", "/v1/tenants/{tenant}/keys"): {"name": "another"},
    ("PATCH", "/v1/keys/{key_id}"): {"state": "disabled"},
    ("POST", "/v1/keys/{key_id}/rotate"): {"overlap": "1h"},
    ("POST", "/v1/tenants/{tenant}/service-accounts"): {"name": "another"},
    ("PATCH", "/v1/service-accounts/{service_account_id}"): {"state": "suspended"},
    ("POST", "/v1/service-accounts/{service_account_id}/rotate"): {"overlap": "1h"},
    ("POST", "/v1/operators"): {"name": "another", "role": "developer"},
    ("POST", "/v1/explain"): {"tenant": "acme"},
    ("PUT", "/v1/tenants/{tenant}/limits"): {"requests_per_minute": 1},
    ("PUT", "/v1/tenants/{tenant}/weight"): {"weight": 2},
    ("PUT", "/v1/capacities"): {"model": "tiny", "slots": 8},
    ("POST", "/v1/signing-keys/rotate"): {},
    ("POST", "/v1/prices"): {"model": "tiny", "input": "0.15", "output": "0.60"},
    ("POST", "/v1/periods/{month}/close"): {},
    ("POST", "/v1/webhooks"): {"url": "https://example.com/hook"},
    ("POST", "/v1/webhooks/{webhook_id}/rotate-secret"): {"overlap": "1h"},
    ("POST", "/v1/webhooks/{webhook_id}/resume"): {"skip": True},
    ("PUT", "/v1/webhooks/{webhook_id}/customers/{tenant}"): {"customer": "cus_1"},
    ("POST", "/v1/usage"): {
        "items": [{"id": "x", "tenant": "acme", "model": "tiny", "input_tokens": 1, "output_tokens": 1, "started_at": "2026-03-01T11:00:00Z"}]
    },
    ("POST", "/v1/reratings"): {"model": "tiny", "month": "2026-01", "input": "1", "output": "2", "reason": "wrong"},
    ("POST", "/v1/tenants/{tenant}/credits"): {"amount": "10", "reason": "paid"},
    ("POST", "/v1/tenants/{tenant}/credits/{grant_id}/expire"): {"reason": "refunded"},
    ("POST", "/v1/reconciliation/{exception_id}/explain"): {"note": "why"},
    ("POST", "/v1/reconciliation/{exception_id}/sign"): {"note": "why"},
    ("POST", "/v1/journals/{journal}/retire"): {"reason": "why", "files": "gone"},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One verb on one path of the OpenAPI document."""

    method: str
    path: str
    document: dict[str, Any]

    @property
    def names(self) -> list[str]:
        """Parameters of the path."""
        return re.findall(r"{(\w+)}", self.path)

    @property
    def objects(self) -> list[str]:
        """Parameters of the path that name something of a tenant; months, exceptions and journals are the platform's."""
        return [name for name in self.names if name not in ("month", "exception_id", "journal")]

    def at(self, values: dict[str, str]) -> str:
        """The path with *values* in it; an unknown parameter is a hole in the matrix, and fails."""
        return self.path.format(**{name: values[name] for name in self.names})

    def body(self) -> dict[str, Any] | None:
        """A valid body; a route that takes one and has none here fails."""
        return BODIES[(self.method, self.path)] if "requestBody" in self.document else None


def operations(control: ControlPlane) -> list[Operation]:
    """Every operation that is not public."""
    document = control.ask("GET", "/v1/openapi.json").json()
    return [
        Operation(method=method.upper(), path=path, document=operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
        if operation[DECLARATION] != PUBLIC
    ]


def values_of(tenant: Tenant) -> dict[str, str]:
    return {
        "tenant": tenant.tenant_id, "project": tenant.project_id, "key_id": tenant.key["key_id"],
        "service_account_id": tenant.account["service_account_id"], "operator_id": tenant.operator["operator_id"],
        "request_id": f"request-of-{tenant.tenant_id}", "month": "2026-01", "exception_id": "987654321", "journal": "gone",
        "grant_id": "cg_000000000000",
        "webhook_id": (tenant.webhook or {"webhook_id": "wh_000000000000"})["webhook_id"],
    }  # fmt: skip


NOBODYS = {
    "tenant": "nobody", "project": "nothing", "key_id": "000000000000", "service_account_id": "sa_000000000000",
    "operator_id": "op_000000000000", "request_id": "request-of-nobody", "month": "2026-01", "exception_id": "987654321", "journal": "gone",
    "webhook_id": "wh_000000000000", "grant_id": "cg_000000000000",
}  # fmt: skip


def with_webhook(control: ControlPlane, tenant: Tenant) -> Tenant:
    """Nothing is sent: no delivery process runs here."""
    asked = {"url": "https://example.com/hook", "tenant": tenant.tenant_id}
    return replace(tenant, webhook=control.made("/v1/webhooks", asked))


@pytest.fixture
def acme(control: ControlPlane) -> Tenant:
    return with_webhook(control, control.tenant("acme"))


@pytest.fixture
def rival(control: ControlPlane, postgres_url: str) -> Tenant:
    """Another tenant with one of everything, and a request on record."""
    tenant = with_webhook(control, control.tenant("rival"))
    control.made("/v1/tenants/rival/limits", {"requests_per_minute": 5}, method="PUT")
    control.made("/v1/prices", {"model": "tiny", "input": "1", "output": "2", "tenant": "rival"})
    with psycopg.connect(postgres_url) as connection:
        connection.execute(
            "insert into refusal (request_id, started_at, tenant_id, key_id, model, status, details) "
            "values ('request-of-rival', now(), 'rival', 'k', 'tiny', 429, 'x')"
        )
    return tenant


def everything(postgres_url: str) -> dict[str, list[Any]]:
    """All that the control plane can change."""
    tables = ("tenant", "project", "api_key", "rate_limit", "service_account", "operator", "rate_card", "billing_period", "webhook", "webhook_customer", "credit_grant")
    with psycopg.connect(postgres_url) as connection:
        return {
            table: sorted(connection.execute(f"select to_jsonb(t)::text from {table} t").fetchall())
            for table in tables
        }


def test_every_verb_on_every_object_of_another_tenant_is_404(
    control: ControlPlane, acme: Tenant, rival: Tenant, postgres_url: str
) -> None:
    """A tenant-admin may do nothing to another's object, not even learn that it is there."""
    before = everything(postgres_url)
    refused = [operation for operation in operations(control) if operation.objects]

    answers = {
        (operation.method, operation.path): control.ask(
            operation.method, operation.at(values_of(rival)), acme.admin, json=operation.body()
        )
        for operation in refused
    }

    assert dict.fromkeys(answers, 404) == {key: answer.status_code for key, answer in answers.items()}
    assert before == everything(postgres_url)
    assert len(answers) > 15


def test_another_tenants_object_is_refused_in_the_words_for_one_that_does_not_exist(
    control: ControlPlane, acme: Tenant, rival: Tenant
) -> None:
    """A difference would tell which ids exist."""

    def words(operation: Operation, values: dict[str, str]) -> str:
        answer = control.ask(operation.method, operation.at(values), acme.admin, json=operation.body())
        text = answer.text.replace(answer.headers["x-request-id"], "ID")
        for value in sorted(values.values(), key=len, reverse=True):
            text = text.replace(value, "VALUE")
        return f"{answer.status_code} {text}"

    for operation in operations(control):
        if operation.objects:
            assert words(operation, NOBODYS) == words(operation, values_of(rival)), operation.path


def test_an_own_path_with_another_tenants_object_inside_is_404(control: ControlPlane, acme: Tenant, rival: Tenant) -> None:
    """`/tenants/mine/projects/theirs`: every parameter after the tenant is checked too."""
    for operation in operations(control):
        if "tenant" in operation.names and len(operation.objects) > 1:
            values = values_of(rival) | {"tenant": acme.tenant_id}
            answer = control.ask(operation.method, operation.at(values), acme.admin, json=operation.body())
            # What is the platform's own is refused whatever it names.
            permitted = may(Role.TENANT_ADMIN, Permission(operation.document[DECLARATION]), tenant_id="acme")
            assert (404 if permitted else 403) == answer.status_code, operation.path


def test_parameters_of_a_query_and_fields_of_a_body_cannot_name_another_tenants_object(
    control: ControlPlane, acme: Tenant, rival: Tenant, postgres_url: str
) -> None:
    """Ids do not only travel in paths."""
    before = everything(postgres_url)
    theirs = values_of(rival)
    mine = "/v1/tenants/acme"

    answers = [
        control.ask("GET", "/v1/usage?tenant=rival", acme.admin),
        control.ask("GET", "/v1/prices?tenant=rival", acme.admin),
        control.ask("POST", f"{mine}/keys", acme.admin, json={"project": theirs["project"]}),
        control.ask("POST", f"{mine}/keys", acme.admin, json={"service_account_id": theirs["service_account_id"]}),
        control.ask("POST", f"{mine}/service-accounts", acme.admin, json={"name": "x", "project": theirs["project"]}),
        control.ask("POST", "/v1/operators", acme.admin, json={"name": "x", "role": "developer", "tenant": "rival"}),
        # The platform may set limits, but not one of acme's on a key of rival's.
        control.ask("PUT", f"{mine}/limits", json={"requests_per_minute": 1, "key_id": theirs["key_id"]}),
        control.ask("PUT", f"{mine}/limits", json={"requests_per_minute": 1, "project_id": theirs["project"]}),
        control.ask("DELETE", f"{mine}/limits?key_id={theirs['key_id']}"),
        control.ask("DELETE", f"{mine}/limits?project_id={theirs['project']}"),
        control.ask("GET", f"{mine}/limits/explain?key_id={theirs['key_id']}", acme.admin),
        control.ask("POST", "/v1/webhooks", acme.admin, json={"url": "https://example.com/", "tenant": "rival"}),
    ]

    assert [404] * len(answers) == [answer.status_code for answer in answers]
    assert before == everything(postgres_url)


def test_query_parameters_that_name_objects_are_known(control: ControlPlane) -> None:
    """A new parameter must be added here, and to the test above if it can name an object."""
    known = {"after", "limit", "since", "by", "anchor", "tenant", "project_id", "key_id", "model", "in_force", "state"}

    found = {
        parameter["name"]
        for operation in operations(control)
        for parameter in operation.document.get("parameters", ())
        if parameter["in"] == "query"
    }

    assert known == found


def test_lists_show_the_operators_own_tenant_only(control: ControlPlane, acme: Tenant, rival: Tenant) -> None:
    """Every list without a tenant in its path, read by a tenant-admin, and by the platform to see that there is more."""
    shown: dict[str, str] = {}
    for operation in operations(control):
        if operation.method == "GET" and not operation.names and may(
            Role.TENANT_ADMIN, Permission(operation.document[DECLARATION]), tenant_id="acme"
        ):
            shown[operation.path] = control.ask("GET", operation.path, acme.admin).text
            assert "rival" not in shown[operation.path], operation.path
            for value in values_of(rival).values():
                assert value not in shown[operation.path], operation.path

    # What a pool can take names no tenant.
    everybodys = {"/v1/usage", "/v1/capacities"}
    named = {"/v1/tenants", "/v1/keys", "/v1/operators", "/v1/limits", "/v1/audit", "/v1/prices", "/v1/webhooks"}
    assert named | everybodys == set(shown)
    for path in sorted(named):
        assert "rival" in control.ask("GET", path).text


@pytest.mark.parametrize("role", list(Role))
def test_each_role_is_refused_with_403_exactly_where_the_table_says_so(
    control: ControlPlane, acme: Tenant, role: Role
) -> None:
    """Every route, called by every role on an object that is its own."""
    tenant = "acme" if can_be_held(role, tenant_id="acme") else None
    token = control.operator(role.value, tenant)

    for operation in operations(control):
        permission = Permission(operation.document[DECLARATION])
        answer = control.ask(operation.method, operation.at(values_of(acme)), token, json=operation.body())
        is_refused = answer.status_code == 403
        assert (not may(role, permission, tenant_id=tenant)) == is_refused, (operation.method, operation.path, answer.text)
        if not is_refused:
            assert answer.status_code < 500


def test_every_route_says_who_may_call_it(control: ControlPlane) -> None:
    """The declaration is in the OpenAPI document; only these few are open."""
    declared = {route.path: (route.openapi_extra or {}).get(DECLARATION) for route in routes(control.app)}

    assert None not in declared.values()
    assert {
        "/health", "/oauth2/token", "/.well-known/jwks.json", "/.well-known/oauth-authorization-server",
        "/v1/bootstrap", "/v1/secret-scanning/alerts",
    } == {path for path, permission in declared.items() if permission == PUBLIC}  # fmt: skip


def test_a_route_that_does_not_say_who_may_call_it_refuses_the_start(control: ControlPlane) -> None:
    """Forgetting must not mean open."""

    @control.app.get("/v1/forgotten")
    def forgotten() -> dict[str, str]:
        return {}

    with pytest.raises(RuntimeError, match="/v1/forgotten"):
        check_declared(control.app)


def test_nobody_is_401_on_every_route_that_is_not_open(control: ControlPlane, acme: Tenant) -> None:
    """No token, another's kind of secret, a token with one character changed, one that is over."""
    over = control.operator("auditor")
    wrong = [
        "", "x", acme.key["key"], acme.account["client_secret"], control.admin[:-1] + ("a" if control.admin[-1] != "a" else "b"),
        control.admin[:15] + "x" * (len(control.admin) - 15), over,
    ]  # fmt: skip
    control.clock.forward(days=365)

    for operation in operations(control):
        for token in wrong:
            answer = control.client.request(
                operation.method, operation.at(values_of(acme)), headers={"authorization": f"Bearer {token}"},
                json=operation.body(),
            )  # fmt: skip
            assert 401 == answer.status_code, (operation.path, token[:8])
    assert 401 == control.client.get("/v1/nothing").status_code


def test_the_database_shows_one_tenants_rows_to_a_query_without_where(
    control: ControlPlane, acme: Tenant, rival: Tenant
) -> None:
    """Row-level security, and not our queries, is what keeps tenants apart."""
    tables = ("tenant", "project", "api_key", "rate_limit", "service_account", "operator", "audit_event", "refusal")
    store = control.services.store
    for table in tables:
        query = f"select tenant_id from {table}"
        with store.transaction(OneTenant("rival")) as connection:
            assert {"rival"} == {row["tenant_id"] for row in connection.execute(query)}, table
        with store.transaction(ALL_TENANTS) as connection:
            everybody = {row["tenant_id"] for row in connection.execute(query)}
            assert "rival" in everybody
            assert everybody >= {"acme", "rival"} or table in ("rate_limit", "refusal")


def test_the_database_shows_nothing_when_no_scope_is_set(control: ControlPlane, acme: Tenant, postgres_url: str) -> None:
    """Forgetting to say for whom must not mean for all."""
    with psycopg.connect(postgres_url) as connection:
        connection.execute("set local role peaje_control")
        for table in ("tenant", "project", "api_key", "service_account", "operator", "audit_event", "usage_event"):
            assert [] == connection.execute(f"select * from {table}").fetchall()


def test_a_scope_ends_with_its_transaction(control: ControlPlane, acme: Tenant) -> None:
    """Connections are reused: the next use case must not inherit anything."""
    store = control.services.store
    with store.transaction(ALL_TENANTS) as connection:
        connection.execute("select 1")
    with store._pool.connection() as connection:  # what the pool hands out next
        row = connection.execute("select current_user as name, current_setting('peaje.tenant', true) as tenant").fetchone()

    assert row is not None
    assert ("peaje", "") == (row["name"], row["tenant"] or "")


def test_a_scoped_transaction_cannot_write_another_tenants_rows(control: ControlPlane, acme: Tenant, rival: Tenant) -> None:
    """An update finds nothing; an insert is refused."""
    store = control.services.store
    with store.transaction(OneTenant("acme")) as connection:
        assert 0 == connection.execute("update api_key set name = 'mine' where tenant_id = 'rival'").rowcount
        assert 0 == connection.execute("delete from rate_limit where tenant_id = 'rival'").rowcount
        with pytest.raises(psycopg.errors.InsufficientPrivilege), connection.transaction():
            connection.execute(
                "insert into project (tenant_id, project_id, created_at) values ('rival', 'mine', now())"
            )


@pytest.mark.parametrize("tenant", ["", "*"])
def test_a_scope_of_one_tenant_cannot_mean_all(tenant: str) -> None:
    """All tenants only by the value that says so."""
    with pytest.raises(ValueError, match="names one"):
        OneTenant(tenant)


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("PATCH", "/v1/tenants/acme", {"state": "active", "role": "platform-admin"}, 403),
        ("PATCH", "/v1/tenants/acme", {"tenant_id": "rival"}, 403),
        ("PUT", "/v1/tenants/acme/limits", {"requests_per_minute": 1_000_000}, 403),
        ("DELETE", "/v1/tenants/acme/limits", None, 403),
        ("POST", "/v1/tenants", {"name": "mine"}, 403),
        ("POST", "/v1/operators", {"name": "x", "role": "platform-admin"}, 403),
        ("POST", "/v1/operators", {"name": "x", "role": "root"}, 400),
        ("POST", "/v1/operators", {"name": "x", "role": "developer", "token": "mine"}, 400),
        ("POST", "/v1/operators", {"name": "x", "role": "developer", "tenant_id": "rival"}, 400),
        ("POST", "/v1/tenants/acme/keys", {"name": "x", "tenant_id": "rival"}, 400),
        ("POST", "/v1/tenants/acme/keys", {"name": "x", "allowed_routes": ["/"]}, 400),
        ("POST", "/v1/tenants/acme/keys", {"name": "x", "key_hash": "00"}, 400),
        ("PATCH", "/v1/tenants/acme/projects/default", {"tenant_id": "rival"}, 400),
        ("PATCH", "/v1/tenants/acme/projects/default", {"monthly_budget": 1}, 400),
        ("POST", "/v1/signing-keys/rotate", {}, 403),
    ],
)
def test_privileged_and_unknown_fields_are_refused_and_change_nothing(
    idle_control: ControlPlane, method: str, path: str, body: Any, status: int
) -> None:
    """A tenant-admin cannot raise itself, its limits or its rights by naming a field."""
    assert idle_control.acme is not None
    url = str(idle_control.services.store._pool.conninfo)
    before = everything(url)

    answer = idle_control.ask(method, path, idle_control.acme.admin, json=body)

    assert status == answer.status_code, answer.text
    assert before == everything(url)


def test_an_operator_of_a_tenant_makes_others_of_that_tenant(control: ControlPlane, acme: Tenant) -> None:
    """Without naming it: there is no other that it could mean."""
    made = control.made("/v1/operators", {"name": "dev", "role": "developer"}, acme.admin)

    assert "acme" == made["tenant_id"]
    assert 200 == control.ask("GET", "/v1/tenants/acme/keys", made["token"]).status_code


def test_a_revoked_operator_is_nobody_and_the_last_platform_admin_stays(control: ControlPlane) -> None:
    """Locking everybody out must not be one call away."""
    me = control.ask("GET", "/v1/operators").json()["operators"][0]["operator_id"]
    other = control.made("/v1/operators", {"name": "second", "role": "platform-admin"})

    assert 200 == control.ask("POST", f"/v1/operators/{other['operator_id']}/revoke").status_code
    assert 401 == control.ask("GET", "/v1/tenants", other["token"]).status_code
    last = control.ask("POST", f"/v1/operators/{me}/revoke")
    assert (409, True) == (last.status_code, "last platform-admin" in last.text)
    assert 200 == control.ask("GET", "/v1/tenants").status_code


def test_an_operators_token_survives_a_new_pepper_and_the_old_one_may_go(control: ControlPlane) -> None:
    """Hashes move to the newest pepper as tokens are used."""
    token = control.operator("auditor")
    peppers = control.services.mint.peppers
    peppers[2] = b"2" * 32  # type: ignore[index]

    assert 200 == control.ask("GET", "/v1/tenants", token).status_code
    del peppers[1]  # type: ignore[attr-defined]
    assert 200 == control.ask("GET", "/v1/tenants", token).status_code
    # It was not used in between: that its pepper is gone is ours to mend, not its holder's.
    assert 503 == control.ask("GET", "/v1/tenants").status_code


def test_suspending_and_expiry_of_operators_are_checked_at_the_boundary(control: ControlPlane) -> None:
    """A token is over at its very last moment, not after it."""
    made = control.made("/v1/operators", {"name": "x", "role": "auditor", "expires": "1h"})

    control.clock.forward(seconds=3599.999999)
    assert 200 == control.ask("GET", "/v1/tenants", made["token"]).status_code
    control.clock.now += timedelta(microseconds=1)
    assert 401 == control.ask("GET", "/v1/tenants", made["token"]).status_code
