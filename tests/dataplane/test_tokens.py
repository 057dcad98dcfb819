# SPDX-License-Identifier: Apache-2.0
"""Tokens through real Envoy: every bad one, a provider that fails or rolls its keys, our own service accounts."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import yaml

from chassis.contract import EXPRESS_ENVIRONMENT, IDENTITY_PATH
from chassis.secrets import SECRET_LENGTH_MIN
from tests.dataplane.installation import VISIBLE_SECONDS, Installation, chat, running
from tests.hostile.guessing import GUESSERS, GUESSES_BEYOND, UNKNOWN_PER_MINUTE, UNSEEN, guess
from tests.identities import document_for, rows, write_document, write_home
from tests.provider import CLIENT_SECRET, Provider, running_provider

pytestmark = pytest.mark.express("on", "off")

#: The promise is one second, and five where a push was lost.
REVOKED_WITHIN_SECONDS = 5.0
TENANT = "acme"


@dataclass(frozen=True, kw_only=True)
class Trusting:
    """An installation whose identity document trusts a provider for one tenant, and our own control API."""

    installation: Installation
    provider: Provider
    document: dict[str, Any]

    def ask(self, token: str, **fields: Any) -> httpx.Response:
        """A chat request with *token*."""
        if len(token) >= SECRET_LENGTH_MIN:
            self.installation.issued.append(token)
        return self.installation.post(None, json=chat(**fields), headers={"authorization": f"Bearer {token}"})

    def wait_for(self, status: int, token: Callable[[], str], *, within: float = REVOKED_WITHIN_SECONDS) -> httpx.Response:
        """Ask until the answer is *status* or the time is over; the last answer."""
        deadline = time.monotonic() + within
        while True:
            answer = self.ask(token())
            if answer.status_code == status or time.monotonic() > deadline:
                return answer
            time.sleep(0.05)

    def log(self, event: str) -> list[str]:
        """Lines of extauth's log with *event*."""
        text = (self.installation.home / "log/extauth.log").read_text()
        return [line for line in text.splitlines() if f'"{event}"' in line]


@pytest.fixture(scope="module")
def trusting(tmp_path_factory: pytest.TempPathFactory, express_lane: str) -> Iterator[Trusting]:
    """One installation for this file."""
    with running_provider() as provider:
        directory = tmp_path_factory.mktemp("identity")
        write_home(directory, document_for(provider, tenant=TENANT))
        document = document_for(provider, tenant=TENANT)
        document["issuers"][1]["client_secret_file"] = str(directory / "secrets/corp")
        document["issuers"].append({"name": "control", "kind": "service_accounts"})
        path = directory / "named.yaml"
        path.write_text(yaml.safe_dump(document))
        home = tmp_path_factory.mktemp("tokens")
        settings = {"PEAJE_IDENTITY": str(path), "PEAJE_EXTAUTH_UNKNOWN_PER_MINUTE": str(UNKNOWN_PER_MINUTE), EXPRESS_ENVIRONMENT: express_lane}
        with running(home, "--engine", "fake", environment=settings) as installation:
            made = installation.control("POST", "/v1/tenants", json={"name": TENANT})
            assert 201 == made.status_code, made.text
            yield Trusting(installation=installation, provider=provider, document=document)
            # Nothing that was presented, good or bad, nor what this installation shows its issuer, can be read anywhere.
            installation.issued.append(CLIENT_SECRET)
            assert [] == installation.leaks()


@pytest.mark.parametrize("kid", ["es", "rs"])
def test_a_good_token_is_served_and_billed_to_its_tenant(trusting: Trusting, kid: str) -> None:
    """Its subject stands where a key's id stands, and is nobody's name."""
    answer = trusting.ask(trusting.provider.mint(kid))

    assert 200 == answer.status_code, answer.text
    rows_of = _rows_until(trusting, answer.headers["x-request-id"])
    assert [(TENANT, "default")] == [(row["tenant"], row["project"]) for row in rows_of]
    assert "user-7" not in rows_of[0]["key_id"]


@pytest.mark.parametrize("row", rows())
def test_a_bad_token_is_refused(trusting: Trusting, row: dict[str, Any]) -> None:
    """With the status and code of its row, told in the dialect; nothing reaches a model server."""
    answer = trusting.ask(trusting.provider.cook(row["token"], tenant=TENANT))

    expected = row.get("envoy", row["expect"])
    assert expected["status"] == answer.status_code
    if "code" in expected:
        error = answer.json()["error"]
        assert (expected["code"], answer.headers["x-request-id"]) == (error["code"], error["request_id"])
        assert answer.headers["x-request-id"] not in trusting.installation.truth()
    assert 0 == trusting.provider.elsewhere


def test_made_up_key_ids_cause_one_fetch(trusting: Trusting) -> None:
    """J05: hundreds of them, four at a time; good tokens pass meanwhile."""
    _forget_keys(trusting)
    good = trusting.provider.mint()
    before = trusting.provider.fetches

    began = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        bad = pool.map(
            lambda number: trusting.ask(trusting.provider.cook({"header": {"kid": f"k{number}"}}, TENANT)).status_code,
            range(300),
        )
        statuses = [trusting.ask(good).status_code for _ in range(20)]
        refused = set(bad)

    # On a busy machine one may not be judged in time, which is a refusal too.
    assert {401} <= refused <= {401, 503}
    assert {200} == set(statuses)
    # One that they cause; thirty seconds later, if the machine takes so long, another.
    assert trusting.provider.fetches - before <= 1 + (time.monotonic() - began) // 30


@pytest.mark.parametrize("row", rows("key_set_fault"))
def test_a_key_set_that_breaks_keeps_its_last_good_keys(trusting: Trusting, row: dict[str, Any]) -> None:
    """J14: fetched again (the document is new), refused, and tokens still pass by what was good."""
    _forget_keys(trusting)
    before = len(trusting.log("jwks_refused"))
    trusting.provider.fault = row["fault"]
    try:
        _fetch_again(trusting)
        if row["fault"] != "malformed_key":
            _wait_until(lambda: len(trusting.log("jwks_refused")) > before)
        answer = trusting.ask(trusting.provider.mint())
    finally:
        trusting.provider.fault = ""

    assert row["expect"]["status"] == answer.status_code, answer.text


@pytest.mark.parametrize("row", rows("introspection"))
def test_an_introspection_that_is_no_yes_lets_nobody_in(trusting: Trusting, row: dict[str, Any]) -> None:
    """J15: neither now nor later: nothing of a failure is remembered."""
    token = f"opaque-{row['id']}"
    trusting.provider.active[token] = row.get("text") or row.get("answer", {"active": True, "sub": "u", "tenant": TENANT})
    trusting.provider.introspection_fault = row.get("fault", "")
    try:
        answer = trusting.ask(token)
    finally:
        trusting.provider.introspection_fault = ""

    assert (row["expect"]["status"], row["expect"]["code"]) == (answer.status_code, answer.json()["error"]["code"])
    if row["expect"]["status"] == 503:
        assert "retry-after" in answer.headers
        trusting.provider.active[token] = {"active": True, "sub": "u", "tenant": TENANT}
        assert 200 == trusting.wait_for(200, lambda: token).status_code


def test_an_active_opaque_token_is_asked_about_once(trusting: Trusting) -> None:
    """The answer is remembered for a while."""
    trusting.provider.active["opaque-good"] = {"active": True, "sub": "u", "tenant": TENANT}
    before = trusting.provider.introspections

    statuses = {trusting.ask("opaque-good").status_code for _ in range(10)}

    assert {200} == statuses
    assert 1 == trusting.provider.introspections - before


def test_made_up_opaque_tokens_are_asked_about_so_often(trusting: Trusting) -> None:
    """K04 for tokens: their issuer hears of no more of one address than its turns, and a token in use passes."""
    trusting.provider.active["opaque-in-use"] = {"active": True, "sub": "u", "tenant": TENANT}
    assert 200 == trusting.ask("opaque-in-use").status_code
    before, began = trusting.provider.introspections, time.monotonic()

    made_up = [f"opaque-guess-{number}" for number in range(UNKNOWN_PER_MINUTE + GUESSES_BEYOND)]
    answers = guess(trusting.installation.port, made_up)
    in_use = trusting.ask("opaque-in-use")

    minutes = (time.monotonic() - began) / 60
    assert trusting.provider.introspections - before <= UNKNOWN_PER_MINUTE * (1 + minutes) + GUESSERS + 1 + 2 * minutes
    assert {(401, "invalid_token"), UNSEEN} <= set(answers) <= {(401, "invalid_token"), UNSEEN, (503, "service_unavailable")}
    assert 200 == in_use.status_code, in_use.text


def test_a_roll_of_keys_under_load_fails_no_request(trusting: Trusting) -> None:
    """The provider signs with a key that nobody was told of in advance; eight callers at once."""
    # Whatever key ids were made up before have had their fetch; this roll must not have to wait for the next.
    _forget_keys(trusting)
    provider, stop, failed, count = trusting.provider, threading.Event(), [], [0]
    current = ["es"]

    def call() -> None:
        with httpx.Client(timeout=30) as client:
            while not stop.is_set():
                token = provider.mint(current[0])
                answer = client.post(
                    f"{trusting.installation.url}/v1/chat/completions", json=chat(), headers={"authorization": f"Bearer {token}"}
                )
                count[0] += 1
                if answer.status_code != 200:
                    failed.append((current[0], answer.status_code, answer.text))

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    _wait_until(lambda: count[0] >= 50)
    provider.add("next", "ES256")
    current[0] = "next"
    reached = count[0]
    _wait_until(lambda: count[0] >= reached + 100)
    stop.set()
    for thread in threads:
        thread.join(30)

    assert [] == failed
    assert count[0] >= 150
    provider.published = None


def test_a_bad_document_keeps_the_last_good_one(trusting: Trusting) -> None:
    """It is said in the log, with every fault; tokens pass as before."""
    before = len(trusting.log("identity_refused"))
    broken = yaml.safe_load(yaml.safe_dump(trusting.document))
    broken["issuers"][0]["algorithms"] = ["HS256"]
    broken["issuers"][0]["tenants"] = []

    write_document(trusting.installation.home, broken)

    _wait_until(lambda: len(trusting.log("identity_refused")) > before)
    said = trusting.log("identity_refused")[-1]
    assert "issuers[0].algorithms" in said
    assert "issuers[0].tenants" in said
    assert 200 == trusting.ask(trusting.provider.mint()).status_code
    _replace_document(trusting)


def test_an_issuer_that_is_taken_out_is_out(trusting: Trusting) -> None:
    """Also for a token that was just let in; and back when it is back."""
    token = trusting.provider.mint()
    assert 200 == trusting.wait_for(200, lambda: token).status_code
    others = {**trusting.document, "issuers": trusting.document["issuers"][1:]}

    write_document(trusting.installation.home, others)
    refused = trusting.wait_for(401, lambda: token)
    _replace_document(trusting)

    assert (401, "invalid_token") == (refused.status_code, refused.json()["error"]["code"])
    assert 200 == trusting.wait_for(200, lambda: token).status_code


def test_a_service_account_signs_in_and_is_out_when_it_is_suspended(trusting: Trusting) -> None:
    """The control API's token passes through Envoy; a suspension beats the token's own ten minutes."""
    installation = trusting.installation
    account = installation.control("POST", f"/v1/tenants/{TENANT}/service-accounts", json={"name": "batch"}).json()
    signed_in = httpx.post(
        f"http://127.0.0.1:{installation.control_port}/oauth2/token", data={"grant_type": "client_credentials"},
        auth=(account["service_account_id"], account["client_secret"]),
    )  # fmt: skip
    token = signed_in.json()["access_token"]

    passed = trusting.wait_for(200, lambda: token)
    suspended = installation.control(
        "PATCH", f"/v1/service-accounts/{account['service_account_id']}", json={"state": "suspended"}
    )
    refused = trusting.wait_for(403, lambda: token)

    assert 200 == passed.status_code, passed.text
    assert 200 == suspended.status_code, suspended.text
    assert (403, "service_account_suspended") == (refused.status_code, refused.json()["error"]["code"])
    row = _rows_until(trusting, passed.headers["x-request-id"])[0]
    assert (TENANT, account["service_account_id"]) == (row["tenant"], row["key_id"])


def test_no_token_is_in_a_log_or_the_journal(trusting: Trusting) -> None:
    """Neither whole nor its signature."""
    token = trusting.provider.mint()
    trusting.ask(token)
    trusting.ask(token + "x")

    signature = token.rpartition(".")[2].encode()
    files = [path for place in ("log", "journal") for path in (trusting.installation.home / place).iterdir()]
    assert [] == [path.name for path in files if signature in path.read_bytes() or b"user-7" in path.read_bytes()]


def _rows_until(trusting: Trusting, request_id: str) -> list[dict[str, Any]]:
    deadline = time.monotonic() + VISIBLE_SECONDS
    while True:
        found = trusting.installation.sql("select * from billing_usage_v1 where request_id = %s", request_id)
        if found or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def _replace_document(trusting: Trusting) -> None:
    """Put the good document in place and wait until it is in force."""
    before = len(trusting.log("identity_reloaded"))
    write_document(trusting.installation.home, trusting.document)
    _wait_until(lambda: len(trusting.log("identity_reloaded")) > before)


def _forget_keys(trusting: Trusting) -> None:
    """Begin anew with the provider's keys: another order of algorithms is another source, which has met no unknown id."""
    algorithms = trusting.document["issuers"][0]["algorithms"]
    trusting.document["issuers"][0]["algorithms"] = [*algorithms[1:], algorithms[0]]
    _replace_document(trusting)
    assert 200 == trusting.wait_for(200, trusting.provider.mint).status_code


def _fetch_again(trusting: Trusting) -> None:
    """Have the key set fetched: an unknown key id causes it."""
    before = trusting.provider.fetches
    trusting.ask(trusting.provider.cook({"header": {"kid": f"again-{before}"}}, TENANT))
    _wait_until(lambda: trusting.provider.fetches > before)


def _wait_until(is_so: Callable[[], Any], *, within: float = 30.0, every: float = 0.05) -> None:
    deadline = time.monotonic() + within
    while not is_so():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(every)


def test_the_installation_took_the_document_that_was_named(trusting: Trusting) -> None:
    """PEAJE_IDENTITY is copied into the state directory."""
    in_force = yaml.safe_load((trusting.installation.home / IDENTITY_PATH).read_text())

    assert trusting.document["issuers"][0]["name"] == in_force["issuers"][0]["name"]
