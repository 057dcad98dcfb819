# SPDX-License-Identifier: Apache-2.0
"""The audit log: every change is in it, in its transaction, without secrets; tampering shows."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any, LiteralString

import psycopg
import pytest

from chassis.errors import Invalid
from control import audit, keys, tenants
from control.act import ALL_TENANTS, Act
from control.core import chain
from tests.integration.control_plane import CATALOGUE, ControlPlane


def entries(control: ControlPlane) -> list[dict[str, Any]]:
    return list(control.ask("GET", "/v1/audit?limit=1000").json()["entries"])


def verdict(control: ControlPlane, anchor: str | None = None) -> dict[str, Any]:
    return dict(control.ask("GET", "/v1/audit/verify", params={"anchor": anchor} if anchor else {}).json())


def tamper(postgres_url: str, *statements: LiteralString) -> None:
    """Change the log as somebody who owns the database: without the triggers that forbid it."""
    with psycopg.connect(postgres_url) as connection:
        connection.execute("alter table audit_event disable trigger all")
        for statement in statements:
            connection.execute(statement)
        connection.execute("alter table audit_event enable trigger all")


def rewrite_from(postgres_url: str, sequence: int, actor: str) -> None:
    """Change an entry and compute every later hash again, as a forger who knows the format would."""
    with psycopg.connect(postgres_url) as connection:
        connection.execute("alter table audit_event disable trigger all")
        connection.execute("update audit_event set actor = %s where sequence = %s", (actor, sequence))
        previous = chain.GENESIS
        rows = connection.execute(
            "select sequence, at, actor, tenant_id, action, object, request_id, detail from audit_event order by sequence"
        ).fetchall()
        names = ("sequence", "at", "actor", "tenant_id", "action", "object", "request_id", "detail")
        for row in rows:
            digest = chain.link(previous, chain.Entry(**dict(zip(names, row, strict=True))))
            connection.execute(
                "update audit_event set previous_hash = %s, hash = %s where sequence = %s", (previous, digest, row[0])
            )
            previous = digest
        connection.execute("update audit_head set hash = %s", (previous,))
        connection.execute("alter table audit_event enable trigger all")


def test_every_change_is_an_entry_with_who_what_and_which_request(control: ControlPlane) -> None:
    """In the order in which they were made."""
    tenant = control.tenant("acme")
    key_id, account_id = tenant.key["key_id"], tenant.account["service_account_id"]
    for method, path, body in (
        ("PATCH", f"/v1/keys/{key_id}", {"state": "disabled"}),
        ("PATCH", f"/v1/keys/{key_id}", {"state": "active"}),
        ("PUT", "/v1/tenants/acme/limits", {"requests_per_minute": 5}),
        ("DELETE", "/v1/tenants/acme/limits", None),
        ("POST", f"/v1/keys/{key_id}/revoke", None),
        ("PATCH", "/v1/tenants/acme/projects/default", {"state": "suspended"}),
        ("POST", f"/v1/service-accounts/{account_id}/rotate", {}),
        ("PATCH", f"/v1/service-accounts/{account_id}", {"state": "suspended"}),
        ("PATCH", "/v1/tenants/acme", {"state": "suspended"}),
        ("GET", "/v1/usage?tenant=acme", None),
        ("POST", "/v1/signing-keys/rotate", {}),
        ("POST", f"/v1/operators/{tenant.operator['operator_id']}/revoke", None),
    ):
        answer = control.ask(method, path, json=body)
        assert answer.is_success, answer.text
    last_request = answer.headers["x-request-id"]

    found = entries(control)

    assert [
        "bootstrap.opened", "operator.created", "tenant.created", "project.created", "key.created",
        "service_account.created", "operator.created", "key.disabled", "key.enabled", "limit.set", "limit.deleted",
        "key.revoked", "project.changed", "service_account.secret_rotated", "service_account.suspended",
        "tenant.suspended", "usage.read", "signing_key.rotated", "operator.revoked",
    ] == [entry["action"] for entry in found]  # fmt: skip
    disabled = next(entry for entry in found if entry["action"] == "key.disabled")
    assert ("active", "disabled") == (disabled["detail"]["before"]["state"], disabled["detail"]["after"]["state"])
    assert (key_id, "acme") == (disabled["object"], disabled["tenant_id"])
    assert found[1]["object"] == disabled["actor"]
    assert last_request == found[-1]["request_id"]
    assert {"intact": True, "fault": None} == {name: verdict(control)[name] for name in ("intact", "fault")}


def test_reading_the_log_is_an_entry_too(control: ControlPlane) -> None:
    """Exports are what an auditor asks for first."""
    entries(control)

    assert "audit.read" == entries(control)[-1]["action"]


def test_no_secret_and_no_hash_of_one_is_in_the_log(control: ControlPlane, postgres_url: str) -> None:
    """The log is read by more people than any key."""
    tenant = control.tenant("acme")
    rotated = control.made(f"/v1/keys/{tenant.key['key_id']}/rotate", {})
    secret = control.made(f"/v1/service-accounts/{tenant.account['service_account_id']}/rotate", {})["client_secret"]
    with psycopg.connect(postgres_url) as connection:
        hashes = [
            bytes(row[0]).hex()
            for row in connection.execute(
                "select key_hash from api_key union all select secret_hash from service_account "
                "union all select token_hash from operator union all select token_hash from bootstrap"
            )
        ]
        dump = "".join(row[0] for row in connection.execute("select to_jsonb(e)::text from audit_event e"))

    for text in (control.admin, tenant.key["key"], rotated["key"], secret, tenant.account["client_secret"], tenant.admin, *hashes):
        assert text not in dump
        assert text[-20:] not in dump


def test_a_change_that_fails_leaves_no_entry_and_an_entry_that_fails_leaves_no_change(
    control: ControlPlane, postgres_url: str
) -> None:
    """One transaction: neither without the other."""
    control.tenant("acme")
    before = entries(control)
    assert 409 == control.ask("POST", "/v1/tenants", json={"name": "acme"}).status_code
    assert 404 == control.ask("POST", "/v1/tenants/nobody/keys", json={}).status_code
    assert len(before) + 1 == len(entries(control))  # the first reading itself

    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute("revoke insert on audit_event from peaje_control")
    assert 500 == control.ask("POST", "/v1/tenants", json={"name": "late"}).status_code
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute("grant insert on audit_event to peaje_control")
    assert 404 == control.ask("GET", "/v1/tenants/late").status_code


@pytest.mark.parametrize(
    ("statement", "fault"),
    [
        ("update audit_event set actor = 'op_somebody' where sequence = 3", "Entry 3 was changed."),
        ("update audit_event set at = at + interval '1 microsecond' where sequence = 3", "Entry 3 was changed."),
        ("update audit_event set tenant_id = null where sequence = 3", "Entry 3 was changed."),
        ("update audit_event set request_id = 'x' where sequence = 3", "Entry 3 was changed."),
        ("update audit_event set object = 'x' where sequence = 3", "Entry 3 was changed."),
        ("update audit_event set action = 'x' where sequence = 3", "Entry 3 was changed."),
        ("update audit_event set detail = detail || '{\"x\": 1}' where sequence = 3", "Entry 3 was changed."),
        ("update audit_event set hash = decode(repeat('ab', 32), 'hex') where sequence = 3", "Entry 3 was changed."),
        ("update audit_event set previous_hash = hash where sequence = 3", "Entry 3 does not follow the one before it."),
        ("delete from audit_event where sequence = 3", "Entry 3 is missing; entry 4 is in its place."),
        ("delete from audit_event where sequence = 1", "Entry 1 is missing; entry 2 is in its place."),
        ("delete from audit_event where sequence = 7", "The log ends at entry 6; it once ended at entry 7."),
        ("delete from audit_event", "The log ends at entry 0; it once ended at entry 7."),
        (
            "update audit_event set sequence = case sequence when 3 then 4 else 3 end where sequence in (3, 4)",
            "Entry 3 does not follow the one before it.",
        ),
    ],
)
def test_a_changed_removed_or_moved_entry_is_found(
    control: ControlPlane, postgres_url: str, statement: LiteralString, fault: str
) -> None:
    """By somebody with every right on the database."""
    control.tenant("acme")  # entries 3 to 7
    assert verdict(control)["intact"]

    # The primary key is checked row by row: a swap needs a moment without it.
    tamper(
        postgres_url, "alter table audit_event drop constraint audit_event_pkey", statement,
        "alter table audit_event add primary key (sequence)",
    )  # fmt: skip

    found = verdict(control)
    assert (False, fault) == (found["intact"], found["fault"])


def test_a_log_that_was_computed_again_is_found_with_an_anchor(control: ControlPlane, postgres_url: str) -> None:
    """Whoever owns the database can forge the whole chain, but not a hash that was written down elsewhere."""
    control.tenant("acme")
    anchor = verdict(control)["anchor"]
    control.made("/v1/tenants", {"name": "later"})
    assert verdict(control, anchor)["intact"]

    rewrite_from(postgres_url, 3, "op_somebody")

    assert verdict(control)["intact"]  # by itself it cannot tell
    found = verdict(control, anchor)
    assert (False, "Entry 7 is not the one that was written down.") == (found["intact"], found["fault"])


@pytest.mark.parametrize("anchor", ["x", "1", "1:", "1:zz", "1:abcd", ":" + "00" * 32])
def test_a_malformed_anchor_is_refused(idle_control: ControlPlane, anchor: str) -> None:
    """It must never be taken for one that holds."""
    assert 400 == idle_control.ask("GET", "/v1/audit/verify", params={"anchor": anchor}).status_code


@pytest.mark.parametrize(
    "statement",
    ["update audit_event set actor = 'x'", "delete from audit_event", "truncate audit_event"],
)
def test_the_table_takes_additions_only_even_from_its_owner(
    control: ControlPlane, postgres_url: str, statement: LiteralString
) -> None:
    """A mistake in our own code or in psql must not lose a line."""
    with psycopg.connect(postgres_url) as connection, pytest.raises(psycopg.errors.RaiseException, match="append-only"):
        connection.execute(statement)


def test_the_control_planes_role_cannot_touch_the_chains_end(control: ControlPlane) -> None:
    """It may append an entry that follows, and nothing else."""
    store = control.services.store
    for statement in (
        "update audit_head set sequence = 0", "delete from audit_head", "update audit_event set actor = 'x'",
        "delete from audit_event",
    ):  # fmt: skip
        with pytest.raises(psycopg.errors.InsufficientPrivilege), store.transaction(ALL_TENANTS) as connection:
            connection.execute(statement)
    with pytest.raises(psycopg.errors.RaiseException, match="does not follow"), store.transaction(ALL_TENANTS) as connection:
        connection.execute(
            "insert into audit_event select sequence + 5, at, actor, tenant_id, action, object, request_id, detail, "
            "previous_hash, hash from audit_event where sequence = 1"
        )


def test_concurrent_changes_make_one_chain(control: ControlPlane) -> None:
    """Sixteen at a time, over more connections than the pool has."""
    control.made("/v1/tenants", {"name": "acme"})
    store, mint = control.services.store, control.services.mint
    act = Act(actor="op_test", scope=ALL_TENANTS, request_id="r", now=control.clock.now)

    def make(number: int) -> None:
        keys.create(store, act, mint, "acme", keys.NewKey(name=f"key {number}"), catalogue=CATALOGUE)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(make, range(60)))

    found = verdict(control)
    assert (True, 64 - 1) == (found["intact"], found["entries"])


def test_a_tenants_auditor_sees_its_tenants_entries_and_cannot_verify_the_whole(control: ControlPlane) -> None:
    """One tenant's entries alone are no chain."""
    control.tenant("acme")
    control.tenant("rival")
    auditor = control.operator("auditor", "acme")

    seen = control.ask("GET", "/v1/audit", auditor).json()["entries"]

    assert {"acme"} == {entry["tenant_id"] for entry in seen}
    assert "key.created" in {entry["action"] for entry in seen}
    assert 403 == control.ask("GET", "/v1/audit/verify", auditor).status_code


def test_the_log_comes_in_pages(control: ControlPlane) -> None:
    """`next` goes on where a page ended."""
    control.tenant("acme")

    first = control.ask("GET", "/v1/audit?limit=3").json()
    second = control.ask("GET", f"/v1/audit?limit=1000&after={first['next']}").json()

    assert [1, 2, 3] == [entry["sequence"] for entry in first["entries"]]
    assert 4 == second["entries"][0]["sequence"]
    assert second["next"] is None
    assert 400 == control.ask("GET", "/v1/audit?limit=1001").status_code
    assert 400 == control.ask("GET", f"/v1/audit?after={2**63}").status_code


@pytest.mark.parametrize("name", ["a\u2028b", "a\nb", "\x00", "a\ud800", "\x1b[31m", " ", "", "x" * 101])
def test_names_that_could_end_a_line_or_colour_a_terminal_are_refused(idle_control: ControlPlane, name: str) -> None:
    """They go into logs, and people read those."""
    body = json.dumps({"name": name})  # as bytes on the wire: half a surrogate pair is valid JSON
    headers = {"content-type": "application/json"}

    for path in ("/v1/tenants", "/v1/tenants/acme/projects", "/v1/tenants/acme/keys", "/v1/tenants/acme/service-accounts"):
        assert 400 == idle_control.ask("POST", path, content=body, headers=headers).status_code, path


@pytest.mark.parametrize("odd", ["%00", "a%00b", "%ED%A0%80", "{x}", "a%0Ab", "a:b", "x" * 5000, "%F0%9F%92%A9"])
def test_odd_ids_are_a_plain_refusal(idle_control: ControlPlane, odd: str) -> None:
    """Whatever a path holds, it is 400 or 404 and never a failure of ours."""
    for path in (
        f"/v1/tenants/{odd}", f"/v1/keys/{odd}", f"/v1/tenants/{odd}/keys", f"/v1/service-accounts/{odd}",
        f"/v1/operators/{odd}", f"/v1/requests/{odd}",
    ):  # fmt: skip
        assert idle_control.ask("GET", path).status_code in (400, 404), path


def test_a_one_mebibyte_name_is_refused_before_it_is_read(control: ControlPlane) -> None:
    """Bounded by the body, not by the field."""
    answer = control.ask("POST", "/v1/tenants", json={"name": "x" * (1 << 20)})

    assert 413 == answer.status_code
    assert [] == control.ask("GET", "/v1/tenants").json()["tenants"]


def test_verifying_reads_one_moment(control: ControlPlane) -> None:
    """Entries that are appended during the walk are not missing from it."""
    control.tenant("acme")
    store = control.services.store
    act = Act(actor="op_test", scope=ALL_TENANTS, request_id="r", now=control.clock.now)

    with store.snapshot(ALL_TENANTS) as connection:
        head = connection.execute("select sequence, hash from audit_head").fetchone()
        tenants.create(store, act, "meanwhile")
        links = list(audit._links(connection))

    assert head is not None
    end = chain.End(sequence=head["sequence"], hash=bytes(head["hash"]))
    assert chain.Verdict(end=end, fault=None) == chain.verify(links, head=end)


def test_values_that_cannot_be_stored_are_refused_by_the_store(control: ControlPlane) -> None:
    """The last line of defence, below every use case."""
    with pytest.raises(Invalid, match="cannot be stored"), control.services.store.transaction(ALL_TENANTS) as connection:
        connection.execute("select %s::text", ("\x00",))
