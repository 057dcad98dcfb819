# SPDX-License-Identifier: Apache-2.0
"""The life of keys, projects and service accounts through the API."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest

from tests.integration.control_plane import ControlPlane

NEVER_SHOWN = {"key", "key_hash", "pepper_version", "client_secret", "secret_hash", "token", "token_hash"}


def shown(control: ControlPlane, key_id: str) -> dict[str, Any]:
    return dict(control.ask("GET", f"/v1/keys/{key_id}").json())


def test_a_key_keeps_all_that_was_asked_of_it_and_is_shown_once(control: ControlPlane) -> None:
    """Whatever shows it later never has the secret."""
    tenant = control.tenant("acme")
    account = control.made("/v1/tenants/acme/service-accounts", {"name": "robot", "project": tenant.project_id})
    asked = {
        "name": "search", "project": tenant.project_id, "service_account_id": account["service_account_id"],
        "scopes": ["embeddings", "inference"], "models": ["tiny", "lar*"], "denied_models": ["large"],
        "allowed_cidrs": ["192.0.2.0/24", "2001:db8::/32", "198.51.100.7"], "environment": "test", "expires": "30d",
    }  # fmt: skip

    made = control.made("/v1/tenants/acme/keys", asked)

    assert made["key"].startswith(f"peaje_test_{made['key_id']}_")
    wanted = asked | {
        "tenant_id": "acme", "project_id": tenant.project_id, "models": ["lar*", "tiny"], "state": "active",
        "allowed_cidrs": ["192.0.2.0/24", "198.51.100.7/32", "2001:db8::/32"], "last_four": made["key"][-4:],
        "created_at": "2026-03-01T12:00:00Z", "expires_at": "2026-03-31T12:00:00Z", "revoked_at": None,
        "rotated_to": None, "last_used_at": None, "uses_after_rotation": 0, "key_id": made["key_id"],
    }  # fmt: skip
    del wanted["project"], wanted["expires"]
    assert wanted == shown(control, made["key_id"])
    listed = control.ask("GET", "/v1/tenants/acme/keys").json()["keys"]
    assert wanted in listed
    assert not NEVER_SHOWN & {name for key in listed for name in key}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"models": ["nobody"]}, "'nobody' is not served"),
        ({"models": []}, "at least one name"),
        ({"models": ["a b"]}, "printable ASCII"),
        ({"models": ["a\n*"]}, "printable ASCII"),
        ({"models": ["x" * 200 + "*"]}, "1 to 200"),
        ({"models": [f"m{number}*" for number in range(201)]}, "at most 200"),
        ({"denied_models": ["nobody"]}, "is not served"),
        ({"allowed_cidrs": []}, "1 to 100"),
        ({"allowed_cidrs": ["192.0.2.1/24"]}, "Did you mean 192.0.2.0/24?"),
        ({"allowed_cidrs": ["192.0.2"]}, "CIDR"),
        ({"allowed_cidrs": ["::ffff:192.0.2.0/120"]}, "IPv4 form"),
        ({"allowed_cidrs": ["fe80::%eth0/64"]}, ""),
        ({"allowed_cidrs": [f"10.0.{number}.0/24" for number in range(101)]}, "1 to 100"),
        ({"scopes": []}, "1 to 50"),
        ({"scopes": ["two words"]}, "scope"),
        ({"scopes": ['"']}, "scope"),
        ({"scopes": [f"s{number}" for number in range(51)]}, "1 to 50"),
        ({"expires": "0s"}, "past"),
        ({"expires": "2020-01-01"}, "past"),
        ({"expires": "soon"}, "Write a duration"),
        ({"environment": "prod"}, "environment"),
        ({"project": "nothing"}, "no project"),
        ({"service_account_id": "sa_000000000000"}, "no service account"),
        ({"models": "tiny"}, "models"),
        ({"name": 1}, "name"),
    ],
)
def test_a_key_with_bad_rights_is_refused_and_not_made(idle_control: ControlPlane, body: dict[str, Any], words: str) -> None:
    """In one sentence that says what to write."""
    before = idle_control.ask("GET", "/v1/keys").json()

    answer = idle_control.ask("POST", "/v1/tenants/acme/keys", json=body)

    assert answer.status_code in (400, 404)
    assert words in answer.json()["error"]["message"]
    assert before == idle_control.ask("GET", "/v1/keys").json()


def test_a_service_accounts_key_lives_in_its_project(control: ControlPlane) -> None:
    """An account of another project is as unknown as one of another tenant."""
    tenant = control.tenant("acme")  # its account is in the default project

    answer = control.ask(
        "POST", "/v1/tenants/acme/keys",
        json={"project": tenant.project_id, "service_account_id": tenant.account["service_account_id"]},
    )  # fmt: skip

    assert 404 == answer.status_code


def test_a_rotated_key_names_its_successor_which_has_the_same_rights_and_limits(
    control: ControlPlane, postgres_url: str
) -> None:
    """Both work during the overlap, and the uses of the old one are visible."""
    control.made("/v1/tenants", {"name": "acme"})
    old = control.made(
        "/v1/tenants/acme/keys",
        {"name": "it", "scopes": ["inference"], "models": ["tiny"], "denied_models": ["lar*"], "allowed_cidrs": ["192.0.2.0/24"]},
    )  # fmt: skip
    control.made("/v1/tenants/acme/limits", {"key_id": old["key_id"], "requests_per_minute": 7}, method="PUT")
    control.clock.forward(days=10)

    new = control.made(f"/v1/keys/{old['key_id']}/rotate", {"overlap": "2h"})

    same = ("tenant_id", "project_id", "name", "environment", "scopes", "models", "denied_models", "allowed_cidrs")
    assert [old[name] for name in same] == [new[name] for name in same]
    assert (old["key_id"], "2026-03-11T14:00:00Z") == (new["rotated_from"], new["old_expires_at"])
    assert "2027-03-11T12:00:00Z" == new["expires_at"]
    limits = control.ask("GET", "/v1/tenants/acme/limits").json()["limits"]
    assert {(old["key_id"], 7), (new["key_id"], 7)} == {(one["key_id"], one["requests_per_minute"]) for one in limits}
    with psycopg.connect(postgres_url) as connection:  # as extauth's flush does
        connection.execute(
            "update api_key set last_used_at = now(), uses_after_rotation = 3 where key_id = %s", (old["key_id"],)
        )
    after = shown(control, old["key_id"])
    assert (new["key_id"], "2026-03-11T14:00:00Z", 3) == (after["rotated_to"], after["expires_at"], after["uses_after_rotation"])
    assert after["last_used_at"] is not None


def test_rotation_never_makes_an_old_key_live_longer(control: ControlPlane) -> None:
    """An overlap beyond its own end ends where it would have ended."""
    control.made("/v1/tenants", {"name": "acme"})
    old = control.made("/v1/tenants/acme/keys", {"expires": "1h"})

    new = control.made(f"/v1/keys/{old['key_id']}/rotate", {"overlap": "30d"})

    assert old["expires_at"] == new["old_expires_at"] == shown(control, old["key_id"])["expires_at"]


@pytest.mark.parametrize(("overlap", "status"), [("0s", 201), ("30d", 201), ("2592001s", 400), ("-1s", 400), ("x", 400)])
def test_an_overlap_is_0_to_30_days(control: ControlPlane, overlap: str, status: int) -> None:
    """Checked at both ends."""
    tenant = control.tenant("acme")

    for path in (f"/v1/keys/{tenant.key['key_id']}/rotate", f"/v1/service-accounts/{tenant.account['service_account_id']}/rotate"):
        assert status == control.ask("POST", path, json={"overlap": overlap}).status_code


def test_a_key_that_is_over_disabled_or_rotated_is_not_rotated(control: ControlPlane) -> None:
    """A successor would bring back what somebody has ended."""
    control.made("/v1/tenants", {"name": "acme"})
    key_ids = [control.made("/v1/tenants/acme/keys", {"expires": "1h"})["key_id"] for _ in range(4)]
    revoked, disabled, rotated, over = key_ids
    control.made(f"/v1/keys/{revoked}/revoke", {})
    control.made(f"/v1/keys/{disabled}", {"state": "disabled"}, method="PATCH")
    control.made(f"/v1/keys/{rotated}/rotate", {})
    count = len(control.ask("GET", "/v1/keys").json()["keys"])

    answers = [control.ask("POST", f"/v1/keys/{key_id}/rotate", json={}) for key_id in (revoked, disabled, rotated)]
    control.clock.forward(hours=1)
    answers.append(control.ask("POST", f"/v1/keys/{over}/rotate", json={}))

    assert [409] * 4 == [answer.status_code for answer in answers]
    assert count == len(control.ask("GET", "/v1/keys").json()["keys"])


def test_disabling_can_be_undone_and_revoking_cannot(control: ControlPlane) -> None:
    """Revoking twice keeps the first moment."""
    tenant = control.tenant("acme")
    path = f"/v1/keys/{tenant.key['key_id']}"

    assert "disabled" == control.made(path, {"state": "disabled"}, method="PATCH")["state"]
    assert "active" == control.made(path, {"state": "active"}, method="PATCH")["state"]
    first = control.made(f"{path}/revoke", {})["revoked_at"]
    control.clock.forward(hours=1)
    assert first == control.made(f"{path}/revoke", {})["revoked_at"]
    assert 409 == control.ask("PATCH", path, json={"state": "active"}).status_code


def test_keys_come_in_pages_in_the_order_they_were_made(control: ControlPlane) -> None:
    """Every key once, whatever the size of a page."""
    control.made("/v1/tenants", {"name": "acme"})
    made = []
    for _ in range(5):
        control.clock.forward(seconds=1)
        made.append(control.made("/v1/tenants/acme/keys", {})["key_id"])

    for limit in (1, 2, 5, 1000):
        found: list[str] = []
        after = None
        while True:
            page = control.ask("GET", "/v1/keys", params={"limit": limit} | ({"after": after} if after else {})).json()
            assert len(page["keys"]) <= limit
            found += [key["key_id"] for key in page["keys"]]
            after = page["next"]
            if after is None:
                break
        assert made == found


def test_projects_have_labels_and_can_be_suspended(control: ControlPlane) -> None:
    """What is not named in a change stays."""
    control.made("/v1/tenants", {"name": "acme"})
    made = control.made("/v1/tenants/acme/projects", {"name": "Web Search", "labels": {"tier": "gold"}})
    path = "/v1/tenants/acme/projects/web-search"

    assert ("web-search", "Web Search", {"tier": "gold"}, "active") == tuple(
        made[name] for name in ("project_id", "name", "labels", "state")
    )
    suspended = control.made(path, {"state": "suspended"}, method="PATCH")
    assert ("suspended", {"tier": "gold"}) == (suspended["state"], suspended["labels"])
    relabelled = control.made(path, {"labels": {}}, method="PATCH")
    assert ("suspended", {}) == (relabelled["state"], relabelled["labels"])
    assert 400 == control.ask("PATCH", path, json={}).status_code
    assert 409 == control.ask("POST", "/v1/tenants/acme/projects", json={"name": "web search"}).status_code
    assert ["default", "web-search"] == [
        project["project_id"] for project in control.ask("GET", "/v1/tenants/acme/projects").json()["projects"]
    ]


@pytest.mark.parametrize(
    "labels",
    [
        {"": "x"}, {"Upper": "x"}, {"-a": "x"}, {"a" * 64: "x"}, {"a": "x" * 101}, {"a": "\n"}, {"a": 1}, {"a": None},
        {f"l{number}": "x" for number in range(51)},
    ],
)  # fmt: skip
def test_bad_labels_are_refused(idle_control: ControlPlane, labels: dict[str, Any]) -> None:
    """Policies compare them; they must be what they look like."""
    assert 400 == idle_control.ask("POST", "/v1/tenants/acme/projects", json={"name": "x", "labels": labels}).status_code


def test_service_accounts_are_shown_without_their_secret(control: ControlPlane) -> None:
    """The secret is in two answers only: of making and of rotating."""
    tenant = control.tenant("acme")
    account_id = tenant.account["service_account_id"]

    assert tenant.account["client_id"] == account_id
    assert tenant.account["client_secret"].startswith(f"peaje_sa_{account_id.removeprefix('sa_')}_")
    for path in (f"/v1/service-accounts/{account_id}", "/v1/tenants/acme/service-accounts"):
        assert tenant.account["client_secret"] not in control.ask("GET", path).text
    assert not NEVER_SHOWN & set(control.ask("GET", f"/v1/service-accounts/{account_id}").json())
