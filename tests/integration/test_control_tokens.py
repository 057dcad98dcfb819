# SPDX-License-Identifier: Apache-2.0
"""The token endpoint: client credentials in, a token that a verifier with our JWK set accepts, or RFC 6749's errors."""

from __future__ import annotations

import base64
import stat
from pathlib import Path
from typing import Any

import jwt
import pytest

from tests.integration.control_plane import ISSUER, ControlPlane, Tenant

FORM = "application/x-www-form-urlencoded"
GRANT = {"grant_type": "client_credentials"}


@pytest.fixture
def acme(control: ControlPlane) -> Tenant:
    return control.tenant("acme")


def ask(control: ControlPlane, account: dict[str, Any], **fields: str) -> Any:
    """Ask with client_secret_basic."""
    return control.client.post(
        "/oauth2/token", data=GRANT | fields, auth=(account["client_id"], account["client_secret"])
    )


def accept(control: ControlPlane, token: str) -> dict[str, Any]:
    """The claims, as a verifier reads them that knows our JWK set and nothing else."""
    known = {key.key_id: key for key in jwt.PyJWKSet.from_dict(control.client.get("/.well-known/jwks.json").json()).keys}
    return jwt.decode(
        token, known[jwt.get_unverified_header(token)["kid"]].key, algorithms=["ES256"], audience="peaje", issuer=ISSUER,
        options={"require": ["exp", "iat", "jti", "sub", "client_id"], "verify_exp": False, "verify_iat": False},
    )  # fmt: skip


def test_a_token_says_who_and_where_and_a_verifier_accepts_it(control: ControlPlane, acme: Tenant) -> None:
    """RFC 9068: at+jwt, ES256, ten minutes."""
    answer = ask(control, acme.account)

    assert (200, "no-store") == (answer.status_code, answer.headers["cache-control"])
    document = answer.json()
    assert ("Bearer", 600) == (document["token_type"], document["expires_in"])
    header = jwt.get_unverified_header(document["access_token"])
    assert ("at+jwt", "ES256") == (header["typ"], header["alg"])
    claims = accept(control, document["access_token"])
    issued_at = int(control.clock.now.timestamp())
    token_id = claims.pop("jti")
    assert {
        "iss": ISSUER, "sub": acme.account["service_account_id"], "aud": "peaje", "iat": issued_at, "exp": issued_at + 600,
        "client_id": acme.account["service_account_id"], "tenant": "acme", "project": "default",
    } == claims  # fmt: skip
    assert token_id != accept(control, ask(control, acme.account).json()["access_token"])["jti"]


def test_the_secret_in_the_form_works_as_in_the_header(control: ControlPlane, acme: Tenant) -> None:
    """client_secret_post."""
    fields = GRANT | {name: acme.account[name] for name in ("client_id", "client_secret")}

    assert 200 == control.client.post("/oauth2/token", data=fields).status_code


@pytest.mark.parametrize(
    ("allowed", "asked", "granted"),
    [
        (None, None, None), (None, "models", "models"), (["inference", "models"], None, "inference models"),
        (["inference", "models"], "models", "models"), (["inference", "models"], "models inference", "inference models"),
    ],
)  # fmt: skip
def test_scopes_are_what_was_asked_for_within_the_accounts(
    control: ControlPlane, allowed: list[str] | None, asked: str | None, granted: str | None
) -> None:
    """None asked for: all that the account has."""
    control.made("/v1/tenants", {"name": "acme"})
    account = control.made("/v1/tenants/acme/service-accounts", {"name": "x", "scopes": allowed})

    document = ask(control, account, **({"scope": asked} if asked else {})).json()

    assert granted == document.get("scope") == accept(control, document["access_token"]).get("scope")


def test_a_scope_beyond_the_accounts_is_refused(control: ControlPlane) -> None:
    """Not left out in silence: the caller would find out later, elsewhere."""
    control.made("/v1/tenants", {"name": "acme"})
    account = control.made("/v1/tenants/acme/service-accounts", {"name": "x", "scopes": ["inference"]})

    for scope in ("models", "inference models", "inference  inference", " inference", "INFERENCE"):
        answer = ask(control, account, scope=scope)
        assert (400, "invalid_scope") == (answer.status_code, answer.json()["error"]), scope


def test_every_way_not_to_be_the_client_has_one_answer(control: ControlPlane, acme: Tenant) -> None:
    """Nobody can ask which clients exist, or what is wrong with one."""
    rival = control.tenant("rival")
    account, other = acme.account, rival.account
    secret = account["client_secret"]
    suspended = control.made("/v1/tenants/acme/service-accounts", {"name": "s"})
    control.made(f"/v1/service-accounts/{suspended['client_id']}", {"state": "suspended"}, method="PATCH")
    in_project = control.made("/v1/tenants/acme/service-accounts", {"name": "p", "project": acme.project_id})
    control.made(f"/v1/tenants/acme/projects/{acme.project_id}", {"state": "suspended"}, method="PATCH")
    of_tenant = control.made("/v1/tenants/rival/service-accounts", {"name": "t"})
    control.made("/v1/tenants/rival", {"state": "suspended"}, method="PATCH")
    wrong = [
        ("sa_000000000000", secret), (account["client_id"], other["client_secret"]), (other["client_id"], secret),
        (account["client_id"], "x"), (account["client_id"], secret[:-1]), (account["client_id"], acme.key["key"]),
        (account["client_id"], control.admin), ("", secret), (account["client_id"], ""), ("\x00", secret),
        (suspended["client_id"], suspended["client_secret"]), (in_project["client_id"], in_project["client_secret"]),
        (of_tenant["client_id"], of_tenant["client_secret"]),
    ]  # fmt: skip

    answers = [control.client.post("/oauth2/token", data=GRANT, auth=pair) for pair in wrong]
    answers += [
        control.client.post("/oauth2/token", data=GRANT),
        control.client.post("/oauth2/token", data=GRANT, headers={"authorization": "Basic !"}),
        control.client.post("/oauth2/token", data=GRANT, headers={"authorization": "Basic " + base64.b64encode(b"\xff:x").decode()}),
        control.client.post("/oauth2/token", data=GRANT, headers={"authorization": f"Bearer {control.admin}"}),
        control.client.post("/oauth2/token", data=GRANT | {"client_id": account["client_id"]}),
    ]

    assert {401} == {answer.status_code for answer in answers}
    assert 1 == len({answer.text for answer in answers})
    assert "invalid_client" == answers[0].json()["error"]
    assert answers[0].headers["www-authenticate"].startswith("Basic ")


@pytest.mark.parametrize(
    ("body", "content_type", "error"),
    [
        ("grant_type=password", FORM, "unsupported_grant_type"),
        ("grant_type=authorization_code&code=x", FORM, "unsupported_grant_type"),
        ("", FORM, "invalid_request"),
        ("grant_type=", FORM, "invalid_request"),
        ("scope=chat", FORM, "invalid_request"),
        ("grant_type=client_credentials&grant_type=client_credentials", FORM, "invalid_request"),
        ("grant_type=client_credentials&client_secret=x", FORM, "invalid_request"),
        ("grant_type=client_credentials&client_id=sa_other", FORM, "invalid_request"),
        ("grant_type", FORM, "invalid_request"),
        ("grant_type=client_credentials&x=%FF", FORM, "invalid_request"),
        ("&".join(["grant_type=client_credentials", *(f"p{number}=x" for number in range(16))]), FORM, "invalid_request"),
        ('{"grant_type": "client_credentials"}', "application/json", "invalid_request"),
        ("grant_type=client_credentials", "", "invalid_request"),
    ],
)
def test_a_bad_request_has_the_error_of_rfc_6749(
    idle_control: ControlPlane, body: str, content_type: str, error: str
) -> None:
    """With the right client: the mistake is in the form."""
    assert idle_control.acme is not None
    account = idle_control.acme.account

    answer = idle_control.client.post(
        "/oauth2/token", content=body, auth=(account["client_id"], account["client_secret"]),
        headers={"content-type": content_type},
    )  # fmt: skip

    assert (400, error) == (answer.status_code, answer.json()["error"])
    assert {"error", "error_description"} == set(answer.json())
    assert "no-store" == answer.headers["cache-control"]


def test_unknown_parameters_are_ignored(control: ControlPlane, acme: Tenant) -> None:
    """RFC 6749 3.2 asks for it: clients send more than we know."""
    assert 200 == ask(control, acme.account, resource="https://example.com", flavour="").status_code


def test_both_secrets_work_until_the_overlap_is_over(control: ControlPlane, acme: Tenant) -> None:
    """And one from before the last rotation no longer."""
    path = f"/v1/service-accounts/{acme.account['client_id']}/rotate"
    first = acme.account
    second = control.made(path, {"overlap": "1h"})

    assert [200, 200] == [ask(control, one).status_code for one in (first, second)]
    control.clock.forward(seconds=3599.999)
    assert [200, 200] == [ask(control, one).status_code for one in (first, second)]
    control.clock.forward(seconds=0.001)
    assert [401, 200] == [ask(control, one).status_code for one in (first, second)]
    third = control.made(path, {"overlap": "1h"})
    assert [401, 200, 200] == [ask(control, one).status_code for one in (first, second, third)]
    fourth = control.made(path, {"overlap": "0s"})
    assert [401, 401, 401, 200] == [ask(control, one).status_code for one in (first, second, third, fourth)]


def test_a_signing_key_is_published_before_it_signs_and_kept_after_it_has(control: ControlPlane, acme: Tenant) -> None:
    """So that no verifier meets a token whose key it cannot know, and no token ends before its time."""
    before = ask(control, acme.account).json()["access_token"]
    old = jwt.get_unverified_header(before)["kid"]
    control.clock.forward(seconds=1)

    new = control.made("/v1/signing-keys/rotate", {})["kid"]

    def signs() -> str:
        return str(jwt.get_unverified_header(ask(control, acme.account).json()["access_token"])["kid"])

    def published() -> set[str]:
        return {key["kid"] for key in control.client.get("/.well-known/jwks.json").json()["keys"]}

    assert (old, {old, new}) == (signs(), published())
    control.clock.forward(minutes=9, seconds=59)
    last = ask(control, acme.account).json()["access_token"]
    assert old == jwt.get_unverified_header(last)["kid"]
    control.clock.forward(seconds=1)
    assert (new, {old, new}) == (signs(), published())
    accept(control, last)
    control.clock.forward(minutes=10, seconds=59)  # `last` is over since a minute
    assert {old, new} == published()
    control.clock.forward(seconds=1)
    assert (new, {new}) == (signs(), published())


def test_a_second_rotation_waits_and_a_stolen_key_goes_at_once(
    control: ControlPlane, acme: Tenant, tmp_path: Path
) -> None:
    """A thief's tokens stop being accepted by whoever asks for the keys again."""
    before = ask(control, acme.account).json()["access_token"]
    control.made("/v1/signing-keys/rotate", {})

    assert 409 == control.ask("POST", "/v1/signing-keys/rotate", json={}).status_code
    control.clock.forward(seconds=1)
    made = control.made("/v1/signing-keys/rotate", {"at_once": True})

    assert [made["kid"]] == [key["kid"] for key in control.client.get("/.well-known/jwks.json").json()["keys"]]
    with pytest.raises(KeyError):
        accept(control, before)
    accept(control, ask(control, acme.account).json()["access_token"])
    assert 1 == len(list(tmp_path.glob("signing-key-*.pem")))


def test_signing_keys_are_files_of_their_owner_and_no_answer_has_the_private_half(
    control: ControlPlane, acme: Tenant, tmp_path: Path
) -> None:
    """Neither the list nor the JWK set."""
    ask(control, acme.account)
    files = list(tmp_path.glob("signing-key-*.pem"))

    assert [0o600] == [stat.S_IMODE(file.stat().st_mode) for file in files]
    jwks = control.client.get("/.well-known/jwks.json").json()
    assert [{"alg", "crv", "kid", "kty", "use", "x", "y"}] == [set(key) for key in jwks["keys"]]
    for text in (str(jwks), control.ask("GET", "/v1/signing-keys").text):
        assert "PRIVATE" not in text
        assert files[0].read_text().splitlines()[1] not in text


def test_a_signing_key_that_others_can_read_is_refused(control: ControlPlane, acme: Tenant, tmp_path: Path) -> None:
    """Whoever reads it can be anybody."""
    ask(control, acme.account)
    control.made("/v1/signing-keys/rotate", {})
    for file in tmp_path.glob("signing-key-*.pem"):
        file.chmod(0o644)
    control.services.issuer.keys._names = []  # as after a restart

    assert 503 == ask(control, acme.account).status_code


def test_the_metadata_leads_to_the_endpoint_and_the_keys(control: ControlPlane) -> None:
    """RFC 8414; the issuer is equal to the one in tokens, letter by letter."""
    document = control.client.get("/.well-known/oauth-authorization-server").json()

    assert ISSUER == document["issuer"]
    assert f"{ISSUER}/oauth2/token" == document["token_endpoint"]
    assert 200 == control.client.get(document["jwks_uri"].removeprefix(ISSUER)).status_code
    assert ["client_secret_basic", "client_secret_post"] == document["token_endpoint_auth_methods_supported"]
