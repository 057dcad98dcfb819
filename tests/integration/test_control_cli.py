# SPDX-License-Identifier: Apache-2.0
"""The control API as a process of its own, and the command line as people use it."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import jwt
import psycopg
import pyarrow.parquet as pq
import pytest

from chassis.clock import utc_now
from chassis.schema.migrate import migrate
from control import cli
from control.laptop.places import Places, make
from tests.journals import collect, end, start, write, write_apart

ROOT = Path(__file__).resolve().parents[2]
_START_SECONDS_MAX = 60
MODELS = 'models: [{name: tiny, engine: openai, endpoints: ["127.0.0.1:1"]}]\n'


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """A control API that runs for all tests of this file."""

    home: Path
    url: str
    postgres_url: str
    log: Path


@pytest.fixture(scope="module")
def process(empty_database: Callable[[], str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """Start `python -m control.api` as a cluster would: a migrated database without any operator."""
    postgres_url = empty_database()
    migrate(postgres_url, utc_now().date())
    home = tmp_path_factory.mktemp("control") / "home"
    make(Places(home), passable=False)
    (home / "envoy/models.yaml").write_text(MODELS)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = home / "log/control.log"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PEAJE_")} | {
        "PEAJE_HOME": str(home), "PEAJE_POSTGRES_URL": postgres_url, "PEAJE_CONTROL_PORT": str(port),
        "PYTHONPATH": str(ROOT), "PEAJE_LOG_LEVEL": "debug",
    }  # fmt: skip
    with log.open("wb") as file:
        running = subprocess.Popen([sys.executable, "-m", "control.api"], env=environment, stdout=file, stderr=file, cwd=home)
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + _START_SECONDS_MAX
    while True:
        try:
            httpx.get(f"{url}/health").raise_for_status()
            break
        except httpx.HTTPError:
            assert running.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
    try:
        yield Process(home=home, url=url, postgres_url=postgres_url, log=log)
    finally:
        running.send_signal(signal.SIGTERM)
        running.wait(timeout=30)


@dataclass(slots=True)
class Peaje:
    """The command line, in this process: what it printed and how it ended."""

    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        """Exit status, stdout, stderr."""
        self.monkeypatch.setattr(sys, "argv", ["peaje", *arguments])
        status = cli.main()
        said = self.capsys.readouterr()
        return status, said.out, said.err

    def json(self, *arguments: str) -> Any:
        """The answer of a command that must succeed."""
        status, out, err = self(*arguments, "--json")
        assert (0, "") == (status, err)
        return json.loads(out)


@pytest.fixture
def peaje(process: Process, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Peaje:
    """The command line of an operator who has exchanged the one-time token, if nobody had yet."""
    for name in [name for name in os.environ if name.startswith("PEAJE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PEAJE_HOME", str(process.home))
    monkeypatch.setenv("PEAJE_CONTROL_URL", process.url)
    command = Peaje(monkeypatch, capsys)
    token_path = process.home / "secrets/admin-token"
    if not token_path.exists():
        once = process.home / "secrets/bootstrap-token"
        assert 0o600 == stat.S_IMODE(once.stat().st_mode)
        made = command.json("operators", "bootstrap", "--name", "ana")
        assert ("ana", "platform-admin", False) == (made["name"], made["role"], once.exists())
        token_path.write_text(made["token"])
        token_path.chmod(0o600)
    return command


def test_bootstrapping_again_is_one_line_with_what_is_missing(process: Process, peaje: Peaje) -> None:
    """The file is gone once it was used."""
    status, out, err = peaje("operators", "bootstrap")

    assert (1, "") == (status, out)
    assert "bootstrap-token is missing" in err
    assert 1 == len(err.splitlines())


def test_the_life_of_a_key_on_the_command_line(peaje: Peaje) -> None:
    """Every verb, with the field names of the API."""
    peaje.json("tenants", "create", "Keys Inc")
    peaje.json("projects", "create", "Search", "--tenant", "keys-inc", "--label", "tier=gold")
    account = peaje.json("service-accounts", "create", "robot", "--tenant", "keys-inc", "--project", "search")
    made = peaje.json(
        "keys", "create", "--tenant", "keys-inc", "--project", "search", "--service-account", account["service_account_id"],
        "--models", "tiny, x-*", "--denied-models", "x-9*", "--scopes", "inference", "--allowed-cidrs", "192.0.2.0/24",
        "--expires", "30d", "--environment", "test",
    )  # fmt: skip

    assert {"key_id", "key"} <= set(made)
    assert (["tiny", "x-*"], ["x-9*"], ["inference"], ["192.0.2.0/24"]) == tuple(
        made[name] for name in ("models", "denied_models", "scopes", "allowed_cidrs")
    )
    assert "disabled" == peaje.json("keys", "disable", made["key_id"])["state"]
    assert "active" == peaje.json("keys", "enable", made["key_id"])["state"]
    new = peaje.json("keys", "rotate", made["key_id"], "--overlap", "1h")
    assert new["key_id"] == peaje.json("keys", "show", made["key_id"])["rotated_to"]
    assert peaje.json("keys", "revoke", new["key_id"])["revoked_at"] is not None
    listed = peaje.json("keys", "list", "--tenant", "keys-inc")["keys"]
    assert {made["key_id"], new["key_id"]} == {key["key_id"] for key in listed}
    status, table, _ = peaje("keys", "list", "--tenant", "keys-inc")
    assert (0, True) == (status, made["key_id"] in table)
    assert made["key"] not in table


def test_projects_and_service_accounts_on_the_command_line(peaje: Peaje) -> None:
    """Every verb."""
    peaje.json("tenants", "create", "pro")
    peaje.json("projects", "create", "Search", "--tenant", "pro")
    assert "suspended" == peaje.json("projects", "suspend", "search", "--tenant", "pro")["state"]
    assert "active" == peaje.json("projects", "activate", "search", "--tenant", "pro")["state"]
    assert {"a": "b"} == peaje.json("projects", "label", "search", "--tenant", "pro", "--label", "a=b")["labels"]
    assert ["default", "search"] == [it["project_id"] for it in peaje.json("projects", "list", "--tenant", "pro")["projects"]]
    assert "Search" == peaje.json("projects", "show", "search", "--tenant", "pro")["name"]
    made = peaje.json("service-accounts", "create", "robot", "--tenant", "pro", "--scopes", "inference", "--models", "tiny")
    account_id = made["service_account_id"]
    assert "suspended" == peaje.json("service-accounts", "suspend", account_id)["state"]
    assert "active" == peaje.json("service-accounts", "activate", account_id)["state"]
    assert made["client_secret"] != peaje.json("service-accounts", "rotate", account_id)["client_secret"]
    assert account_id == peaje.json("service-accounts", "list", "--tenant", "pro")["service_accounts"][0]["service_account_id"]
    assert ["inference"] == peaje.json("service-accounts", "show", account_id)["scopes"]
    assert "suspended" == peaje.json("tenants", "suspend", "pro")["state"]
    assert "active" == peaje.json("tenants", "activate", "pro")["state"]


def test_another_operator_names_a_file_with_its_token(
    peaje: Peaje, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A developer's refusal says which right is missing; a revoked one is nobody."""
    peaje.json("tenants", "create", "ops")
    made = peaje.json("operators", "create", "dev", "--role", "developer", "--tenant", "ops", "--expires", "1d")
    assert made["operator_id"] in {it["operator_id"] for it in peaje.json("operators", "list")["operators"]}
    path = tmp_path / "token"
    path.write_text(made["token"])
    path.chmod(0o600)
    monkeypatch.setenv("PEAJE_OPERATOR_TOKEN_FILE", str(path))

    assert ["ops"] == [tenant["tenant_id"] for tenant in peaje.json("tenants", "list")["tenants"]]
    status, out, err = peaje("limits", "set", "--tenant", "ops", "--rpm", "1")
    assert (1, "", True) == (status, out, "limits:write" in err)
    monkeypatch.delenv("PEAJE_OPERATOR_TOKEN_FILE")
    assert peaje.json("operators", "revoke", made["operator_id"])["revoked_at"] is not None
    monkeypatch.setenv("PEAJE_OPERATOR_TOKEN_FILE", str(path))
    status, _, err = peaje("tenants", "list")
    assert (1, True) == (status, "token is missing, wrong or over" in err)
    path.chmod(0o644)
    status, _, err = peaje("tenants", "list")
    assert (1, True) == (status, "chmod 600" in err)


def test_the_life_of_a_webhook_on_the_command_line(peaje: Peaje, tmp_path: Path) -> None:
    """Every verb; its secret is shown when it is made and when it is rotated."""
    peaje.json("tenants", "create", "hooks")
    token = tmp_path / "token"
    token.write_text("sk_test_x")
    token.chmod(0o600)
    made = peaje.json("webhooks", "add", "https://example.com/hook", "--tenant", "hooks", "--events", "key.created, budget.threshold")
    metered = peaje.json("webhooks", "add", "--format", "stripe", "--token-file", str(token))
    hook = made["webhook_id"]

    assert (["budget.threshold", "key.created"], ["usage.hour"], None) == (made["events"], metered["events"], metered["tenant_id"])
    assert "https://api.stripe.com/v1/billing/meter_events" == metered["url"]
    assert "paused" == peaje.json("webhooks", "pause", hook)["state"]
    assert (1, "") == peaje("webhooks", "test", hook)[:2]
    assert "active" == peaje.json("webhooks", "resume", hook)["state"]
    assert 1 == peaje.json("webhooks", "test", hook)["behind_count"]
    assert (0, 1) == tuple(peaje.json("webhooks", "resume", hook, "--skip")[name] for name in ("behind_count", "missed_count"))
    rotated = peaje.json("webhooks", "rotate-secret", hook, "--overlap", "1h")
    assert made["secret"] != rotated["secret"] and rotated["previous_secret_expires_at"] is not None
    assert "cus_1" == peaje.json("webhooks", "customer", metered["webhook_id"], "hooks", "cus_1")["customer"]
    assert {"hooks": "cus_1"} == peaje.json("webhooks", "show", metered["webhook_id"])["customers"]
    assert [] == peaje.json("webhooks", "deliveries", hook)["deliveries"]
    status, table, _ = peaje("webhooks", "list")
    assert (0, True, False) == (status, hook in table, "whsec_" in table)
    assert hook == peaje.json("webhooks", "remove", hook)["webhook_id"]
    status, out, err = peaje("webhooks", "show", hook)
    assert (1, "", 1) == (status, out, len(err.splitlines()))


def test_money_on_the_command_line(peaje: Peaje, tmp_path: Path) -> None:
    """Usage from a file, the invoice in each format, a corrected price, credits."""
    peaje.json("tenants", "create", "payer")
    peaje.json("prices", "set", "--model", "tiny", "--tenant", "payer", "--input", "1", "--output", "2")
    now = utc_now()
    lines = [
        {"id": f"batch-{number}", "tenant": "payer", "model": "tiny", "input_tokens": 1000, "output_tokens": 0, "started_at": now.isoformat()}
        for number in range(3)
    ]
    file = tmp_path / "usage.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    month = f"{now:%Y-%m}"
    of_month = ("invoice", "--tenant", "payer", "--month", month)
    rerate = ("rerate", "--model", "tiny", "--tenant", "payer", "--month", month, "--input", "3", "--output", "2", "--reason", "a typo")

    assert [{"added": 3, "known": 0}, {"added": 0, "known": 3}] == [peaje.json("usage", "import", str(file)) for _ in range(2)]
    assert [3] == [it["requests"] for it in peaje.json("usage", "--tenant", "payer")["usage"]]
    shown = peaje(*rerate)
    assert (0, True) == (shown[0], "difference USD 0.006: nothing was changed" in shown[1])
    assert isinstance(peaje.json(*rerate, "--apply")["rerating_id"], int)
    granted = peaje.json("credits", "grant", "10", "--tenant", "payer", "--reason", "paid", "--reference", "p1")
    assert ("10.00", granted["grant_id"]) == (granted["available"], granted["grants"][0]["grant_id"])
    ended = peaje.json("credits", "expire", granted["grant_id"], "--tenant", "payer", "--reason", "refunded")
    assert ("0.00", "0.00") == (ended["available"], peaje.json("credits", "show", "--tenant", "payer")["available"])

    written = tmp_path / "invoice.parquet"
    assert (0, "", "") == peaje(*of_month, "--format", "parquet", "--out", str(written))
    assert [3_000_000, 6_000_000] == [it["amount_nano"] for it in pq.read_table(written).to_pylist()]
    status, out, _ = peaje(*of_month, "--format", "csv")
    assert (0, 3) == (status, len(out.splitlines()))
    assert ["0.009"] == [it["amount"] for it in peaje.json(*of_month)["totals"]]
    for wrong in (("--format", "parquet"), ("--format", "csv", "--json"), ("--out", str(written)), ("--format", "json", "--out", "/nowhere/x")):
        status, out, err = peaje(*of_month, *wrong)
        assert (1, "", 1) == (status, out, len(err.splitlines())), wrong
    file.write_text('{"id": "fine"}\nnot json\n')
    status, out, err = peaje("usage", "import", str(file))
    assert (1, "", True) == (status, out, "usage.jsonl:2 is not a JSON object" in err)
    file.write_text("\n".join(json.dumps(lines[0] | {"id": f"more-{n}", "output_tokens": 0 if n < 501 else -1}) for n in range(502)))
    status, out, err = peaje("usage", "import", str(file))
    assert (1, "", True) == (status, out, "usage.jsonl:502: a count is from 0 to" in err), err
    assert "Lines before these were added (500)" in err


def test_a_name_with_brackets_breaks_no_list_and_help_says_peaje(peaje: Peaje) -> None:
    """Whoever may name a key may not take the list of keys away."""
    peaje.json("tenants", "create", "Brackets [/red] Inc")

    assert (0, True) == ((found := peaje("tenants", "list"))[0], "Brackets [/red] Inc" in found[1])
    assert "Usage: peaje tenants" in peaje("tenants", "--help")[1]


def test_explaining_nothing_says_what_to_name(peaje: Peaje) -> None:
    """In the words of the command line."""
    status, out, err = peaje("explain")

    assert (1, "", True) == (status, out, "--service-account" in err)


def test_tiers_on_the_command_line(peaje: Peaje, tmp_path: Path) -> None:
    """Set, listed as they would be set again, charged to what is posted as well, and corrected."""
    peaje.json("tenants", "create", "reader")
    whose = ("--model", "tiny", "--tenant", "reader", "--input", "1", "--output", "2")
    made = peaje.json("prices", "set", *whose, "--tier", "2000:input=4,output=8,cached=0.5", "--tier", "500:input=2,output=4")
    now = utc_now()
    file = tmp_path / "usage.jsonl"
    file.write_text("".join(
        json.dumps({"id": f"read-{tokens}", "tenant": "reader", "model": "tiny", "input_tokens": tokens, "output_tokens": 0, "started_at": now.isoformat()}) + "\n"
        for tokens in (500, 501, 2001)
    ))  # fmt: skip
    peaje.json("usage", "import", str(file))

    assert [(500, "2.00", "2.00"), (2000, "4.00", "0.50")] == [(it["above_tokens"], it["input"], it["cached"]) for it in made["tiers"]]
    status, out, _ = peaje("prices", "list", "--tenant", "reader")
    written = "500:input=2.00,output=4.00,cached=2.00,reasoning=4.00 2000:input=4.00,output=8.00,cached=0.50,reasoning=8.00"
    assert (0, True) == (status, written in out)
    month = f"{now:%Y-%m}"
    [total] = peaje.json("invoice", "--tenant", "reader", "--month", month)["totals"]
    assert 500 * 1000 + 501 * 2000 + 2001 * 4000 == total["amount_nano"]
    shown = peaje.json("rerate", *whose, "--month", month, "--reason", "a typo", "--tier", "500:input=3,output=4")
    assert 501 * 3000 + 2001 * 3000 - 501 * 2000 - 2001 * 4000 == shown["difference_nano"]


def test_a_journal_is_retired_on_the_command_line_once_it_is_read(process: Process, peaje: Peaje, tmp_path: Path) -> None:
    """Not while its files hold a record that nobody has read; a line without an end is none."""
    live, before = tmp_path / "pod-7/journal.jsonl", utc_now() - timedelta(hours=1)
    collect(process.postgres_url, write_apart(live, [start(1, at=before), end(1, at=before)]), journal="pod-7", now=before)
    write_apart(live, [start(2, at=before)])
    retire = ("journal", "retire", "pod-7", "--reason", "its node is gone")

    unread = peaje(*retire, "--file", str(live))
    write(live, [end(2, at=before), b'{"type":"Downstr'])
    still = peaje(*retire, "--file", str(live))
    collect(process.postgres_url, live, journal="pod-7", now=before)
    nowhere = peaje(*retire, "--file", str(tmp_path / "nowhere/journal.jsonl"))
    neither = peaje(*retire)
    done = peaje.json(*retire, "--file", str(live))

    assert [1, 1, 1, 1] == [it[0] for it in (unread, still, nowhere, neither)]
    assert "has records that are not read" in unread[2]
    assert "has records that are not read" in still[2]
    assert "There is no journal at" in nowhere[2]
    assert "either --file or --files-gone" in neither[2]
    assert ("pod-7", 0, "read") == (done["journal"], done["closed_count"], done["files"])
    listed = peaje.json("journal", "list")
    assert [] == listed["journals"]
    assert ["its node is gone"] == [it["reason"] for it in listed["retired"]]


def test_the_audit_log_on_the_command_line(process: Process, peaje: Peaje) -> None:
    """A broken chain is exit status 1, which is what a nightly job looks at."""
    peaje.json("tenants", "create", "audited")
    verdict = peaje.json("audit", "verify")
    assert verdict["intact"]
    assert peaje.json("audit", "verify", "--anchor", verdict["anchor"])["intact"]
    entries = peaje.json("audit", "list", "--limit", "1000")["entries"]
    assert "tenant.created" in {entry["action"] for entry in entries}
    status, table, _ = peaje("audit", "list")
    assert (0, True) == (status, "bootstrap.opened" in table)
    with psycopg.connect(process.postgres_url) as connection:
        connection.execute("alter table audit_event disable trigger all")
        connection.execute("update audit_event set actor = actor || 'x' where sequence = 2")

    status, out, _ = peaje("audit", "verify")

    assert (1, True) == (status, "Entry 2 was changed." in out)
    with psycopg.connect(process.postgres_url) as connection:
        connection.execute("update audit_event set actor = rtrim(actor, 'x') where sequence = 2")
        connection.execute("alter table audit_event enable trigger all")


def test_a_token_from_the_running_process_is_accepted_with_its_own_keys(process: Process, peaje: Peaje) -> None:
    """The issuer is where it listens, unless a setting says otherwise."""
    peaje.json("tenants", "create", "oauth")
    account = peaje.json("service-accounts", "create", "robot", "--tenant", "oauth")
    answer = httpx.post(
        f"{process.url}/oauth2/token", data={"grant_type": "client_credentials"},
        auth=(account["client_id"], account["client_secret"]),
    )  # fmt: skip
    metadata = httpx.get(f"{process.url}/.well-known/oauth-authorization-server").json()
    key = jwt.PyJWKClient(metadata["jwks_uri"]).get_signing_key_from_jwt(answer.json()["access_token"]).key

    claims = jwt.decode(
        answer.json()["access_token"], key, algorithms=["ES256"], audience="peaje", issuer=process.url
    )

    assert ("oauth", account["client_id"]) == (claims["tenant"], claims["sub"])
    before = peaje.json("signing-keys", "list")["keys"]
    rotated = peaje.json("signing-keys", "rotate")
    assert [*[key["kid"] for key in before], rotated["kid"]] == [key["kid"] for key in rotated["keys"]]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("keys", "show", "x/../../v1/tenants"), "Not Found"),
        (("projects", "create", "x", "--tenant", "nobody"), "There is no tenant 'nobody'"),
        (("projects", "create", "x", "--tenant", "nobody", "--label", "a"), "NAME=VALUE"),
        (("keys", "create", "--tenant", "nobody", "--models", "none-such"), "is not served"),
        (("operators", "create", "x", "--role", "root"), "role"),
        (("operators", "create", "x", "--role", "developer"), "Name the tenant"),
        (("audit", "verify", "--anchor", "x"), "SEQUENCE:HASH"),
        (("service-accounts", "show", "sa_x"), "There is no service account"),
        (("tenants", "create", "\x1b[2J"), "printable"),
        (("prices", "set", "--model", "tiny", "--input", "1", "--output", "2", "--tier", "200k:input=1"), "--tier 200000:input=2.50,output=15"),
        (("prices", "set", "--model", "tiny", "--input", "1", "--output", "2", "--tier", "0:input=1,output=1"), "above 0 tokens"),
        (("prices", "set", "--model", "tiny", "--input", "1", "--output", "2", "--tier", "5:input=1e3,output=1"), "input above 5 tokens is '1e3'"),
    ],
)
def test_every_error_is_one_line_on_stderr(peaje: Peaje, arguments: tuple[str, ...], words: str) -> None:
    """With what to do, where there is something."""
    status, out, err = peaje(*arguments)

    assert (1, "") == (status, out)
    assert words in err
    assert 1 == len(err.splitlines())


def test_no_secret_is_in_the_log(process: Process, peaje: Peaje) -> None:
    """At level debug, after all of the above and a few failures of its own."""
    peaje.json("tenants", "create", "secretive")
    key = peaje.json("keys", "create", "--tenant", "secretive")
    account = peaje.json("service-accounts", "create", "robot", "--tenant", "secretive")
    token = httpx.post(
        f"{process.url}/oauth2/token", data={"grant_type": "client_credentials"},
        auth=(account["client_id"], account["client_secret"]),
    ).json()["access_token"]  # fmt: skip
    httpx.post(f"{process.url}/v1/tenants", headers={"authorization": f"Bearer {key['key']}"}, json={"name": key["key"]})
    httpx.post(f"{process.url}/oauth2/token", content=account["client_secret"])
    httpx.get(f"{process.url}/v1/keys/{key['key']}", headers={"authorization": f"Bearer {peaje_token(process)}"})

    log = process.log.read_text()

    assert "key_created" in log
    for secret in (key["key"], account["client_secret"], token, peaje_token(process)):
        assert secret not in log
        assert secret[-30:] not in log
    for file in (process.home / "secrets").glob("*"):
        assert file.read_text().strip() not in log


def peaje_token(process: Process) -> str:
    return (process.home / "secrets/admin-token").read_text().strip()


@pytest.mark.parametrize(
    ("settings", "spoil", "words"),
    [
        ({}, ("pepper-1", "0123456789abcdef" * 4, 0o600), "is a sample value"),
        ({}, ("pepper-1", None, 0o640), "is open to others"),
        ({}, ("signing-key-20260101T000000000000Z.pem", "x", 0o600), "is not a private key"),
        ({"PEAJE_CONTROL_ISSUER": "control.example.com"}, None, "PEAJE_CONTROL_ISSUER is"),
        ({"PEAJE_CONTROL_PORT": "0"}, None, "PEAJE_CONTROL_PORT"),
        ({"PEAJE_SECRET_SCANNING_KEYS": "/nowhere/keys.json"}, None, "PEAJE_SECRET_SCANNING_KEYS"),
        ({"PEAJE_POSTGRES_URL": ""}, None, "PEAJE_POSTGRES_URL is not set"),
    ],
)
def test_a_start_with_a_bad_secret_or_setting_is_refused_in_one_line(
    tmp_path: Path, settings: dict[str, str], spoil: tuple[str, str | None, int] | None, words: str
) -> None:
    """Before it listens, and before it looks for Postgres."""
    home = tmp_path / "home"
    make(Places(home), passable=False)
    (home / "envoy/models.yaml").write_text(MODELS)
    if spoil is not None:
        name, text, mode = spoil
        path = home / "secrets" / name
        if text is not None:
            path.write_text(text)
        path.chmod(mode)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PEAJE_")} | {
        "PEAJE_HOME": str(home), "PEAJE_POSTGRES_URL": "postgresql://x:y@127.0.0.1:1/x", "PYTHONPATH": str(ROOT),
    } | settings  # fmt: skip

    done = subprocess.run(
        [sys.executable, "-m", "control.api"], env=environment, capture_output=True, text=True, timeout=60, check=False, cwd=home
    )

    assert 1 == done.returncode, done.stderr
    assert words in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
