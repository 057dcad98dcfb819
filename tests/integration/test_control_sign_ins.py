# SPDX-License-Identifier: Apache-2.0
"""Who is refused leaves a trace, and nobody asks for tokens without end."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from chassis import keys
from control.sign_ins import ENTRIES_PER_MINUTE, TOKENS_PER_CLIENT
from tests.integration.control_plane import ControlPlane, Tenant


@pytest.fixture
def acme(control: ControlPlane) -> Tenant:
    """A tenant with a service account."""
    return control.tenant("acme")


def ask(control: ControlPlane, client_id: str, secret: str) -> Any:
    """Client credentials for a token."""
    return control.client.post("/oauth2/token", data={"grant_type": "client_credentials"}, auth=(client_id, secret))


def refused(control: ControlPlane) -> list[dict[str, Any]]:
    """Entries about those who were not let in."""
    entries = control.ask("GET", "/v1/audit", params={"limit": 500}).json()
    entries, after = [], 0
    while after is not None:
        page = control.ask("GET", "/v1/audit", params={"after": after}).json()
        entries, after = entries + page["entries"], page["next"]
    return [entry for entry in entries if entry["action"] == "sign_in.refused"]


def test_each_client_has_so_many_turns_and_is_told_when_the_next_one_is(control: ControlPlane, acme: Tenant) -> None:
    """A right secret and a wrong one alike; another client is not in the way, and a minute later all is well."""
    client, secret = acme.account["service_account_id"], acme.account["client_secret"]
    other = control.tenant("other").account
    statuses = [ask(control, client, secret).status_code for _ in range(TOKENS_PER_CLIENT)]

    answer = ask(control, client, secret)

    assert [200] * TOKENS_PER_CLIENT == statuses
    assert (429, "temporarily_unavailable", "1") == (answer.status_code, answer.json()["error"], answer.headers["retry-after"])
    assert "no-store" == answer.headers["cache-control"]
    assert 200 == ask(control, other["service_account_id"], other["client_secret"]).status_code
    control.clock.now += timedelta(seconds=1)
    assert 200 == ask(control, client, secret).status_code


def test_an_address_has_so_many_turns_whatever_names_it_gives(
    control: ControlPlane, acme: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names that nobody can have are counted on it too."""
    from chassis.attempts import Attempts  # noqa: PLC0415 - to make the bound small

    monkeypatch.setattr(control.services.sign_ins, "_addresses", Attempts(most=3, per=timedelta(minutes=1)))

    statuses = [ask(control, f"sa_{number:012}", "x").status_code for number in range(2)]
    statuses += [ask(control, "nobody", "x").status_code]
    statuses += [ask(control, acme.account["service_account_id"], acme.account["client_secret"]).status_code]

    assert [401, 401, 401, 429] == statuses


def test_who_is_refused_is_in_the_audit_log_without_what_they_sent(control: ControlPlane, acme: Tenant) -> None:
    """By either road, with a name only if anybody can have it; the chain holds."""
    token = keys.mint_token(keys.OPERATOR_TOKEN, control.services.mint.random_bytes).token
    for wrong in (token, "peaje_op_nonsense", "x" * 300):
        assert 401 == control.ask("GET", "/v1/tenants", wrong).status_code
    assert 401 == ask(control, acme.account["service_account_id"], "peaje_sa_wrong").status_code
    assert 401 == ask(control, "Robert'); drop table", "hunter2").status_code
    # Nobody tried to be anybody.
    assert 401 == control.client.get("/v1/tenants").status_code

    entries = refused(control)

    seen = sorted((entry["detail"]["after"]["road"], entry["object"]) for entry in entries)
    assert [
        ("operator", "-"), ("operator", "-"), ("operator", f"op_{token.split('_')[2]}"),
        ("token", "-"), ("token", acme.account["service_account_id"]),
    ] == seen  # fmt: skip
    text = str(entries)
    assert not any(secret in text for secret in (token, "nonsense", "peaje_sa_wrong", "hunter2", "Robert"))
    assert control.ask("GET", "/v1/audit/verify").json()["intact"]


def test_a_storm_of_refusals_leaves_a_bounded_trace_that_says_how_large_it_was(control: ControlPlane) -> None:
    """The log is not what an attacker fills."""
    for number in range(ENTRIES_PER_MINUTE + 7):
        control.ask("GET", "/v1/tenants", f"wrong-{number}")
    control.clock.now += timedelta(seconds=1)
    control.ask("GET", "/v1/tenants", "wrong once more")

    entries = refused(control)

    assert ENTRIES_PER_MINUTE + 1 == len(entries)
    assert [7] == [entry["detail"]["after"]["unlogged"] for entry in entries if "unlogged" in entry["detail"]["after"]]
