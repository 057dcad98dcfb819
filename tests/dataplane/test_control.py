# SPDX-License-Identifier: Apache-2.0
"""The control plane of a whole installation: its first operator, and its secrets kept out of everything it writes."""

from __future__ import annotations

import stat

import httpx
import psycopg

from tests.dataplane.installation import Installation, chat


def test_up_makes_its_first_operator_by_the_one_time_token(road: Installation) -> None:
    """`secrets/admin-token` is an operator's like any other, and nothing of the road to it is left."""
    directory = road.home / "secrets"

    operators = road.control("GET", "/v1/operators").json()["operators"]

    assert ("first operator", "platform-admin") == (operators[0]["name"], operators[0]["role"])
    assert (directory / "admin-token").read_text().startswith("peaje_op_")
    assert 0o600 == stat.S_IMODE((directory / "admin-token").stat().st_mode)
    assert not (directory / "bootstrap-token").exists()
    actions = [entry["action"] for entry in road.control("GET", "/v1/audit?limit=2").json()["entries"]]
    assert ["bootstrap.opened", "operator.created"] == actions


def test_the_audit_log_of_a_used_installation_is_intact(road: Installation) -> None:
    """After whatever other tests have done to it."""
    road.new_tenant()

    assert road.cli("audit", "verify")["intact"]


def test_no_secret_is_in_any_log_journal_statistic_or_table(road: Installation) -> None:
    """Every kind of secret, used rightly and wrongly, then looked for in all that the installation has written."""
    tenant = road.new_tenant("secretive")
    at = f"/v1/tenants/{tenant.tenant_id}"
    account = road.control("POST", f"{at}/service-accounts", json={"name": "robot"}).json()
    operator = road.control(
        "POST", "/v1/operators", json={"name": "dev", "role": "developer", "tenant": tenant.tenant_id}
    ).json()
    rotated = road.control("POST", f"/v1/keys/{tenant.key_id}/rotate", json={"overlap": "1h"}).json()
    token = httpx.post(
        f"http://127.0.0.1:{road.control_port}/oauth2/token", data={"grant_type": "client_credentials"},
        auth=(account["client_id"], account["client_secret"]),
    ).json()["access_token"]
    secrets = [
        tenant.key, rotated["key"], account["client_secret"], operator["token"], token,
        *(path.read_text().strip() for path in (road.home / "secrets").iterdir()),
    ]
    for secret in (tenant.key, rotated["key"], account["client_secret"], operator["token"], token):
        for headers in ({"authorization": f"Bearer {secret}"}, {"x-api-key": secret}):
            road.post(None, json=chat(), headers=headers)
            road.post(None, json=chat() | {"stream": True}, headers=headers)
            httpx.get(f"http://127.0.0.1:{road.control_port}/v1/keys", headers=headers)

    written = {
        str(path): path.read_bytes()
        for directory in ("log", "journal", "run", "envoy")
        for path in (road.home / directory).rglob("*")
        if path.is_file()
    }
    for path in ("stats", "config_dump", "clusters"):
        written[path] = httpx.get(f"http://127.0.0.1:{road.admin_port}/{path}").content
    with road.database() as connection:
        tables = connection.execute(
            "select tablename from pg_tables where schemaname = 'public' and tablename not like 'usage_event_%'"
        ).fetchall()
        for table in (row["tablename"] for row in tables):
            rows = connection.execute(
                psycopg.sql.SQL("select to_jsonb(t)::text as row from {} t").format(psycopg.sql.Identifier(table))
            ).fetchall()
            written[f"table {table}"] = "\n".join(row["row"] for row in rows).encode()

    found = [
        (where, secret[:12]) for where, content in written.items() for secret in secrets
        if secret.encode() in content or secret[-30:].encode() in content
    ]

    assert [] == found
    assert len(written) > 15
